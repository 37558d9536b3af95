"""CRAFTMixedDataLoader: the batches of two loaders in the order of an EpochPlan."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch.utils.data import IterableDataset

from craft.accumulator import compute_batch_distribution
from craft.sampler import mixed_seed
from craft.schedule import EpochPlan, Kind, plan_epoch

BATCH_TYPE = "craft_batch_type"  # key of every mixed batch: "sft" or "craft"
_SFT, _CONTRASTIVE = 0, 1  # parts of the seeds


class CRAFTMixedDataLoader:
    """Mixes the batches of two loaders; each is tagged ``craft_batch_type``: "sft" or "craft".

    beta .75 with 4 accumulation steps yields sft, sft, sft, craft. Lengths are the loaders' own or the totals given;
    where one is unknown `plan` is None and the pattern runs until the SFT loader ends. The contrastive loader begins
    anew when it ends and goes on over epochs; a `cap` of unknown lengths stops there. With a `seed`, loaders that draw
    their order from torch's global random state (``shuffle=True`` without a generator of their own) give the same
    order in every run and leave that state untouched. `set_epoch` chooses the epoch; without it each iteration is the
    next one. accelerate's skip_first_batches takes it: `dataset` is the stream of batches.

    Errors: ValueError of plan_epoch; ValueError where lengths are needed and unknown, for a loader that yields no
    batch, fewer than announced, or something else than mappings.
    """

    # What accelerate's skip_first_batches asks of a loader: its dataset yields whole batches.
    batch_size: int | None = None
    sampler: Any = None
    drop_last = False
    num_workers = 0
    prefetch_factor: int | None = None

    def __init__(
        self,
        sft_loader: Iterable[Any],
        contrastive_loader: Iterable[Any] | None = None,
        *,
        beta: float = 0.6,
        gradient_accumulation_steps: int = 1,
        beta_mode: str = "fixed",
        length_strategy: str = "oversample",
        total_sft_batches: int | None = None,
        total_craft_batches: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.sft_loader, self.contrastive_loader = sft_loader, contrastive_loader
        self.beta, self.gradient_accumulation_steps = beta, gradient_accumulation_steps
        self.beta_mode, self.length_strategy, self.seed = beta_mode, length_strategy, seed
        self.total_sft_batches = _length(sft_loader) if total_sft_batches is None else total_sft_batches
        self.total_craft_batches = _length(contrastive_loader) if total_craft_batches is None else total_craft_batches
        self.dataset = _BatchStream(self)
        self._epoch = 0
        self._stream: Iterator[Any] = iter(())
        self._position = -1  # contrastive batches taken from the stream since the first epoch began
        self._round = 0  # times the contrastive loader was begun anew
        self.plan: EpochPlan | None = self._planned()

    @property
    def sft_share(self) -> float:
        """Share of the optimizer steps that hold SFT batches."""
        if self.plan is not None:
            return self.plan.sft_share
        alone = self.gradient_accumulation_steps == 1 and self.contrastive_loader is not None
        return self.beta if alone else 1.0

    @property
    def contrastive_share(self) -> float:
        """Share of the optimizer steps that hold contrastive batches."""
        if self.plan is not None:
            return self.plan.contrastive_share
        if self.contrastive_loader is None:
            return 0.0
        return 1 - self.beta if self.gradient_accumulation_steps == 1 else 1.0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._epoch = epoch

    def __len__(self) -> int:
        if self.plan is None:
            raise TypeError("the loaders do not tell their lengths: give total_sft_batches and total_craft_batches.")
        return len(self.plan)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self._epoch
        sft = opened(self.sft_loader, epoch=epoch, seed=self._seed_of(_SFT, epoch))
        self._find_place(epoch)
        taken = 0
        for kind in self._kinds():
            batch = next(sft, None) if kind == "sft" else self._next_contrastive()
            if batch is None:
                if self.plan is not None:
                    raise ValueError(
                        f"the SFT loader ended after {taken} batches; {self.plan.sft_batches} were planned."
                    )
                break
            taken += kind == "sft"
            yield _tagged(batch, kind)
        if self._epoch == epoch:
            self._epoch += 1

    def _planned(self) -> EpochPlan | None:
        sft, contrastive = self.total_sft_batches, self.total_craft_batches
        if self.contrastive_loader is None:
            return None if sft is None else _sft_alone(sft, self.gradient_accumulation_steps)
        if sft is not None and contrastive is not None:
            return plan_epoch(
                sft_batches=sft,
                contrastive_batches=contrastive,
                beta=self.beta,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
                beta_mode=self.beta_mode,
                length_strategy=self.length_strategy,
            )
        if self.beta_mode == "auto" or self.length_strategy in ("auto_beta", "error"):
            raise ValueError(
                f"craft_beta_mode={self.beta_mode!r} with craft_length_strategy={self.length_strategy!r} needs the "
                "numbers of batches, which the loaders do not tell. Give total_sft_batches and total_craft_batches, or "
                "use 'fixed' with 'oversample' or 'cap'."
            )
        return None

    def _kinds(self) -> Iterator[Kind]:
        if self.plan is not None:
            return self.plan.kinds()
        if self.contrastive_loader is None:
            return itertools.repeat("sft")
        return _endless(self.beta, self.gradient_accumulation_steps)

    def _find_place(self, epoch: int) -> None:
        """Bring the contrastive stream to where this epoch begins, by reading on only where it is elsewhere."""
        if self.contrastive_loader is None:
            return
        if self.plan is None or not self.total_craft_batches:
            self._begin_round(epoch)
            return
        place = epoch * self.plan.contrastive_batches
        if place != self._position:
            round_, skipped = divmod(place, self.total_craft_batches)
            self._begin_round(round_)
            next(itertools.islice(self._stream, skipped, skipped), None)
            self._position = place

    def _begin_round(self, round_: int) -> None:
        assert self.contrastive_loader is not None
        self._round = round_
        self._stream = opened(self.contrastive_loader, epoch=round_, seed=self._seed_of(_CONTRASTIVE, round_))

    def _next_contrastive(self) -> Any:
        """The next batch of the stream; None where a cap of unknown lengths ends the epoch."""
        self._position += 1
        batch = next(self._stream, None)
        if batch is None and not (self.plan is None and self.length_strategy == "cap"):
            self._begin_round(self._round + 1)
            batch = next(self._stream, None)
            if batch is None:
                raise ValueError("the contrastive loader yields no batch. Give it rows, or a drop_last of False.")
        return batch

    def _seed_of(self, kind: int, number: int) -> int | None:
        return None if self.seed is None else mixed_seed(self.seed, kind, number)


class _BatchStream(IterableDataset[dict[str, Any]]):
    """The mixed batches as a data set, for what wraps a loader's data set in a loader of its own."""

    def __init__(self, loader: CRAFTMixedDataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)


def opened(loader: Iterable[Any], *, epoch: int, seed: int | None) -> Iterator[Any]:
    """Iterate over a loader; what it draws from torch's global state up to its first batch comes from `seed`.

    That is where DataLoader draws: the seed of its workers when it is opened, RandomSampler's at the first batch.
    """
    parts: tuple[Any, ...] = (loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None))
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    if seed is None:
        yield from loader
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        batches = iter(loader)
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def _tagged(batch: Any, kind: Kind) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a custom loader yields {type(batch).__name__}: a mapping of names to tensors is needed. Give the "
            "DataLoader a collate_fn that returns one, such as CRAFTCollator()."
        )
    return {**batch, BATCH_TYPE: kind}


def _length(loader: Any) -> int | None:
    """The number of batches; None where a loader does not tell."""
    try:
        return len(loader)
    except TypeError:
        return None


def _sft_alone(batches: int, window: int) -> EpochPlan:
    full, rest = divmod(batches, window)
    return EpochPlan(tuple([(window, 0)] * full + [(rest, 0)] * (rest > 0)))


def _endless(beta: float, window: int) -> Iterator[Kind]:
    """The pattern of plan_epoch without an end."""
    if window > 1:
        sft, contrastive = compute_batch_distribution(beta, window)
        yield from itertools.cycle(EpochPlan(((sft, contrastive),)).kinds())
    exact = Fraction(beta).limit_denominator(10_000_000)
    for step in itertools.count():
        yield "sft" if math.ceil((step + 1) * exact) > math.ceil(step * exact) else "craft"
