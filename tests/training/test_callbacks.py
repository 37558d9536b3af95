import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from inft.training.best import LOSS, Criterion, criterion_of
from inft.training.callbacks import BestCallback, BestSoFar, GracefulStop, TrainerLoggingCallback
from inft.training.captions import CAPTIONS, Captioned, Example
from inft.training.runlog import JsonlLogger, read_events
from params import SFTParams

ARGS: Any = None  # the callbacks tested here do not read the arguments


CHRF = criterion_of(SFTParams(best_metric="chrf"))


def evaluated(callback: BestCallback, values: list[float]) -> tuple[list[int], int | None]:
    """Steps at which the adapter was stored, and the step at which the callback asked to stop."""
    stored: list[int] = []
    if callback.keep is None:
        callback.keep = lambda step, value: stored.append(step)
    for step, value in enumerate(values, start=1):
        control = TrainerControl()
        metrics = {"eval_loss": 1.0, "eval_chrf": 50.0, callback.criterion.name: value}
        callback.on_evaluate(ARGS, TrainerState(global_step=step, max_steps=100), control, metrics=metrics)
        if control.should_training_stop:
            assert control.should_save
            return stored, step
    return stored, None


def judge(patience: int, threshold: float, criterion: Criterion = LOSS) -> BestCallback:
    return BestCallback(BestSoFar(), keep=None, patience=patience, threshold=threshold, criterion=criterion)


def test_every_lower_loss_is_stored_even_when_it_is_too_small_to_count_for_early_stopping() -> None:
    assert evaluated(judge(3, 0.5), [5.0, 4.9, 4.8]) == ([1, 2, 3], None)


def test_early_stopping_waits_patience_evaluations_without_a_fall_that_counts() -> None:
    assert evaluated(judge(3, 0.0), [5.0, 4.0, 4.5, 4.4, 4.3]) == ([1, 2], 5)
    assert evaluated(judge(0, 0.0), [5.0] * 20) == ([1], None)


def test_small_falls_add_up_to_one_that_counts() -> None:
    falling = [5.0 - 0.06 * i for i in range(20)]
    assert evaluated(judge(3, 0.1), falling)[1] is None
    assert evaluated(judge(3, 0.3), falling)[1] == 4


def test_a_metric_of_captions_is_best_when_it_is_highest_and_of_equal_ones_the_earlier_stays() -> None:
    assert evaluated(judge(3, 0.0, CHRF), [10.0, 30.0, 20.0, 30.0, 30.5]) == ([1, 2, 5], None)
    assert evaluated(judge(3, 0.0), [3.0, 2.0, 2.5, 2.0]) == ([1, 2], None)
    assert evaluated(judge(2, 0.0, CHRF), [10.0, 10.0, 10.0]) == ([1], 3)


def test_of_equal_figures_the_one_with_the_lower_loss_is_better_and_worth_waiting_for() -> None:
    callback, stored = judge(2, 0.0, CHRF), []
    callback.keep = lambda step, value: stored.append(step)
    losses = [5.0, 4.0, 3.0, 2.0, 2.5, 2.2]
    for step, loss in enumerate(losses, start=1):
        control = TrainerControl()
        metrics = {"eval_loss": loss, "eval_chrf": 0.0}
        callback.on_evaluate(ARGS, TrainerState(global_step=step, max_steps=100), control, metrics=metrics)
        assert control.should_training_stop == (step == 6)
    assert stored == [1, 2, 3, 4]


def test_a_higher_figure_is_better_whatever_the_loss() -> None:
    callback, stored = judge(0, 0.0, CHRF), []
    callback.keep = lambda step, value: stored.append(step)
    for step, (loss, chrf) in enumerate([(2.0, 10.0), (3.0, 20.0), (1.0, 15.0)], start=1):
        metrics = {"eval_loss": loss, "eval_chrf": chrf}
        callback.on_evaluate(ARGS, TrainerState(global_step=step, max_steps=9), TrainerControl(), metrics=metrics)
    assert stored == [1, 2]


def test_the_threshold_is_in_points_of_the_metric() -> None:
    rising = [10.0 + 0.6 * i for i in range(20)]
    assert evaluated(judge(3, 1.0, CHRF), rising)[1] is None
    assert evaluated(judge(3, 2.0, CHRF), rising)[1] == 4


def test_a_criterion_says_its_figure_in_the_metrics_own_unit() -> None:
    by_exact = criterion_of(SFTParams(best_metric="exact"))
    assert (LOSS.said(1.23456), CHRF.said(63.21)) == ("held-out loss 1.2346", "held-out chrF 63.2")
    assert (by_exact.name, by_exact.said(35.0)) == ("eval_exact", "held-out exact 35.0%")
    assert criterion_of(SFTParams()) is LOSS


def test_stopping_early_is_not_claimed_at_the_last_step() -> None:
    callback = judge(1, 0.0)
    callback.on_evaluate(ARGS, TrainerState(global_step=1, max_steps=2), TrainerControl(), metrics={"eval_loss": 1.0})
    callback.on_evaluate(ARGS, TrainerState(global_step=2, max_steps=2), TrainerControl(), metrics={"eval_loss": 1.0})
    assert callback.patience_is_over
    assert not callback.stopped_early


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_save_and_a_stop_after_the_step_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    told: list[str] = []
    with GracefulStop(tell=told.append) as stop:
        control = TrainerControl()
        stop.on_step_end(ARGS, TrainerState(), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        stop.on_step_end(ARGS, TrainerState(), control)
        assert control.should_save
        assert control.should_training_stop
    assert len(told) == 1
    assert signal.getsignal(number) == before


def test_tokens_per_second_leave_out_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("inft.training.callbacks.time.perf_counter", lambda: now)
    with JsonlLogger(tmp_path / "log.jsonl") as log:
        callback = TrainerLoggingCallback(log)
        state = TrainerState(global_step=0)
        callback.on_train_begin(ARGS, state, TrainerControl())
        now += 0.5
        callback.on_step_end(ARGS, state, TrainerControl())
        now += 4
        callback.on_evaluate(ARGS, state, TrainerControl(), metrics={"eval_loss": 1.0})
        logs = {"loss": 1.0, "num_tokens": 100}
        callback.on_log(ARGS, state, TrainerControl(), logs=logs)
    assert logs["tokens_per_second"] == 200
    kinds = [event["event"] for event in read_events(tmp_path / "log.jsonl")]
    assert kinds == ["eval", "log"]


def test_an_evaluation_with_captions_logs_their_figures_and_examples_and_one_without_does_not(tmp_path: Path) -> None:
    example = Example(language="si", reference="රතු", generated="නිල්")
    captioned = Captioned(figures={"chrf": 12.5, "exact": 0.0}, rows=7, examples=[example])
    with JsonlLogger(tmp_path / "log.jsonl") as log:
        callback = TrainerLoggingCallback(log)
        for told in (None, captioned):
            metrics = {"eval_loss": 1.0, "eval_loss_si": 1.0, "eval_chrf": 12.5, CAPTIONS: told}
            callback.on_evaluate(ARGS, TrainerState(global_step=1), TrainerControl(), metrics=metrics)
    without, logged = read_events(tmp_path / "log.jsonl")
    assert not any(key.startswith("caption") for key in without)
    assert (logged["captions"], logged["caption_rows"]) == ({"chrf": 12.5, "exact": 0.0}, 7)
    assert logged["caption_examples"] == [{"language": "si", "reference": "රතු", "generated": "නිල්"}]
    assert logged["languages"] == {"si": 1.0}
