"""Which rows make which batch: a pure function of (seed, batch number, rank), so that a resumed run goes on exactly.

A batch comes from one source, the same one on every rank: in-batch negatives of the same task are harder, and nothing
tells the tasks apart (Li et al. 2023, GTE, section 4.2). Axes: S sources, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

BLOCK = 4096  # batches whose sources are drawn together


class Draw(IntEnum):
    """What a random number is for: each has a stream of its own."""

    SOURCE = 1
    ORDER = 2
    TEXTS = 3
    SIMCSE = 4


def keyed(seed: int, what: Draw, *numbers: int) -> np.random.Generator:
    """A generator whose numbers depend on the arguments alone (at most three of them); Philox, Salmon et al. 2011."""
    counter = [0, *numbers, *[0] * (3 - len(numbers))]  # the first word counts the numbers that are drawn
    return np.random.Generator(np.random.Philox(key=[seed, int(what)], counter=counter))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a batch's rows stand."""

    source: int
    epoch: int  # of the source
    rows: np.ndarray  # of this rank, int64
    simcse: bool


class Mixture:
    """The order of all batches: sources drawn with probability size^alpha, rows of a source in shuffled epochs.

    An epoch of a source is as many whole batches (of all ranks) as it has; what is left over waits for the next
    epoch's order. A source smaller than a batch of all ranks makes smaller batches. Errors: ValueError for a source
    with fewer rows than ranks.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        alpha: float,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        simcse_share: float = 0.0,
    ) -> None:
        if not sizes or min(sizes) < world_size:
            raise ValueError(f"sources of {list(sizes)} rows do not reach {world_size} processes: each needs a row.")
        self.sizes = list(sizes)
        weights_S = np.asarray(sizes, dtype=np.float64) ** alpha
        self.shares_S = weights_S / weights_S.sum()
        self.seed = seed
        self.batch_rows = batch_size * world_size
        self.rank, self.world_size = rank, world_size
        self.simcse_share = simcse_share
        self._before = [np.zeros(len(sizes), dtype=np.int64)]  # batches of each source before each block
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._order: dict[int, tuple[int, np.ndarray]] = {}  # source -> its epoch and the order of its rows

    def place(self, batch: int) -> Place:
        """Return where this rank's rows of a batch stand, batches counted from 0."""
        source, earlier = self._source(batch)
        size = self.sizes[source]
        batches = max(1, size // self.batch_rows)  # of an epoch
        epoch, within = divmod(earlier, batches)
        rows = self._rows(source, epoch)[within * self.batch_rows : (within + 1) * self.batch_rows]
        simcse = bool(self.simcse_share) and keyed(self.seed, Draw.SIMCSE, batch).random() < self.simcse_share
        return Place(source=source, epoch=epoch, rows=rows[self.rank :: self.world_size], simcse=simcse)

    def epochs(self, batch: int) -> float:
        """Return how often the rows of all sources have been gone through, on average, before a batch."""
        rows_S = np.minimum(self.sizes, self.batch_rows)  # of a batch
        return float(self._drawn(batch) @ rows_S) / sum(self.sizes)

    def _source(self, batch: int) -> tuple[int, int]:
        """A batch's source, and how many earlier batches had the same."""
        earlier_S = self._drawn(batch)
        source = int(self._block[1][batch % BLOCK])
        return source, int(earlier_S[source])

    def _drawn(self, batch: int) -> np.ndarray:
        """How many batches before this one each source has had; `_block` is then this batch's."""
        block, within = divmod(batch, BLOCK)
        while len(self._before) <= block:
            drawn = self._draw(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.sizes)))
        if self._block[0] != block:
            self._block = (block, self._draw(block))
        return self._before[block] + np.bincount(self._block[1][:within], minlength=len(self.sizes))

    def _draw(self, block: int) -> np.ndarray:
        if len(self.sizes) == 1:
            return np.zeros(BLOCK, dtype=np.int64)
        return keyed(self.seed, Draw.SOURCE, block).choice(len(self.sizes), size=BLOCK, p=self.shares_S)

    def _rows(self, source: int, epoch: int) -> np.ndarray:
        if self._order.get(source, (-1,))[0] != epoch:
            self._order[source] = (epoch, keyed(self.seed, Draw.ORDER, source, epoch).permutation(self.sizes[source]))
        return self._order[source][1]
