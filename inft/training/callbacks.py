"""What happens between optimizer steps: events to the log, the best adapter, early stopping, a graceful stop."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inft.training.best import LOSS, Criterion
from inft.training.captions import CAPTIONS, Captioned
from inft.training.processes import any_of, process_count
from inft.training.runlog import JsonlLogger

OF_LANGUAGE = re.compile(r"eval_(?:loss|reward)_(.+)")
REWARDS = re.compile(r"eval_(reward|rewards/.+)")  # of answers: their mean, that of each function, how pairs are ranked


class TrainerLoggingCallback(TrainerCallback):
    """Writes the figures of any Trainer to a JsonlLogger: log, eval and checkpoint events."""

    def __init__(self, logger: JsonlLogger) -> None:
        self.logger = logger
        self._window: tuple[float, float] | None = None  # when it began, tokens seen by then; None: not known
        self._mark = 0.0  # end of the last step, evaluation or checkpoint
        self._paused = 0.0  # seconds of evaluations and checkpoints in the window

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of tokens per second."""
        self._mark = time.perf_counter()
        self._window = (self._mark, 0) if state.global_step == 0 else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when the step ended, since what follows is not training; step max_steps is always logged."""
        self._mark = time.perf_counter()
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a log event for the figures of training; those of an evaluation come through on_evaluate."""
        if logs is None or "loss" not in logs:
            return
        logs["tokens_per_second"] = self._speed(logs.get("num_tokens"))
        known = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch")
        more = {key: value for key, value in logs.items() if key not in known}
        self.logger.event(
            "log",
            step=state.global_step,
            epoch=state.epoch,
            loss=logs["loss"],
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=logs["tokens_per_second"],
            **more,
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an eval event."""
        self._pause()
        metrics = metrics or {}
        self.logger.event(
            "eval",
            step=state.global_step,
            epoch=state.epoch,
            loss=metrics.get("eval_loss"),
            tokens=metrics.get("eval_tokens"),
            languages=by_language(metrics),
            seconds=metrics.get("eval_runtime"),
            token_accuracy=metrics.get("eval_mean_token_accuracy"),
            **{key.removeprefix("eval_"): value for key, value in metrics.items() if REWARDS.fullmatch(key)},
            **_caption_fields(metrics.get(CAPTIONS)),
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a checkpoint event."""
        self._pause()
        self.logger.event(
            "checkpoint", step=state.global_step, path=f"{args.output_dir}/checkpoint-{state.global_step}"
        )

    def _pause(self) -> None:
        now = time.perf_counter()
        self._paused += now - self._mark
        self._mark = now

    def _speed(self, tokens: float | None) -> float | None:
        """Tokens per second of training since the last call; None without a count or a beginning."""
        if tokens is None:
            return None
        now, window, paused = time.perf_counter(), self._window, self._paused
        self._window, self._paused = (now, tokens), 0.0
        return None if window is None else (tokens - window[1]) / (now - window[0] - paused)


def by_language(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Language -> the loss, or the reward, of its held-out rows."""
    found = ((OF_LANGUAGE.fullmatch(key), value) for key, value in metrics.items())
    return {match[1]: value for match, value in found if match}


def _caption_fields(captioned: Captioned | None) -> dict[str, Any]:
    """What an eval event says of captions, where some were generated."""
    if captioned is None:
        return {}
    return {
        "captions": captioned.figures,
        "caption_rows": captioned.rows,
        "caption_examples": [asdict(example) for example in captioned.examples],
    }


@dataclass(kw_only=True)
class BestSoFar:
    """The best value of the criterion yet and how long it has been waited for; saved in every checkpoint."""

    step: int | None = None
    value: float | None = None
    loss: float | None = None  # at that step: of equal values the one with the lower loss is better
    reference: float | None = None  # the value at the last gain that counted for early stopping
    waited: int = 0  # evaluations since then


class BestCallback(TrainerCallback):
    """After each evaluation: stores the adapter when it is the best, stops when none has been better for long."""

    def __init__(
        self,
        so_far: BestSoFar,
        *,
        keep: Callable[[int, float], None] | None,
        patience: int,
        threshold: float,
        criterion: Criterion = LOSS,
    ) -> None:
        """``keep(step, value)`` stores the current adapter; None stores none. ``patience`` 0 never stops.

        ``threshold`` is the smallest gain that counts for early stopping, in units of the criterion.
        """
        self.so_far = so_far
        self.keep = keep
        self.patience = patience
        self.threshold = threshold
        self.criterion = criterion
        self.stopped_early = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge one evaluation."""
        assert metrics is not None
        value, loss, best = metrics[self.criterion.name], metrics.get("eval_loss"), self.so_far
        # A metric of captions may stand at 0 for long while a model still learns: the loss decides there, if any.
        lower_at_a_tie = value == best.value and best.loss is not None and loss is not None and loss < best.loss
        if self.criterion.improves(value, best.value) or lower_at_a_tie:
            if self.keep is not None:
                self.keep(state.global_step, value)
            best.step, best.value, best.loss = state.global_step, value, loss
        # The reference moves only when a gain counts, so that many small gains add up to one that does.
        if self.criterion.improves(value, best.reference, by=self.threshold):
            best.reference, best.waited = value, 0
        elif lower_at_a_tie:
            best.waited = 0
        else:
            best.waited += 1
        if self.patience_is_over and state.global_step < state.max_steps:
            self.stopped_early = True
            control.should_training_stop = control.should_save = True

    @property
    def patience_is_over(self) -> bool:
        """Whether ``patience`` evaluations have brought no gain that counts; never with patience 0."""
        return self.patience > 0 and self.so_far.waited >= self.patience


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that a scheduler's signal before training is logged and cleaned up too."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class GracefulStop(TrainerCallback):
    """Ctrl-C or SIGTERM: the step is finished and a checkpoint saved; a second one aborts at once.

    Used as a context around training, it puts back the handlers that were there. Several processes stop after the same
    step, whichever of them was told to. torchrun passes each signal on to processes that may have it already, so that
    there a second one counts after ECHO seconds only.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO = 2.0

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.requested = False
        self._since = 0.0  # when, in seconds of the monotonic clock
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._stop) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # of several processes: the handler stays
            if time.monotonic() > self._since + self.ECHO:
                raise KeyboardInterrupt
            return
        self._request()
        if process_count() == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _request(self) -> None:
        self.requested, self._since = True, time.monotonic()
        self.tell("Stopping: the step is finished and a checkpoint saved. Once more aborts at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when a signal has come in."""
        if any_of(self.requested):
            if not self.requested:  # another process was told to stop
                self._request()
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The same for a signal during an evaluation, which the step's own save follows."""
        self.on_step_end(args, state, control)
