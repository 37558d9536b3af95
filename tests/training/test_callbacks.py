import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from inft.training.callbacks import BestCallback, BestSoFar, GracefulStop, TrainerLoggingCallback
from inft.training.runlog import JsonlLogger, read_events

ARGS: Any = None  # the callbacks tested here do not read the arguments


def evaluated(callback: BestCallback, losses: list[float]) -> tuple[list[int], int | None]:
    """Steps at which the adapter was stored, and the step at which the callback asked to stop."""
    stored: list[int] = []
    if callback.keep is None:
        callback.keep = lambda step, value: stored.append(step)
    for step, loss in enumerate(losses, start=1):
        control = TrainerControl()
        callback.on_evaluate(ARGS, TrainerState(global_step=step, max_steps=100), control, metrics={"eval_loss": loss})
        if control.should_training_stop:
            assert control.should_save
            return stored, step
    return stored, None


def judge(patience: int, threshold: float) -> BestCallback:
    return BestCallback(BestSoFar(), keep=None, patience=patience, threshold=threshold)


def test_every_lower_loss_is_stored_even_when_it_is_too_small_to_count_for_early_stopping() -> None:
    assert evaluated(judge(3, 0.5), [5.0, 4.9, 4.8]) == ([1, 2, 3], None)


def test_early_stopping_waits_patience_evaluations_without_a_fall_that_counts() -> None:
    assert evaluated(judge(3, 0.0), [5.0, 4.0, 4.5, 4.4, 4.3]) == ([1, 2], 5)
    assert evaluated(judge(0, 0.0), [5.0] * 20) == ([1], None)


def test_small_falls_add_up_to_one_that_counts() -> None:
    falling = [5.0 - 0.06 * i for i in range(20)]
    assert evaluated(judge(3, 0.1), falling)[1] is None
    assert evaluated(judge(3, 0.3), falling)[1] == 4


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
