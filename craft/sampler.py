"""One stream of batches over two data sets: every batch of one kind, the same kinds on every rank."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from craft.schedule import EpochPlan, plan_epoch


def shuffled(rows: int, *, seed: int, round_: int) -> list[int]:
    """Return row numbers in an order that depends on (rows, seed, round) alone."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, round_))
    return torch.randperm(rows, generator=generator).tolist()


def mixed_seed(*parts: int) -> int:
    """Return one 63-bit seed for a tuple of numbers; neighbouring tuples give unrelated seeds (SplitMix64)."""
    mask, state = (1 << 64) - 1, 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


class ContrastivePasses:
    """The contrastive batches of a run by their number: passes over all rows, each in an order of its own.

    The stream passes over all of the rows before it repeats one; its batches differ in size by one row at most, so that
    none is left with a single pair. Batch n is a function of (rows, sizes, seed, rank, n) alone.
    """

    def __init__(
        self, rows: int, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, drop_last: bool = False
    ) -> None:
        self.rows = rows
        self.seed, self.rank, self.world_size = seed, rank, world_size
        step = batch_size * world_size
        self.batches = rows // step if drop_last else -(-rows // step)  # of one pass
        self._used = self.batches * step if drop_last else rows
        self._round = (-1, [0])  # the pass that was drawn last

    def __getitem__(self, number: int) -> list[int]:
        """This rank's rows of batch ``number``."""
        round_, position = divmod(number, self.batches)
        if self._round[0] != round_:
            self._round = (round_, shuffled(self.rows, seed=self.seed, round_=round_))
        whole = self._round[1]
        begin, end = (self._used * k // self.batches for k in (position, position + 1))
        return part_of(whole[begin:end], fill=whole, rank=self.rank, world_size=self.world_size)


def part_of(rows: Sequence[int], *, fill: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One rank's part of a batch: consecutive rows, sizes that differ by one at most; too few are filled up."""
    missing = world_size - len(rows)
    if missing > 0:
        rows = [*rows, *(fill[k % len(fill)] for k in range(missing))]
    begin, end = (len(rows) * k // world_size for k in (rank, rank + 1))
    return list(rows[begin:end])


class TaskBatchSampler(Sampler[list[int]]):
    """Batches of one rank as lists of indices into MixedRows, in the kinds and numbers of an EpochPlan.

    Arguments: `sft_order` gives an epoch's order of the SFT rows (all `sft_rows` of them; the same on every rank);
    `contrastive_rows` is the length of the other data set; batch sizes are per rank; `beta`,
    `gradient_accumulation_steps`, `beta_mode` and `length_strategy` are plan_epoch's.

    All ranks have the same kind at the same position and rows of their own. A batch that has too few rows for all is
    divided among the ranks; only one with fewer rows than ranks is filled up from the beginning of the order.
    Contrastive rows come in a stream that goes on over epochs (ContrastivePasses). Everything is a function of
    (seed, epoch): no global random state enters, and a resumed epoch only skips batches.

    Attributes: `plan`, the EpochPlan of every epoch; `sampler`, itself, which is where accelerate looks for set_epoch.
    Errors: ValueError of plan_epoch; ValueError when `sft_order` is no order of all rows.
    """

    drop_last = False  # of the batch sampler as accelerate sees it: whatever is dropped is dropped in here

    def __init__(
        self,
        sft_order: Callable[[int], Sequence[int]],
        contrastive_rows: int,
        *,
        sft_rows: int,
        sft_batch_size: int,
        contrastive_batch_size: int,
        beta: float,
        gradient_accumulation_steps: int,
        beta_mode: str = "fixed",
        length_strategy: str = "oversample",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.sft_order = sft_order
        self.sft_rows = sft_rows
        self.batch_size = sft_batch_size
        self.rank, self.world_size = rank, world_size
        self._sft_step = sft_batch_size * world_size
        self._epoch = 0
        self._passes = ContrastivePasses(
            contrastive_rows,
            batch_size=contrastive_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        self.plan: EpochPlan = plan_epoch(
            sft_batches=sft_rows // self._sft_step if drop_last else -(-sft_rows // self._sft_step),
            contrastive_batches=self._passes.batches,
            beta=beta,
            gradient_accumulation_steps=gradient_accumulation_steps,
            beta_mode=beta_mode,
            length_strategy=length_strategy,
        )

    @property
    def sampler(self) -> "TaskBatchSampler":
        """Itself: accelerate calls ``batch_sampler.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        sft, contrastive = 0, self._epoch * self.plan.contrastive_batches
        for kind in self.plan.kinds():
            if kind == "sft":
                rows = order[sft * self._sft_step : (sft + 1) * self._sft_step]
                yield part_of(rows, fill=order, rank=self.rank, world_size=self.world_size)
                sft += 1
            else:
                yield [self.sft_rows + row for row in self._passes[contrastive]]
                contrastive += 1

    def _order(self) -> Sequence[int]:
        order = self.sft_order(self._epoch)
        if len(order) != self.sft_rows:
            raise ValueError(
                f"the order of epoch {self._epoch} has {len(order)} entries for {self.sft_rows} SFT rows: one per row "
                "is needed. Pass a sampler without replacement that does not divide the rows among processes."
            )
        return order
