"""Fine-tuning a stored encoder on tasks in GLUE's format, several times with different seeds.

As is usual on GLUE, each seed's figures are those of its best epoch on the validation rows: they compare encoders, and
are a little above what unseen rows would give.
"""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from inft.encoders.evaluation.glue_data import Example, TaskData
from inft.encoders.evaluation.metrics import METRICS
from inft.encoders.outputs import write_json
from inft.encoders.stored import load_classifier, load_tokenizer, longest_text
from inft.training.hardware import has_bf16

SCORE = "score"  # mean of a task's metrics
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GlueParams:
    """How a task is learned."""

    seeds: Sequence[int] = (0, 1, 2)  # of head, order and dropout: one fine-tuning each
    epochs: int = 10  # at most
    patience: int = 3  # epochs without a better score before a fine-tuning ends
    batch_size: int = 32  # rows
    lr: float = 3e-5  # peak; linear decay to 0
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01
    max_length: int = 256  # tokens of a row, special ones included; longer ones are cut and counted


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """The best epoch of one fine-tuning."""

    seed: int
    epoch: int
    figures: Mapping[str, Mapping[str, float]]  # validation split -> metric -> value


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What all seeds found; standard deviations are of the seeds (n - 1), None for one seed."""

    task: str
    model: str
    rows: Mapping[str, int]  # split -> rows
    cut: int  # rows that were longer than max_length
    seeds: Sequence[SeedResult]
    params: GlueParams
    mean: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # split -> metric -> value
    sd: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


class TokenRows(NamedTuple):
    """Tokenised rows by split, and how many were longer than allowed."""

    splits: Mapping[str, list[dict[str, Any]]]
    cut: int


def run_glue(model: str, data: TaskData, params: GlueParams, *, say: Say = lambda line: None) -> TaskResult:
    """Fine-tune a stored encoder on a task once for each seed and return the validation figures.

    Errors: UserError when the model or its tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(model)
    found: list[SeedResult] = []
    rows: TokenRows | None = None
    for seed in params.seeds:
        set_seed(seed)
        network = _classifier(model, data)
        rows = rows or _tokenized(data, tokenizer, min(params.max_length, longest_text(tokenizer, network.config)))
        found.append(_fine_tune(network, tokenizer, data, rows.splits, params, seed))
        best = found[-1]
        words = ", ".join(f"{name} {value:.4f}" for name, value in _first(best.figures).items())
        say(f"{data.task.name} seed {seed}: {words} (epoch {best.epoch})")
    mean, sd = summary([result.figures for result in found])
    sizes = {"train": len(data.train), **{name: len(part) for name, part in data.validation.items()}}
    return TaskResult(
        task=data.task.name,
        model=model,
        rows=sizes,
        cut=rows.cut if rows else 0,
        seeds=found,
        params=params,
        mean=mean,
        sd=sd,
    )


def summary(
    figures: Sequence[Mapping[str, Mapping[str, float]]],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float | None]]]:
    """Mean and sample standard deviation over seeds of every split's metrics; None for a single seed."""
    mean: dict[str, dict[str, float]] = {}
    sd: dict[str, dict[str, float | None]] = {}
    for split, metrics in figures[0].items():
        values = {name: [one[split][name] for one in figures] for name in metrics}
        mean[split] = {name: statistics.fmean(part) for name, part in values.items()}
        sd[split] = {name: statistics.stdev(part) if len(part) > 1 else None for name, part in values.items()}
    return mean, sd


def save_results(path: Path, results: Sequence[TaskResult]) -> None:
    """Write the results as JSON, whole or not at all."""
    write_json(path, [asdict(result) for result in results])


def glue_table(results: Sequence[TaskResult]) -> Table:
    """A row per task and validation split: each metric times 100, mean ± standard deviation over seeds."""
    table = Table(title="GLUE format, best epoch on validation, × 100")
    for heading in ("task", "rows", "seeds", "score", "metrics"):
        table.add_column(heading, justify="right" if heading in ("rows", "seeds", "score") else "left")
    for result in results:
        for split, mean in result.mean.items():
            sd = result.sd[split]
            words = {name: _with_sd(mean[name], sd[name]) for name in mean}
            metrics = ", ".join(f"{name} {word}" for name, word in words.items() if name != SCORE)
            name = result.task if len(result.mean) == 1 else f"{result.task} {split.removeprefix('validation_')}"
            table.add_row(name, f"{result.rows[split]:,}", str(len(result.seeds)), words[SCORE], metrics)
    if len({result.task for result in results}) > 1:
        scores = [statistics.fmean(split[SCORE] for split in result.mean.values()) for result in results]
        table.caption = f"mean of the tasks: {100 * statistics.fmean(scores):.1f}"
    return table


def _with_sd(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def _classifier(model: str, data: TaskData) -> Any:
    regression = data.task.regression
    return load_classifier(model, num_labels=1 if regression else len(data.classes), regression=regression)


def _tokenized(data: TaskData, tokenizer: Any, limit: int) -> TokenRows:
    cut, found = 0, {}
    for split, examples in {"train": data.train, **data.validation}.items():
        texts = list(zip(*(example.texts for example in examples), strict=True))
        whole = tokenizer(*map(list, texts), truncation=False, verbose=False)["input_ids"]
        cut += sum(len(ids) > limit for ids in whole)
        encoded = tokenizer(*map(list, texts), truncation=True, max_length=limit)
        found[split] = [_row(encoded, index, example) for index, example in enumerate(examples)]
    return TokenRows(found, cut)


def _row(encoded: Any, index: int, example: Example) -> dict[str, Any]:
    return {**{name: values[index] for name, values in encoded.items()}, "labels": example.label}


def _fine_tune(
    network: Any,
    tokenizer: Any,
    data: TaskData,
    rows: Mapping[str, list[dict[str, Any]]],
    params: GlueParams,
    seed: int,
) -> SeedResult:
    """Train until the score of the first validation split no longer rises; return its best epoch."""
    best = BestEpoch(tuple(data.validation), params.patience)
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer asks for a directory; nothing is saved into it
        trainer = Trainer(
            model=network,
            args=_arguments(params, seed, scratch),
            train_dataset=rows["train"],
            eval_dataset={split: rows[split] for split in data.validation},
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda prediction: scores(data, prediction),
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = (
            False  # a row weighs alike in every batch, whatever the model's forward takes
        )
        trainer.train()
    epoch = best.epoch
    return SeedResult(seed=seed, epoch=epoch, figures=dict(best.figures[epoch]))


def _arguments(params: GlueParams, seed: int, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.batch_size,
        per_device_eval_batch_size=2 * params.batch_size,
        learning_rate=params.lr,
        weight_decay=params.weight_decay,
        warmup_steps=params.warmup,  # below 1: a share of the steps
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=has_bf16(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )


def scores(data: TaskData, prediction: EvalPrediction) -> dict[str, float]:
    """The task's metrics of raw outputs, and their mean as the score."""
    outputs, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    predicted = outputs.reshape(-1) if data.task.regression else outputs.argmax(-1)
    found = {name: METRICS[name](predicted, labels) for name in data.task.metrics}
    return {**found, SCORE: statistics.fmean(found.values())}


class BestEpoch(TrainerCallback):
    """Keeps every epoch's figures and ends the training when the score has not risen for a while."""

    def __init__(self, splits: Sequence[str], patience: int) -> None:
        self.splits = splits  # the first one is judged by
        self.patience = patience
        self.figures: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)  # epoch -> split -> metric -> value

    @property
    def epoch(self) -> int:
        """The first of the epochs with the highest score."""
        return max(self.figures, key=lambda epoch: (self.figures[epoch][self.splits[0]][SCORE], -epoch))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **others: Any,
    ) -> None:
        """Take the figures of one split."""
        epoch = round(state.epoch or 0)
        split = next(name for name in self.splits if f"eval_{name}_{SCORE}" in metrics)
        found = {name: metrics.get(f"eval_{split}_{name}") for name in (*METRICS, SCORE)}
        self.figures[epoch][split] = {name: float(value) for name, value in found.items() if value is not None}
        if split == self.splits[0] and epoch - self.epoch >= self.patience:
            control.should_training_stop = True


def _first(figures: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    return next(iter(figures.values()))
