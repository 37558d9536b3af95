"""The loop that trains an encoder: batches → losses → step → log → evaluate → checkpoint, on accelerate.

What is learned stands in a Task: pretraining and contrastive fine-tuning are one file each. The loop knows steps, token
weights, clipping, bad steps, figures and files.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inft.encoders.checkpoints import (
    MODELS,
    STATES,
    Position,
    data_place,
    load_state,
    read_run,
    remove_old,
    save_state,
    store_model,
)
from inft.encoders.data.reader import killed_readers_told
from inft.encoders.optimizer import make_optimizers
from inft.encoders.report import Report
from inft.encoders.schedule import make_schedule, set_learning_rate
from inft.training.callbacks import GracefulStop
from inft.training.guards import GuardResult
from inft.training.processes import any_of, gather, on_main, process_count, rank, together
from params.encoder import EncoderParams
from params.errors import UserError

Status = Literal["finished", "interrupted"]


class Batch(Protocol):
    """A micro-batch."""

    @property
    def weight(self) -> int:
        """What its loss is a sum over: masked tokens, or rows."""

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a micro-batch and what else was counted."""

    sum: Tensor  # over the batch's weight, with gradient
    counts: Mapping[str, Tensor] = field(default_factory=dict)  # sums over the same weight: shown divided by it


class Task(Protocol[B]):
    """What is trained, on which data."""

    def next_batch(self) -> B:
        """The next micro-batch of this process."""

    def loss(self, model: nn.Module, batch: B) -> Loss:
        """The loss of a micro-batch; `model` may be wrapped."""

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """Figures of the held-out data, equal in all processes: loss, tokens, languages and more; None without any."""

    def position(self) -> Position:
        """Where the run stands in its data, after the batch last returned."""

    def go_on(self, directory: Path) -> None:
        """Go on from a position that was saved."""

    def guards(self, model: nn.Module, batch: B) -> Iterator[GuardResult]:
        """What is checked of the plain model and the first batch before the first step."""

    def add_files(self, model: PreTrainedModel, directory: Path) -> None:
        """Put beside a stored model what else it is used with."""

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Documents that this process has read, and what became of them."""

    @property
    def bad_rows(self) -> Sequence[str]:
        """The first rows that this process could not read, with file, row and reason."""

    @property
    def description(self) -> Mapping[str, Any]:
        """The data in plain values: a run is gone on with on the same only."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a loop ended."""

    status: Status
    step: int
    loss: float | None  # of the last logged window
    figures: Mapping[str, Any] | None  # of the last evaluation


class Loop:
    """Trains a model on a task; every process of a run makes one."""

    def __init__(
        self,
        params: EncoderParams,
        task: Task[Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        report: Report,
        stop: GracefulStop,
    ) -> None:
        self.params = params
        self.task = task
        self.tokenizer = tokenizer
        self.report = report
        self.stop = stop
        trainer = params.trainer
        AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
        self.accelerator = Accelerator(
            mixed_precision="bf16" if trainer.mixed_precision == "bf16" else "no",
            cpu=not torch.cuda.is_available(),
            # Said here, so that no variable of a launcher divides the gradients or compiles the model.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
        )
        self.plain = model
        optimizers = make_optimizers(model, params.optimizer)
        self.model, *prepared = self.accelerator.prepare(model, *optimizers)
        self.optimizers: Sequence[torch.optim.Optimizer] = prepared
        self.rate = make_schedule(params.scheduler, trainer.max_steps)
        self.step = 0
        self.bad_steps = 0  # in a row
        self.window = Window()
        self.figures: Mapping[str, Any] | None = None
        self.last_loss: float | None = None
        self.ahead: list[Batch] = []  # taken before the step that trains on it

    def go_on(self, checkpoint: Path) -> None:
        """Put everything back as it was at a checkpoint."""
        load_state(self.accelerator, checkpoint)
        run = read_run(checkpoint)
        self.step = run["step"]
        self.window = Window.restored(run["windows"][rank()])
        self.bad_steps = self.window.bad_steps
        self.task.go_on(data_place(checkpoint))
        if not (Path(self.params.trainer.output_dir) / MODELS / str(self.step)).is_dir():
            self._store()  # the run was killed between the two kinds of checkpoint

    def run(self) -> Outcome:
        """Train until max_steps or until somebody asks to stop; the last step is always saved."""
        trainer = self.params.trainer
        self._guard()
        self.report.begin(self.step, trainer.max_steps)
        self.window.restart_clock()
        if self.step == 0:
            self._evaluate()
        while self.step < trainer.max_steps:
            place = self.task.position()
            with killed_readers_told():  # which may be in the middle of a step: then nothing is rescued
                try:
                    self._train_step()
                    place = self.task.position()
                    stopping = self._after_step()
                except UserError:
                    self._rescue(place)
                    raise
            if stopping and self.step < trainer.max_steps:
                return self._outcome("interrupted")
        return self._outcome("finished")

    def _after_step(self) -> bool:
        """Log, evaluate and save where that is due; whether somebody asked to stop."""
        trainer = self.params.trainer
        stopping = any_of(self.stop.requested)
        last = self.step >= trainer.max_steps
        if self.step % trainer.logging_steps == 0 or last:
            self._log(last=last or stopping)
        if self.step % trainer.eval_steps == 0 or last:
            self._evaluate()
        if self.step % trainer.save_steps == 0 or last or stopping:
            self._save()
        return stopping

    def _rescue(self, place: Position) -> None:
        """Save the last whole step before a mistake in the data, or a full disk of logs, ends the run.

        Not after steps without a finite loss, and not in several processes, where the others may be elsewhere.
        """
        final = Path(self.params.trainer.output_dir) / STATES / str(self.step)
        if process_count() > 1 or self.bad_steps or self.step == 0 or final.exists():
            return
        with suppress(UserError):
            self._save_state(place)
            self._store()
            self.report.tell(f"step {self.step} was saved before the run ended.")

    def _guard(self) -> None:
        """Report every check of the first batch, which is trained on next, and raise one UserError if any failed."""
        if self.step >= self.params.trainer.max_steps:
            return
        self.ahead = [self.task.next_batch()]

        def failures() -> list[str]:
            batch = self.ahead[0].to(self.accelerator.device)
            with self.accelerator.autocast():
                results = list(self.task.guards(self.plain, batch))
            for result in results:
                self.report.guard(result)
            return [f"{result.name}: {result.detail}" for result in results if not result.ok]

        def refuse() -> None:
            if failed := failures():
                raise UserError("the run is not started:\n  " + "\n  ".join(failed))

        together(refuse)

    def _next_batch(self) -> Batch:
        return self.ahead.pop() if self.ahead else self.task.next_batch()

    def _train_step(self) -> None:
        """One optimizer step over gradient_accumulation_steps micro-batches, weighted by what they count."""
        trainer, device = self.params.trainer, self.accelerator.device
        batches = [self._next_batch() for _ in range(trainer.gradient_accumulation_steps)]
        totals = torch.tensor([sum(b.weight for b in batches), sum(b.tokens for b in batches)], device=device)
        weight, tokens = self.accelerator.reduce(totals).tolist()
        losses = [self._backward(batch, weight, last=batch is batches[-1]) for batch in batches]
        limit = math.inf if trainer.gradient_clipping is None else trainer.gradient_clipping
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        total = sum(float(loss.sum.detach()) for loss in losses)
        finite = not any_of(not (math.isfinite(total) and math.isfinite(float(norm))))
        if finite and weight:
            set_learning_rate(self.optimizers, self.params.optimizer.lr * self.rate(self.step + 1))
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.report.stepped(self.step)
        self._judge(finite, total / max(sum(b.weight for b in batches), 1), float(norm))
        self.window.add(losses, sum(b.weight for b in batches), tokens, float(norm), counted=finite)

    def _backward(self, batch: Batch, weight: float, *, last: bool) -> Loss:
        """Gradients of one micro-batch: DistributedDataParallel takes the mean over processes, the weight is of all."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss = self.task.loss(self.model, batch.to(self.accelerator.device))
            self.accelerator.backward(loss.sum * (process_count() / max(weight, 1)))
        return loss

    def _judge(self, finite: bool, loss: float, norm: float) -> None:
        """Count steps without a finite loss in a row; too many end the run."""
        limit = self.params.trainer.max_bad_steps
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.window.bad_steps = self.bad_steps
        if finite:
            return
        self.report.tell(
            f"step {self.step}: the loss is {loss:g} and the gradient norm {norm:g}; the step is skipped "
            f"({self.bad_steps} of {limit} in a row)."
        )
        if self.bad_steps >= limit:
            raise UserError(
                f"{limit} steps in a row up to step {self.step} had no finite loss or gradient; the run is stopped. "
                "Lower optimizer.lr or trainer.gradient_clipping, lengthen scheduler.warmup_steps, or set "
                "trainer.mixed_precision: no. Checkpoints are kept."
            )

    def _log(self, *, last: bool) -> None:
        figures = self.window.figures(self.accelerator)
        self.last_loss = figures["loss"]
        rate = self.params.optimizer.lr * self.rate(self.step)
        counts: Counter[str] = Counter()
        for own in gather(dict(self.task.counts)):
            counts.update(own)
        self.report.unreadable(self.task.bad_rows)
        self.report.log(self.step, self.task.epoch, {**figures, "learning_rate": rate}, counts, last=last)
        tokens_seen = self.window.tokens_seen
        self.window = Window(tokens_seen=tokens_seen, bad_steps=self.bad_steps)

    def _evaluate(self) -> None:
        """The held-out figures; the random states of training do not see it."""
        began = time.perf_counter()
        self.model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            figures = self.task.evaluate(self.model)
        self.model.train()
        self.window.pause(time.perf_counter() - began)
        if figures is None:
            return
        self.figures = figures
        self.report.evaluated(self.step, self.task.epoch, {**figures, "seconds": time.perf_counter() - began})

    def _save(self) -> None:
        """Both kinds of checkpoint, then the oldest ones go."""
        began = time.perf_counter()
        path = self._save_state(self.task.position())
        self._store()
        remove_old(self.params)
        self.report.saved(self.step, path)
        self.window.pause(time.perf_counter() - began)

    def _save_state(self, place: Position) -> Path:
        window, data = self.window.saved(), self.task.description
        return save_state(self.accelerator, self.params, place, step=self.step, data=data, window=window)

    def _store(self) -> None:
        directory = Path(self.params.trainer.output_dir) / MODELS / str(self.step)
        add = partial(self.task.add_files, self.plain)
        on_main(lambda: store_model(self.plain, self.tokenizer, self.params, directory, add))

    def _outcome(self, status: Status) -> Outcome:
        return Outcome(status=status, step=self.step, loss=self.last_loss, figures=self.figures)


@dataclass(kw_only=True)
class Window:
    """What has been added up since the last log, of this process; tokens are of all."""

    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    tokens_seen: int = 0  # since the run began
    norm: float = math.nan  # of the last step
    skipped: int = 0  # steps
    bad_steps: int = 0  # in a row
    seconds: float = 0.0  # before the clock was started again
    began: float = field(default_factory=time.perf_counter)

    def add(self, losses: Sequence[Loss], weight: int, tokens: int, norm: float, *, counted: bool) -> None:
        """One step; of a skipped one nothing but its tokens."""
        self.tokens += tokens
        self.tokens_seen += tokens
        self.norm = norm
        self.skipped += not counted
        if not counted:
            return
        self.weight += weight
        for loss in losses:
            for name, value in {"loss": loss.sum, **loss.counts}.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    def figures(self, accelerator: Accelerator) -> dict[str, Any]:
        """The means over the window of all processes."""
        values = torch.tensor([self.weight, *self.sums.values()], dtype=torch.float64, device=accelerator.device)
        weight, *sums = accelerator.reduce(values).tolist()
        means = {name: total / weight if weight else math.nan for name, total in zip(self.sums, sums, strict=True)}
        seconds = self.seconds + time.perf_counter() - self.began
        return {
            "loss": math.nan,
            **means,
            "grad_norm": self.norm,
            "tokens_per_second": self.tokens / seconds,
            "tokens": self.tokens_seen,
            "skipped_steps": self.skipped,
        }

    def pause(self, seconds: float) -> None:
        """Leave out a time that was not training."""
        self.seconds -= seconds

    def restart_clock(self) -> None:
        """Count from now on."""
        self.began = time.perf_counter()

    def saved(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        seconds = self.seconds + time.perf_counter() - self.began
        kept = ("weight", "sums", "tokens", "tokens_seen", "skipped", "bad_steps")
        norm = None if math.isnan(self.norm) else self.norm
        return {**{name: getattr(self, name) for name in kept}, "norm": norm, "seconds": seconds}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "Window":
        """The window of a checkpoint."""
        norm = math.nan if saved["norm"] is None else saved["norm"]
        return cls(**{**saved, "norm": norm, "sums": dict(saved["sums"])})
