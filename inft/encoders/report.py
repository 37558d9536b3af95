"""How an encoder's run shows itself: events in its JSON-lines log, a bar or lines on the console."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerControl, TrainerState

from inft.encoders.data.counts import Counts
from inft.training.guards import GuardResult
from inft.training.progress import ProgressReport
from inft.training.runlog import JsonlLogger


class Report:
    """Tells a log and a console; a context that takes the bar away at its end."""

    def __init__(self, log: JsonlLogger, console: Console) -> None:
        self.log_file = log
        self.console = console
        self._progress = ProgressReport(console)
        self._state = TrainerState()
        self._control = TrainerControl()
        self._unreadable: set[str] = set()  # rows that have been told
        self._counted = False  # what became of the documents has been told

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()

    def begin(self, step: int, max_steps: int) -> None:
        """Start the clock and the bar."""
        self._state = TrainerState(global_step=step, max_steps=max_steps)
        self._progress.on_train_begin(None, self._state, self._control)

    def guard(self, result: GuardResult) -> None:
        """What a check before the first step found."""
        self.log_file.event("guard", **asdict(result))
        self.tell(f"{'ok    ' if result.ok else 'FAILED'} {result.name}: {result.detail}")

    def stepped(self, step: int) -> None:
        """Move the bar."""
        self._state.global_step = step
        self._progress.on_step_end(None, self._state, self._control)

    def log(
        self, step: int, epoch: float, figures: Mapping[str, Any], counts: Mapping[str, int], *, last: bool
    ) -> None:
        """The means since the last log; what became of the documents is told at the first log and at the last."""
        self.log_file.event("log", step=step, epoch=epoch, **figures, **({"documents": counts} if counts else {}))
        if counts and (last or not self._counted):
            self.tell(Counts(**counts).words())
        self._counted = True
        self._progress.on_log(None, self._state, self._control, logs=dict(figures))

    def unreadable(self, rows: Sequence[str]) -> None:
        """Rows that were skipped, each told once."""
        for row in rows:
            if row not in self._unreadable:
                self._unreadable.add(row)
                self.tell(f"skipped: {row}")

    def evaluated(self, step: int, epoch: float, figures: Mapping[str, Any]) -> None:
        """The figures of the held-out data."""
        self.log_file.event("eval", step=step, epoch=epoch, **figures)
        words = " · ".join(
            _words(name, value) for name, value in figures.items() if name in SHOWN and value is not None
        )
        self.tell(f"step {step}/{self._state.max_steps} · held-out {words}")

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint that is whole."""
        self.log_file.event("checkpoint", step=step, path=str(path))

    def tell(self, text: str) -> None:
        """A line on the console."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


# Figures of an evaluation that the console shows, and whether they are shares.
SHOWN: Mapping[str, tuple[str, bool]] = {
    "loss": ("loss", False),
    "accuracy": ("masked accuracy", True),
    "perplexity": ("perplexity of a masked token", False),
    "in_batch_accuracy": ("in-batch accuracy", True),
    "recall_at_1": ("recall@1", True),
    "recall_at_10": ("recall@10", True),
    "ndcg_at_10": ("nDCG@10", False),
    "mrr": ("MRR", False),
}


def _words(name: str, value: float) -> str:
    title, share = SHOWN[name]
    return f"{title} {value:.1%}" if share else f"{title} {value:.4g}"
