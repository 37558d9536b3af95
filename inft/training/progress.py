"""How training shows itself: a bar on a terminal, a line at each log elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        """Show loss and speed."""
        if logs is None or "loss" not in logs:
            return
        speed = logs.get("tokens_per_second")
        figures = f"loss {logs['loss']:.4f}" + (f" · {speed:,.0f} tokens/s" if speed else "")
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
        """Show the loss on the held-out rows, and how good the captions of some of them are."""
        assert metrics is not None
        prefix = "eval_loss_"
        languages = [f"{key.removeprefix(prefix)} {metrics[key]:.4f}" for key in metrics if key.startswith(prefix)]
        parts = f" ({', '.join(languages)})" if len(languages) > 1 else ""
        self._line(f"step {state.global_step}/{state.max_steps} · held-out loss {metrics['eval_loss']:.4f}{parts}")
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


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "3 min 20 s", "1 h 05 min"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
