"""Learning-rate schedules against their closed forms, and the settings that cannot hold."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from inft.encoders.schedule import make_schedule, set_learning_rate
from params.encoder import SchedulerParams
from params.encoder_schedule import decay_span, schedule_problems


def test_the_papers_schedule_warms_up_falls_as_a_cosine_and_stays_at_a_tenth():
    factor = make_schedule(SchedulerParams(name="cosine", warmup_steps=2_000, decay_steps=900_000), 1_000_000)
    assert factor(1) == 1 / 2_000
    assert factor(1_000) == 0.5
    assert factor(2_000) == 1
    assert factor(451_000) == pytest.approx(0.55)  # half of the way: the mean of 1 and 0.1
    quarter = 2_000 + 898_000 // 4
    assert factor(quarter) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(900_000) == factor(950_000) == factor(1_000_000) == pytest.approx(0.1)


def test_linear_falls_by_equal_amounts_to_the_last_step():
    factor = make_schedule(SchedulerParams(name="linear", warmup_steps=10, final_lr_ratio=0), 110)
    assert [factor(step) for step in (10, 35, 60, 85, 110)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_wsd_keeps_the_peak_until_its_last_tenth():
    factor = make_schedule(SchedulerParams(name="wsd", warmup_steps=100, final_lr_ratio=0.2), 1_000)
    assert {factor(step) for step in range(100, 901)} == {1.0}
    assert factor(950) == pytest.approx(0.6)
    assert factor(1_000) == pytest.approx(0.2)


def test_wsd_decays_over_as_many_steps_as_told():
    factor = make_schedule(SchedulerParams(name="wsd", warmup_steps=0, decay_steps=4, final_lr_ratio=0), 10)
    assert [factor(step) for step in range(1, 11)] == pytest.approx([1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


schedules = st.builds(
    SchedulerParams,
    name=st.sampled_from(["cosine", "linear", "wsd"]),
    warmup_steps=st.integers(0, 40),
    decay_steps=st.none() | st.integers(1, 120),
    final_lr_ratio=st.floats(0, 1),
)


@given(schedules, st.integers(1, 100))
def test_a_sound_schedule_rises_stays_falls_and_never_leaves_its_bounds(scheduler, max_steps):
    assume(not schedule_problems(scheduler, max_steps))
    factor = make_schedule(scheduler, max_steps)
    rates = [factor(step) for step in range(1, max_steps + 30)]
    warmup, (start, end) = scheduler.warmup_steps, decay_span(scheduler, max_steps)
    assert all(0 < rate <= 1 for rate in rates[:warmup])
    assert all(scheduler.final_lr_ratio - 1e-12 <= rate <= 1 + 1e-12 for rate in rates[warmup:])
    assert rates[:warmup] == sorted(rates[:warmup])
    after = rates[max(warmup - 1, 0) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert all(rate == pytest.approx(scheduler.final_lr_ratio) for rate in rates[end - 1 :])
    assert not warmup or rates[warmup - 1] == 1
    assert start >= warmup


@given(schedules, st.integers(1, 100))
def test_a_problem_is_told_exactly_where_the_peak_or_the_decay_has_no_room(scheduler, max_steps):
    start, end = decay_span(scheduler, max_steps)
    sound = scheduler.warmup_steps < max_steps and scheduler.warmup_steps <= start < end
    assert bool(schedule_problems(scheduler, max_steps)) != sound


@pytest.mark.parametrize(
    ("scheduler", "names"),
    [
        (SchedulerParams(warmup_steps=100), ["warmup_steps 100", "max_steps 100", "10"]),
        (SchedulerParams(warmup_steps=50, decay_steps=50), ["decay_steps 50", "warmup_steps"]),
        (SchedulerParams(name="wsd", warmup_steps=50, decay_steps=60), ["decay_steps 60", "step 40", "step 50"]),
    ],
)
def test_a_problem_names_the_fields_and_the_remedy(scheduler, names):
    [problem] = schedule_problems(scheduler, 100)
    assert all(name in problem for name in names)
    assert "lower" in problem


def test_every_group_of_every_optimizer_takes_the_rate():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizers = [torch.optim.SGD([{"params": [w]} for w in weights[:2]], lr=1), torch.optim.AdamW(weights[2:], lr=1)]
    set_learning_rate(optimizers, 0.25)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.25] * 3
