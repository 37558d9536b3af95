"""How training shows itself: a bar on a terminal, a line at each log elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inft.training.callbacks import by_language
from inft.training.captions import CAPTIONS, Captioned


class ProgressReport(TrainerCallback):
    """Steps, loss, tokens per second and remaining time; evaluations are lines in both cases.

    As a context it takes the bar away when training ends with an error.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and, on a terminal, the bar."""
        self._began, self._first_step = time.perf_counter(), state.global_step
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss, reward and speed."""
        if logs is None or "loss" not in logs:
            return
        speed, reward = logs.get("tokens_per_second"), logs.get("reward")
        figures = f"loss {logs['loss']:.4f}" + (f" · reward {reward:.4f}" if reward is not None else "")
        figures += f" · {speed:,.0f} tokens/s" if speed else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=figures)
        else:
            left = duration(self._seconds_left(state))
            self._line(f"step {state.global_step}/{state.max_steps} · {figures} · {left} left")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss or the reward of the held-out rows, and how good the captions of some of them are."""
        assert metrics is not None
        self._line(f"step {state.global_step}/{state.max_steps} · {heldout_words(metrics)}")
        captioned: Captioned | None = metrics.get(CAPTIONS)
        if captioned is not None:
            self._line(f"step {state.global_step}/{state.max_steps} · captions: {captioned.line}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.close()

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, if it is there."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        return (time.perf_counter() - self._began) / done * (state.max_steps - state.global_step)

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def heldout_words(metrics: Mapping[str, Any]) -> str:
    """The figures of the held-out rows in a line: "held-out loss 0.6123 (en 0.5, si 0.7) · accuracy 71.2%"."""
    name = "loss" if "eval_loss" in metrics else "reward"
    languages = [f"{code} {value:.4f}" for code, value in by_language(metrics).items()]
    parts = f" ({', '.join(languages)})" if len(languages) > 1 else ""
    words = f"held-out {name} {metrics[f'eval_{name}']:.4f}{parts}"
    if "eval_rewards/accuracies" in metrics:
        words += f" · chosen above rejected {metrics['eval_rewards/accuracies']:.1%}"
        words += f", by {metrics['eval_rewards/margins']:.4f}"
    return words


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "3 min 20 s", "1 h 05 min"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
