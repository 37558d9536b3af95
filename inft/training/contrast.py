"""The contrastive side of a run (CRAFT): its pairs, and what they add to the plan."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from craft.schedule import EpochPlan, plan_epoch
from inft.data.pairs import LoadedPairs, load_pairs
from inft.models.collate import where
from inft.models.pairs import PairCollator
from inft.models.spec import ModelSpec
from inft.sample import Sample
from inft.training.rows import PairRows
from params import TrainParams, UserError


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The pairs of a run, ready for a trainer, and what was left out."""

    rows: PairRows
    loaded: LoadedPairs
    too_long: int  # pairs dropped for the length of a side


@dataclass(frozen=True, kw_only=True)
class ContrastFigures:
    """The contrastive term in figures."""

    pairs: int | None  # None: each row's prompt is contrasted with its own answer
    rows: int  # anchors a device sees per micro-batch
    n_sft: tuple[int, int]  # fewest and most micro-batches of fine-tuning in an optimizer step
    n_con: tuple[int, int]  # of contrast; in self-alignment each micro-batch is both
    alpha: float  # share of the fine-tuning gradient in the sum, whatever n_sft and n_con
    joint: bool  # whether each micro-batch has both losses, as in all methods but sft
    negatives: int  # at most, per anchor, from the batches of all processes
    queued: int  # and at most from earlier batches, each row or pair once
    left_out: tuple[int, int]  # fine-tuning and contrastive micro-batches of an epoch that find no step


def read_contrast(
    params: TrainParams,
    samples: Sequence[Sample],
    *,
    spec: ModelSpec,
    processor: Any,
    collator: Any,
    quarantine_file: Path | None,
) -> Contrast | None:
    """The pairs of a run that trains on ``samples``; None without CRAFT and in self-alignment.

    With over_length="drop" pairs above max_length are left out. Errors: UserError for pairs that cannot be read or
    made, and for too long ones otherwise, since a pair has no news text to shorten.
    """
    craft = params.craft
    if not (craft.enabled and craft.pairs):
        return None
    loaded = load_pairs(
        craft.pairs, params.data, samples, with_images=spec.takes_images, quarantine_file=quarantine_file
    )
    pair_collator = PairCollator(collator)
    long = _too_long(loaded, params, pair_collator, most_image_tokens=spec.most_image_tokens(processor))
    kept = [pair for number, pair in enumerate(loaded.pairs) if number not in long]
    if long and (params.sft.over_length != "drop" or not kept):
        names = ", ".join(f"{where(loaded.pairs[number].anchor)} ({length} tokens)" for number, length in long.items())
        raise UserError(
            f"{len(long):,} pair{'s' if len(long) > 1 else ''} ({names[:300]}) would have more than basic.max_length="
            f"{params.basic.max_length:,} tokens on a side. Raise basic.max_length, or leave such pairs out with --set "
            "sft.over_length=drop."
        )
    return Contrast(rows=PairRows(kept, pair_collator), loaded=replace(loaded, pairs=kept), too_long=len(long))


def _too_long(
    loaded: LoadedPairs, params: TrainParams, collator: PairCollator, *, most_image_tokens: int
) -> Mapping[int, int]:
    """Number -> tokens of the pairs above max_length."""
    room = params.basic.max_length - collator.collator.template_bytes() - most_image_tokens
    # A token has a byte at least: most pairs need no tokenizer to be known to fit.
    doubtful = [
        number
        for number, pair in enumerate(loaded.pairs)
        if any(len((side.prompt.text + side.answer).encode()) > room for side in (pair.anchor, pair.positive))
    ]
    lengths = collator.lengths([loaded.pairs[number] for number in doubtful])
    found = zip(doubtful, lengths, strict=True)
    return {number: length for number, length in found if length > params.basic.max_length}


def contrastive_batch_size(params: TrainParams) -> int:
    """Anchors that a device sees per contrastive micro-batch."""
    own = params.craft.contrastive_batch_size if params.craft.pairs else None
    return own or params.sft.per_device_train_batch_size


def plan_windows(params: TrainParams, *, rows: int, pairs: int, processes: int = 1) -> EpochPlan:
    """The optimizer steps of an epoch over ``rows`` and ``pairs``, as each process makes them.

    Errors: UserError for numbers that craft.length_strategy refuses.
    """
    craft = params.craft
    sft_batches, contrastive_batches = _batches(params, rows=rows, pairs=pairs, processes=processes)
    try:
        return plan_epoch(
            sft_batches=sft_batches,
            contrastive_batches=contrastive_batches,
            beta=craft.beta,
            gradient_accumulation_steps=params.sft.gradient_accumulation_steps,
            beta_mode=craft.beta_mode,
            length_strategy=craft.length_strategy,
        )
    except ValueError as error:
        raise UserError(str(error).replace("craft_", "craft.")) from error


def _batches(params: TrainParams, *, rows: int, pairs: int, processes: int) -> tuple[int, int]:
    """Micro-batches of one pass over the rows and of one over the pairs, as each process makes them."""
    sizes = params.sft.per_device_train_batch_size, contrastive_batch_size(params)
    sft, contrastive = (ceil(count / (size * processes)) for count, size in zip((rows, pairs), sizes, strict=True))
    return sft, contrastive


@contextmanager
def shortage_told_once() -> Iterator[None]:
    """Silence the schedule's warning of batches left out, which comes with each plan; shortage() words it for users."""
    logger = logging.getLogger("craft.schedule")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def queue_size(params: TrainParams, anchors: int) -> int:
    """Embeddings in the queue of a run with so many pairs, or rows without pairs: each of them once at most."""
    return min(params.craft.negative_queue_size, anchors)


def contrast_figures(
    params: TrainParams, *, rows: int, pairs: int | None = None, plan: EpochPlan | None = None, processes: int = 1
) -> ContrastFigures | None:
    """The figures of a run over ``rows`` and, when it has any, ``pairs``; None without CRAFT.

    ``plan`` says how batches of pairs come between those of the rows; without one they stand beside them.
    """
    craft = params.craft
    if not craft.enabled:
        return None
    accumulated = params.sft.gradient_accumulation_steps
    windows: Sequence[tuple[int, int]] = [(accumulated, accumulated)]
    left_out = (0, 0)
    if pairs is not None and plan is not None:
        # The last step may be a short one.
        windows = [window for window in plan.windows if sum(window) == accumulated] or plan.windows
        if craft.length_strategy == "auto_beta":  # it means to take all; cap is asked to leave some out
            sft_batches, contrastive_batches = _batches(params, rows=rows, pairs=pairs, processes=processes)
            left_out = sft_batches - plan.sft_batches, contrastive_batches - plan.contrastive_batches
    sft, con = zip(*windows, strict=True)
    size, anchors = contrastive_batch_size(params), rows if pairs is None else pairs
    negatives = min(size * processes, anchors) - 1
    if params.method == "grpo" and pairs is None:  # answers to one prompt are no negatives of each other
        answers = params.sft.per_device_train_batch_size * accumulated * processes
        negatives = min(size * processes - 1, answers - params.rl.num_generations)
    return ContrastFigures(
        pairs=pairs,
        rows=size,
        n_sft=(min(sft), max(sft)),
        n_con=(min(con), max(con)),
        alpha=craft.alpha,
        joint=params.method != "sft",
        negatives=negatives,
        queued=queue_size(params, anchors) if craft.negative_strategy == "queue" else 0,
        left_out=left_out,
    )


def contrast_lines(params: TrainParams, figures: ContrastFigures) -> list[tuple[str, str]]:
    """The figures in words: (what, how much)."""
    craft = params.craft
    own = params.method.upper() if figures.joint else "fine-tuning"
    balanced = f", weighed further by {craft.gradient_balancing}" if craft.gradient_balancing != "none" else ""
    queue = f" in the batch and up to {figures.queued:,} in the queue" if figures.queued else ""
    return [
        ("contrast (CRAFT)", _source(params, figures)),
        ("kinds", _kinds(params, figures)),
        ("effective alpha", f"{figures.alpha:g} {own} to {1 - figures.alpha:g} contrast{balanced}"),
        ("negatives", f"up to {figures.negatives:,} per anchor{queue}"),
    ]


def _source(params: TrainParams, figures: ContrastFigures) -> str:
    """What is contrasted with what."""
    craft = params.craft
    if figures.pairs is None:
        answer = {"sft": "answer", "dpo": "chosen answer", "orpo": "chosen answer"}.get(
            params.method, "generated answer"
        )
        return f"self-alignment: each row's prompt finds its own {answer} among those of the others"
    words = f"{figures.pairs:,} pairs ({craft.pairs}), {figures.rows:,}"
    if figures.joint:
        return f"{words} beside each micro-batch of {params.method.upper()}, repeated as needed"
    return f"{words} a micro-batch, {craft.length_strategy}"


def _kinds(params: TrainParams, figures: ContrastFigures) -> str:
    """The micro-batches of a step and what each is for."""
    if figures.joint:
        count = figures.n_sft[0]
        return f"{count} micro-batch{'es' if count > 1 else ''} a step, {'each ' if count > 1 else ''}with both losses"
    kinds = f"n_sft {_range(figures.n_sft)}, n_con {_range(figures.n_con)} micro-batches a step"
    return f"{kinds}, the same ones" if figures.pairs is None else kinds


def shortage(params: TrainParams, figures: ContrastFigures) -> str | None:
    """What auto_beta leaves out because the other kind is too rare to be in every step; None when it takes all."""
    sft, contrastive = figures.left_out
    if not sft and not contrastive:
        return None
    left, rare = (f"{sft:,} fine-tuning", "pairs") if sft else (f"{contrastive:,} contrastive", "rows")
    return (
        f"{left} batches of each epoch are left out: there are too few batches of {rare} for every step. Use --set "
        "craft.length_strategy=oversample, which takes every row once an epoch and repeats pairs as needed, or more "
        f"than sft.gradient_accumulation_steps={params.sft.gradient_accumulation_steps}."
    )


def _range(ends: tuple[int, int]) -> str:
    low, high = ends
    return f"{low}" if low == high else f"{low} to {high}"
