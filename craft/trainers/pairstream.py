"""The batches of pairs that stand beside a trainer's own micro-batches: number n of a run, whatever made it stop."""

import warnings
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Sampler

from craft.collate import SAMPLE_ID_COLUMNS
from craft.distributed import rank, world_size
from craft.mixing import opened
from craft.sampler import ContrastivePasses, mixed_seed
from craft.trainers.loaders import Loaders


class PairStream:
    """Micro-batches of pairs without an end; `position` is the number of the next one.

    `open_at` makes an iterator over the batches from a number on. A batch is a function of its number: a resumed run
    sets `position` and reads on.
    """

    def __init__(self, open_at: Callable[[int], Iterator[Any]], device: torch.device) -> None:
        self.position = 0
        self._open_at = open_at
        self._device = device
        self._batches: Iterator[Any] | None = None
        self._opened_at = -1  # position that the iterator stands at

    def close(self) -> None:
        """Let go of the loader's workers; the next batches are read by new ones."""
        self._batches = None

    def take(self, number: int) -> list[Any]:
        """Return the next ``number`` batches, on the device."""
        if self._batches is None or self._opened_at != self.position:
            self._batches = self._open_at(self.position)
        taken = [send_to_device(batch, self._device) for batch in islice(self._batches, number)]
        self.position += number
        self._opened_at = self.position
        return taken


class _EndlessBatches(Sampler[list[int]]):
    """Row numbers of batch ``first`` and all after it."""

    def __init__(self, passes: ContrastivePasses, first: int) -> None:
        self.passes, self.first = passes, first

    def __iter__(self) -> Iterator[list[int]]:
        return (self.passes[number] for number in count(self.first))


class JointLoaders(Loaders):
    """The loaders of a trainer whose every micro-batch carries both losses: its own loader, and a stream of pairs."""

    def __init__(self, trainer: Any, **given: Any) -> None:
        super().__init__(trainer, **given)
        self._contrastive: Any = self._given[1]
        if self.bundle.strategy == "paired_dataset":
            self._refuse_mixing()

    def own_columns(self) -> list[str]:
        """Sample ids; where prompts and answers are, such a trainer's own batches say."""
        names = getattr(getattr(self.trainer, "train_dataset", None), "column_names", None) or ()
        wanted = self.bundle.strategy == "self_align" and not self.trainer._craft_generates
        return [name for name in SAMPLE_ID_COLUMNS if wanted and name in names]

    def build(self, own: Callable[[], DataLoader]) -> Any:
        """The trainer's own loader, or the one that was given for it."""
        self._refuse_no_rows()
        sft_loader, self._contrastive = self._given_loaders()
        return own() if sft_loader is None else self._placed(sft_loader)

    def stream(self) -> PairStream | None:
        """The batches of pairs; None with self_align."""
        if self.bundle.strategy == "self_align":
            return None
        return PairStream(self._open_at, self.trainer.args.device)

    def _open_at(self, position: int) -> Iterator[Any]:
        if self._contrastive is None:
            return self._own_batches(position)
        return self._given_batches(self._placed(self._contrastive), position)

    def _own_batches(self, position: int) -> Iterator[Any]:
        if not self._sized:
            return self._given_batches(self._placed(self._contrastive_loader()), position)
        args = self.trainer.args
        passes = ContrastivePasses(
            len(self._pairs),
            batch_size=self._contrastive_batch_size,
            seed=self._seed,
            rank=rank(),
            world_size=world_size(),
            drop_last=args.dataloader_drop_last,
        )
        if not passes.batches:
            lower = ", lower craft_contrastive_batch_size or set dataloader_drop_last=False" if len(self._pairs) else ""
            raise ValueError(
                f"the {len(self._pairs):,} pairs do not fill one batch of {self._contrastive_batch_size} on "
                f"{world_size()} process(es). Give more pairs{lower}."
            )
        loader = DataLoader(
            self._pairs,
            batch_sampler=_EndlessBatches(passes, position),
            collate_fn=self._pair_collator,
            generator=torch.Generator().manual_seed(mixed_seed(self._seed, position)),  # no draw from the run's own
            **self._workers(),
        )
        return iter(loader)

    def _given_batches(self, loader: Any, position: int) -> Iterator[Any]:
        """The batches of a loader that begins anew whenever it ends, from number ``position`` on."""

        def endless() -> Iterator[Any]:
            for round_ in count():
                taken = 0
                for batch in opened(loader, epoch=round_, seed=mixed_seed(self._seed, round_)):
                    taken += 1
                    yield batch
                if not taken:
                    raise ValueError("the loader of pairs yields no batch. Give it rows, or a drop_last of False.")

        return islice(endless(), position, None)

    def _refuse_mixing(self) -> None:
        """Tell a user who set how kinds are mixed that here nothing is: each micro-batch has both."""
        args, name = self.args, type(self.trainer).__name__
        how = f"{name} adds a batch of pairs to each of its own micro-batches and repeats pairs as needed"
        if args.craft_length_strategy in ("cap", "error"):
            raise ValueError(
                f"craft_length_strategy={args.craft_length_strategy!r} has no meaning here: {how}. Leave it at "
                "'oversample'; craft_contrastive_batch_size says how many pairs a batch holds."
            )
        if args.craft_beta_mode == "fixed" and args.craft_beta != type(args)().craft_beta:
            warnings.warn(
                f"craft_beta={args.craft_beta} is not read: {how}. craft_alpha weighs the losses and "
                "craft_contrastive_batch_size says how many pairs a batch holds.",
                stacklevel=5,
            )

    def _in_batch(self) -> int:
        """Other rows that an anchor meets at most; completions of one prompt are no negatives of each other."""
        found = super()._in_batch()
        group = getattr(self.trainer, "num_generations", 1)
        if self.bundle.strategy != "self_align" or group == 1:
            return found
        return min(found, max(self.trainer.args.generation_batch_size - group, 0))

    @property
    def _figures(self) -> tuple[int, int, int | None]:
        accumulation = self.trainer.args.gradient_accumulation_steps
        return accumulation, accumulation, None
