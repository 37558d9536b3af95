"""What a run is going to do, in figures: rows, adapters, tokens, steps and where things will be written."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from craft.schedule import EpochPlan
from inft.data.batches import Loaded
from inft.models.spec import ModelSpec
from inft.sample import Sample
from inft.training.adapters import Coverage, coverage
from inft.training.best import criterion_of
from inft.training.contrast import (
    Contrast,
    ContrastFigures,
    contrast_figures,
    contrast_lines,
    plan_windows,
    shortage,
)
from inft.training.processes import process_count
from inft.training.resume import PARAMS_FILE, QUARANTINE_FILE
from inft.training.rows import prompt_collator
from params import TrainParams
from params.methods import RL_METHODS
from params.presets import lora_targets

if TYPE_CHECKING:
    from inft.training.methods.method import Method

SAMPLED_ROWS = 32  # rows whose tokens are counted, spread evenly over the training rows
LONGEST_ROWS = 4  # rows with the longest texts, counted besides for the longest of all


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Tokens of some training rows, image tokens included."""

    rows: int
    mean: float  # per row
    longest: int
    supervised_share: float  # 0 to 1


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimizer steps of a run."""

    per_epoch: int
    total: int
    warmup: int
    effective_batch: int  # rows per optimizer step, of all processes
    accumulated: int = 1  # micro-batches of rows in such a step, of one process
    processes: int = 1
    unit: str = "rows"  # what the effective batch counts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the plan shows."""

    rows: Mapping[str, tuple[int, int]]  # language -> rows to train on, rows held out
    left_out: Mapping[str, int]  # why -> rows
    coverage: Sequence[Coverage]
    trainable: int  # parameters
    total: int  # parameters, a 4-bit weight counted as one
    tokens: TokenFigures
    steps: Steps
    evaluation: Mapping[str, str]  # what -> what is done with the held-out rows, in words
    places: Mapping[str, str]  # what -> where it will be written
    method: Mapping[str, str] = field(default_factory=dict)  # what -> how much, of the method
    contrast: ContrastFigures | None = None  # of CRAFT


def count_steps(params: TrainParams, rows: int, *, windows: EpochPlan | None = None, processes: int = 1) -> Steps:
    """Steps as transformers counts them: a last, smaller batch or accumulation is a step too.

    ``processes`` take the batches in turn, each as many: the last of them may see rows of the beginning again. With
    pairs (of CRAFT) their micro-batches stand beside those of the rows, as planned in ``windows``.
    """
    sft, accumulated = params.sft, params.sft.gradient_accumulation_steps
    if windows is not None:
        per_epoch, accumulated = windows.steps, max(n_sft for n_sft, _ in windows.windows)
    else:
        batches = ceil(ceil(rows / sft.per_device_train_batch_size) / processes)
        per_epoch = max(ceil(batches / accumulated), 1)
    return steps_of(params, per_epoch, accumulated=accumulated, processes=processes)


def steps_of(params: TrainParams, per_epoch: int, *, accumulated: int | None = None, processes: int = 1) -> Steps:
    """The steps of a run that makes so many an epoch; ``accumulated`` micro-batches of rows in each."""
    sft = params.sft
    accumulated = sft.gradient_accumulation_steps if accumulated is None else accumulated
    total = sft.max_steps if sft.max_steps is not None else ceil(sft.num_epochs * per_epoch)
    return Steps(
        per_epoch=per_epoch,
        total=total,
        warmup=ceil(sft.warmup_ratio * total),  # as transformers rounds a ratio
        accumulated=accumulated,
        effective_batch=sft.per_device_train_batch_size * accumulated * processes,
        processes=processes,
    )


def longest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The samples with the longest texts, the longest first; it takes no tokenizer."""

    def letters(sample: Sample) -> int:
        return len(sample.prompt.text) + max(len(sample.answer), len(sample.rejected or ""))

    return heapq.nlargest(count, samples, key=letters)


def count_tokens(
    samples: Sequence[Sample],
    collator: Any,
    sides: "Callable[[Sample], Sequence[Sample]] | None" = None,
    *,
    prompts_alone: bool = False,
) -> TokenFigures:
    """Collate SAMPLED_ROWS of the samples and the LONGEST_ROWS, one by one, and count; of each all its sides.

    With ``prompts_alone`` there are no answers, and nothing is supervised.
    """
    stride = max(len(samples) // SAMPLED_ROWS, 1)
    lengths, supervised = [], 0

    def batches(sample: Sample) -> list[Any]:
        if prompts_alone:
            return [collator.prompts([sample])]
        return [collator([side]) for side in (sides(sample) if sides else (sample,))]

    for sample in samples[::stride][:SAMPLED_ROWS]:
        for batch in batches(sample):
            lengths.append(int(batch["attention_mask"].sum()))
            supervised += 0 if prompts_alone else int((batch["labels"] != -100).sum())
    extremes = [int(batch["attention_mask"].sum()) for row in longest(samples, LONGEST_ROWS) for batch in batches(row)]
    return TokenFigures(
        rows=len(lengths),
        mean=sum(lengths) / len(lengths),
        longest=max(lengths + extremes),
        supervised_share=supervised / sum(lengths),
    )


def make_plan(
    params: TrainParams,
    loaded: Loaded,
    too_long: int,
    *,
    model: PeftModel,
    spec: ModelSpec,
    collator: Any,
    method: "Method",
    contrast: Contrast | None = None,
) -> Plan:
    """Gather the figures; ``too_long`` counts the rows dropped for their length, ``contrast`` are the pairs, if any."""
    rows, pairs, processes = len(loaded.train), len(contrast.rows) if contrast else None, process_count()
    windows = None
    if pairs is not None and method.mixes_batches:
        windows = plan_windows(params, rows=rows, pairs=pairs, processes=processes)
    trainable, total = model.get_nb_trainable_parameters()
    targets = lora_targets(params.model, params.training_mode, params.lora)
    return Plan(
        rows=loaded.rows_per_language,
        left_out={
            "without a caption": loaded.dropped_empty,
            "unusable, in quarantine": loaded.quarantined,
            f"longer than {params.basic.max_length:,} tokens": too_long,
            f"in other languages ({', '.join(loaded.other_languages)})": sum(loaded.other_languages.values()),
            "unusable pairs, in quarantine": len(contrast.loaded.bad) if contrast else 0,
            f"pairs longer than {params.basic.max_length:,} tokens": contrast.too_long if contrast else 0,
        },
        coverage=coverage(model, spec, targets),
        trainable=trainable,
        total=total,
        tokens=_tokens(params, loaded.train, collator, method),
        steps=method.steps(params, rows, windows=windows, processes=processes),
        method={"method": method.title, **method.words(params)},
        evaluation=evaluation_words(params, heldout=len(loaded.heldout)),
        contrast=contrast_figures(params, rows=rows, pairs=pairs, plan=windows, processes=processes),
        places={
            "checkpoints": f"{params.output_dir}/checkpoint-N",
            "parameters": f"{params.output_dir}/{PARAMS_FILE}",
            "bad rows": f"{params.output_dir}/{QUARANTINE_FILE}",
            "best adapter": params.best_model_dir,
            "log": str(log_file(params)),
        },
    )


def _tokens(params: TrainParams, samples: Sequence[Sample], collator: Any, method: "Method") -> TokenFigures:
    """The tokens of what the model reads of the rows: with rewards the prompts."""
    if params.method in RL_METHODS:
        return count_tokens(samples, prompt_collator(collator, params), prompts_alone=True)
    return count_tokens(samples, collator, method.sides)


def evaluation_words(params: TrainParams, *, heldout: int) -> dict[str, str]:
    """What the held-out rows are for: what chooses the best adapter, and how many of them are captioned."""
    sft, by = params.sft, criterion_of(params.sft, params.method)
    nothing = None
    if not sft.load_best_model_at_end:
        nothing = "sft.load_best_model_at_end is off"
    elif not heldout:
        nothing = "no rows are held out"
    chosen = f"{by.best} {by.title}" if nothing is None else f"nothing, since {nothing}: the last step is stored"
    words = {"best adapter by": chosen}
    if sft.eval_captions:
        words["captions"] = (
            f"{min(sft.eval_captions, heldout):,} of {heldout:,} held-out rows at each evaluation, of "
            f"{params.basic.gen_max_new_tokens:,} tokens at most"
        )
    return words


def log_file(params: TrainParams) -> Path:
    """Where the events of a run are written."""
    return Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl"


def show_plan(console: Console, params: TrainParams, plan: Plan) -> None:
    """Print the plan."""
    for table in (_rows_table(plan), _coverage_table(plan), _figures_table(params, plan)):
        console.print(table)
    if plan.contrast is not None and (words := shortage(params, plan.contrast)):
        console.print(words, style="yellow", highlight=False, markup=False, soft_wrap=True)


def show_parameters(console: Console, text: str) -> None:
    """Print the resolved parameters as they are saved."""
    console.print("resolved parameters", style="bold")
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _rows_table(plan: Plan) -> Table:
    table = Table(title="rows")
    table.add_column("language", overflow="fold")
    table.add_column("to train on", justify="right")
    table.add_column("held out", justify="right")
    for language, (train, heldout) in plan.rows.items():
        table.add_row(language, f"{train:,}", f"{heldout:,}")
    if len(plan.rows) > 1:
        table.add_section()
        totals = [sum(counts) for counts in zip(*plan.rows.values(), strict=True)]
        table.add_row("all", *(f"{total:,}" for total in totals))
    left_out = [f"{count:,} {why}" for why, count in plan.left_out.items() if count]
    if left_out:
        table.caption = f"left out: {'; '.join(left_out)}"
    return table


def _coverage_table(plan: Plan) -> Table:
    table = Table(title="adapted linear layers")
    table.add_column("part", overflow="fold")
    for heading in ("adapted", "of", "trained parameters"):
        table.add_column(heading, justify="right")
    for part in plan.coverage:
        table.add_row(part.part, f"{part.adapted:,}", f"{part.total:,}", f"{part.trainable_parameters:,}")
    share = plan.trainable / plan.total
    table.caption = f"{plan.trainable:,} of {plan.total:,} parameters are trained ({share:.2%})"
    return table


def _figures_table(params: TrainParams, plan: Plan) -> Table:
    sft, tokens, steps = params.sft, plan.tokens, plan.steps
    table = Table(title="training", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # paths
    for what, words in plan.method.items():
        table.add_row(what, words)
    table.add_row(
        "batch",
        f"{steps.effective_batch:,} {steps.unit} a step ({sft.per_device_train_batch_size} × "
        f"{steps.accumulated} accumulated{f' × {steps.processes} processes' * (steps.processes > 1)})",
    )
    table.add_row("steps", f"{steps.total:,} in all, {steps.per_epoch:,} an epoch, {steps.warmup:,} of warm-up")
    learnt = "without the answer" if params.method in RL_METHODS else f"{tokens.supervised_share:.0%} supervised"
    table.add_row(
        "tokens",
        f"{tokens.mean:,.0f} a row ({tokens.rows} rows counted), {tokens.longest:,} in the longest, {learnt}",
    )
    for what, words in contrast_lines(params, plan.contrast) if plan.contrast else ():
        table.add_row(what, words)
    for what, words in {**plan.evaluation, **plan.places}.items():
        table.add_row(what, words)
    return table
