"""Plans of an epoch over random numbers of batches."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craft.schedule import EpochPlan, plan_epoch

FAST = settings(deadline=None, max_examples=50, derandomize=True)
BATCHES = st.integers(1, 60)
BETA = st.floats(0.01, 0.99)
WINDOW = st.integers(1, 12)


def plan(sft: int, contrastive: int, window: int, beta: float = 0.6, **options: str) -> EpochPlan:
    return plan_epoch(
        sft_batches=sft, contrastive_batches=contrastive, beta=beta, gradient_accumulation_steps=window, **options
    )


def assert_well_formed(found: EpochPlan, window: int) -> None:
    assert all(sum(counts) == window for counts in found.windows[:-1])
    assert 1 <= sum(found.windows[-1]) <= window
    assert len(list(found.kinds())) == len(found)
    assert list(found.kinds()).count("sft") == found.sft_batches


@FAST
@given(BATCHES, BATCHES, WINDOW, BETA, st.sampled_from(["oversample", "cap", "auto_beta"]), st.booleans())
def test_every_step_but_the_last_has_all_its_micro_batches(sft, contrastive, window, beta, strategy, auto):
    mode = "auto" if auto else "fixed"
    found = plan(sft, contrastive, window, beta, length_strategy=strategy, beta_mode=mode)
    assert_well_formed(found, window)
    assert found.sft_batches >= 1
    assert found.contrastive_batches >= 1


@FAST
@given(BATCHES, BATCHES, WINDOW, BETA)
def test_oversample_passes_over_every_sft_batch_once(sft, contrastive, window, beta):
    """# failure 13: the published package ends the epoch after a beta share of the SFT rows."""
    assert plan(sft, contrastive, window, beta).sft_batches == sft


@FAST
@given(BATCHES, BATCHES, st.integers(2, 12), BETA, st.sampled_from(["oversample", "cap"]))
def test_every_step_holds_both_kinds_where_it_can(sft, contrastive, window, beta, strategy):
    found = plan(sft, contrastive, window, beta, length_strategy=strategy)
    assert all(min(counts) >= 1 for counts in found.windows)
    assert found.sft_share == found.contrastive_share == 1


@FAST
@given(BATCHES, BATCHES, WINDOW, BETA)
def test_cap_takes_no_batch_twice(sft, contrastive, window, beta):
    found = plan(sft, contrastive, window, beta, length_strategy="cap")
    assert found.sft_batches <= sft
    assert found.contrastive_batches <= contrastive


@FAST
@given(BATCHES, BATCHES, WINDOW)
def test_auto_beta_takes_all_of_both_spread_evenly(sft, contrastive, window):
    found = plan(sft, contrastive, window, length_strategy="auto_beta")
    steps = -(-(sft + contrastive) // window)
    if window > 1 and min(sft, contrastive) < steps:
        assert found.steps == min(sft, contrastive)
        assert set(found.windows) in ({(1, window - 1)}, {(window - 1, 1)})
        return
    assert (found.sft_batches, found.contrastive_batches) == (sft, contrastive)
    if window > 1:
        assert all(min(counts) >= 1 for counts in found.windows if sum(counts) > 1)
        full = [counts[1] for counts in found.windows[:-1]]
        assert max(full, default=0) - min(full, default=0) <= 1


def test_what_auto_beta_leaves_out_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        found = plan(100, 3, 4, length_strategy="auto_beta")
    assert found.windows == ((3, 1),) * 3
    assert "91 SFT batches of each epoch are left out" in caplog.text
    assert "oversample" in caplog.text


@pytest.mark.parametrize(("beta", "share"), [(0.6, 0.6), (0.5, 0.5), (0.1, 0.1), (0.75, 0.75)])
def test_steps_of_one_micro_batch_alternate_in_proportion_beta(beta, share):
    """# failure 7: with accumulation 1 the published package trains no SFT batch."""
    found = plan(300, 70, 1, beta)
    assert found.sft_batches == 300
    assert found.sft_share == pytest.approx(share, abs=1e-9)
    assert found.sft_share + found.contrastive_share == pytest.approx(1)
    kinds = list(found.kinds())
    assert kinds[0] == "sft"
    for length in range(10, len(kinds), 37):  # no stretch strays from the proportion by more than one batch
        assert abs(kinds[:length].count("sft") - share * length) <= 1


def test_the_pattern_of_beta_three_quarters_and_four_steps():
    assert list(plan(6, 2, 4, 0.75).kinds()) == ["sft", "sft", "sft", "craft"] * 2


def test_a_short_last_step_keeps_the_proportion():
    assert plan(8, 9, 8, 0.75).windows == ((6, 2), (2, 1))
    assert plan(7, 9, 8, 0.75, length_strategy="cap").windows == ((6, 2), (1, 2))


def test_beta_mode_auto_takes_beta_from_the_numbers():
    assert plan(30, 10, 4, 0.5, beta_mode="auto").windows == ((3, 1),) * 10


def test_error_takes_equal_numbers_and_refuses_others():
    assert plan(9, 9, 4, 0.6, length_strategy="error").sft_batches == 9
    with pytest.raises(ValueError, match=r"9 SFT batches and 8 contrastive ones.*'oversample'"):
        plan(9, 8, 4, 0.6, length_strategy="error")


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, float("nan")])
def test_a_beta_that_leaves_a_kind_out_is_refused(beta):
    with pytest.raises(ValueError, match=r"craft_beta=.*craft_alpha=1"):
        plan(4, 4, 4, beta)
    assert plan(4, 4, 4, beta, length_strategy="auto_beta").windows == ((2, 2), (2, 2))


@pytest.mark.parametrize(("sft", "contrastive", "name"), [(0, 4, "SFT"), (4, 0, "contrastive")])
def test_a_data_set_without_a_batch_is_named(sft, contrastive, name):
    with pytest.raises(ValueError, match=f"the {name} data set gives no batch"):
        plan(sft, contrastive, 4)


def test_a_misspelt_strategy_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'oversample'"):
        plan(4, 4, 4, length_strategy="oversampl")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=0"):
        plan(4, 4, 0)
