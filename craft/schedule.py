"""Which kind of batch comes when: the optimizer steps of one epoch, planned before it begins."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal, get_args

from craft.accumulator import compute_batch_distribution
from craft.fields import did_you_mean
from params.craft import BetaMode, LengthStrategy

logger = logging.getLogger(__name__)

Kind = Literal["sft", "craft"]
Windows = list[tuple[int, int]]
BETA_MODES: tuple[str, ...] = get_args(BetaMode)
LENGTH_STRATEGIES: tuple[str, ...] = get_args(LengthStrategy)


@dataclass(frozen=True)
class EpochPlan:
    """(SFT, contrastive) micro-batches of each optimizer step of an epoch; only the last step may have fewer."""

    windows: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.windows)

    @property
    def sft_batches(self) -> int:
        """SFT micro-batches."""
        return sum(sft for sft, _ in self.windows)

    @property
    def contrastive_batches(self) -> int:
        """Contrastive micro-batches."""
        return sum(contrastive for _, contrastive in self.windows)

    @property
    def sft_share(self) -> float:
        """Share of the steps that hold SFT micro-batches."""
        return sum(sft > 0 for sft, _ in self.windows) / self.steps

    @property
    def contrastive_share(self) -> float:
        """Share of the steps that hold contrastive micro-batches."""
        return sum(contrastive > 0 for _, contrastive in self.windows) / self.steps

    def __len__(self) -> int:
        return self.sft_batches + self.contrastive_batches

    def kinds(self) -> Iterator[Kind]:
        """Yield the kind of each micro-batch: within a step first the SFT ones."""
        for sft, contrastive in self.windows:
            for _ in range(sft):
                yield "sft"
            for _ in range(contrastive):
                yield "craft"


@dataclass(frozen=True)
class _Request:
    """What is there and what is wanted: batches of both kinds, micro-batches a step, share of SFT ones."""

    sft: int
    contrastive: int
    window: int
    beta: float

    @property
    def exact_beta(self) -> Fraction:
        """The beta that was meant: 0.6 is 3/5, not the nearest double."""
        return Fraction(self.beta).limit_denominator(10_000_000)

    @property
    def pattern(self) -> tuple[int, int]:
        """(SFT, contrastive) micro-batches of a full step."""
        return compute_batch_distribution(self.beta, self.window)


def plan_epoch(
    *,
    sft_batches: int,
    contrastive_batches: int,
    beta: float,
    gradient_accumulation_steps: int,
    beta_mode: str = "fixed",
    length_strategy: str = "oversample",
) -> EpochPlan:
    """Plan one epoch from the numbers of batches of one pass over either data set, on one rank.

    `oversample` passes once over the SFT batches and takes as many contrastive ones as its steps need, from a stream
    that begins anew whenever it ends and goes on over epochs. `cap` stops where either kind ends. `auto_beta` takes
    all of both, spread evenly. `error` refuses different numbers, and is otherwise as `oversample`.
    `beta_mode="auto"` takes beta from the numbers. With one micro-batch a step, the kinds alternate between steps in
    proportion beta.
    Errors: ValueError for an empty data set, a beta that leaves a kind out, and different numbers under `error`.
    """
    for word, allowed in ((beta_mode, BETA_MODES), (length_strategy, LENGTH_STRATEGIES)):
        if word not in allowed:
            raise ValueError(f"{word!r} must be one of {', '.join(allowed)}{did_you_mean(word, allowed)}.")
    found = _Request(sft_batches, contrastive_batches, gradient_accumulation_steps, beta)
    _check(found, by_counts=beta_mode == "auto" or length_strategy == "auto_beta")
    if length_strategy == "error" and sft_batches != contrastive_batches:
        raise ValueError(
            f"craft_length_strategy='error': there are {sft_batches} SFT batches and {contrastive_batches} contrastive "
            "ones. Make the data sets (or batch sizes) match, or use 'oversample', 'cap' or 'auto_beta'."
        )
    if beta_mode == "auto":
        found = replace(found, beta=sft_batches / (sft_batches + contrastive_batches))
    if length_strategy == "auto_beta":
        windows = _spread_all(found)
    elif gradient_accumulation_steps == 1:
        windows = _alternate(*_counts_of_single_steps(found, capped=length_strategy == "cap"))
    elif length_strategy == "cap":
        windows = _capped(found)
    else:
        windows = _one_pass(found)
    return EpochPlan(tuple(windows))


def _check(found: _Request, *, by_counts: bool) -> None:
    for count, name in ((found.sft, "SFT"), (found.contrastive, "contrastive")):
        if count < 1:
            raise ValueError(
                f"the {name} data set gives no batch. Give it rows, lower its batch size if the last batch is dropped, "
                "or set craft_alpha=1 to train without contrastive batches."
            )
    if found.window < 1:
        raise ValueError(f"gradient_accumulation_steps={found.window} must be at least 1.")
    if not by_counts and not 0 < found.beta < 1:
        raise ValueError(
            f"craft_beta={found.beta!r} leaves no micro-batch for one of the two data sets. Use a value between 0 and "
            "1; craft_alpha=1 trains without contrastive batches."
        )


def _one_pass(found: _Request) -> Windows:
    """Every SFT batch once; the contrastive ones of a short last step keep the proportion."""
    sft, contrastive = found.pattern
    full, rest = divmod(found.sft, sft)
    windows = [(sft, contrastive)] * full
    if rest:
        windows.append((rest, max(1, round(rest * contrastive / sft))))
    return windows


def _capped(found: _Request) -> Windows:
    sft, contrastive = found.pattern
    full = min(found.sft // sft, found.contrastive // contrastive)
    windows = [(sft, contrastive)] * full
    left = min(found.sft - full * sft, sft), min(found.contrastive - full * contrastive, contrastive)
    if min(left) > 0:
        windows.append(left)
    return windows


def _counts_of_single_steps(found: _Request, *, capped: bool) -> tuple[int, int]:
    """How many steps of either kind an epoch has when a step is one micro-batch."""
    beta = found.exact_beta
    steps = math.floor(found.sft / beta)
    if not capped:
        return found.sft, max(1, steps - found.sft)
    steps = min(steps, math.ceil((found.contrastive + 1) / (1 - beta)) - 1)
    sft = min(found.sft, math.ceil(steps * beta))
    return sft, min(found.contrastive, max(1, steps - sft))


def _alternate(sft: int, contrastive: int) -> Windows:
    """Steps of one micro-batch, the kinds spread evenly (Bresenham's line), an SFT one first."""
    steps = sft + contrastive
    return [(1, 0) if _share(sft, k + 1, steps) > _share(sft, k, steps) else (0, 1) for k in range(steps)]


def _share(total: int, part: int, whole: int) -> int:
    """total * part / whole, rounded up."""
    return -(-total * part // whole)


def _spread_all(found: _Request) -> Windows:
    """All batches of both kinds, each full step holding both; steps that cannot are left out with a warning."""
    sft, contrastive, window = found.sft, found.contrastive, found.window
    if window == 1:
        return _alternate(sft, contrastive)
    steps = -(-(sft + contrastive) // window)
    if min(sft, contrastive) < steps:
        return _scarce(found)
    last = sft + contrastive - (steps - 1) * window
    # Either kind must keep one batch for each of the other steps.
    low, high = max(min(1, last - 1), last - (sft - steps + 1)), min(last - 1, contrastive - steps + 1)
    last_contrastive = min(max(round(last * contrastive / (sft + contrastive)), low), high)
    rest = contrastive - last_contrastive
    cuts = [_share(rest, k, steps - 1) if steps > 1 else 0 for k in range(steps)]
    full = [(window - (b - a), b - a) for a, b in pairwise(cuts)]
    return [*full, (last - last_contrastive, last_contrastive)]


def _scarce(found: _Request) -> Windows:
    """As many steps as the rarer kind has batches, one in each."""
    steps, many = min(found.sft, found.contrastive), found.window - 1
    rare_is_sft = found.sft < found.contrastive
    name, count = ("contrastive", found.contrastive) if rare_is_sft else ("SFT", found.sft)
    logger.warning(
        "craft_length_strategy='auto_beta': there are %d SFT batches and %d contrastive ones, too few of one kind for "
        "every step of %d micro-batches; %d %s batches of each epoch are left out. Use "
        "craft_length_strategy='oversample' to repeat the rarer kind, or more gradient_accumulation_steps.",
        found.sft,
        found.contrastive,
        found.window,
        count - steps * many,
        name,
    )
    return [(1, many) if rare_is_sft else (many, 1)] * steps
