"""First-fit-decreasing packing of documents into sequences, out of a pool that lives on from batch to batch.

Axes: T tokens of one document, B sequences of a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

POOL_BATCHES = 4  # the pool is filled up to the tokens of this many batches
POOL_DOCUMENTS = 128  # and to this many documents, so that small batches have a choice, too
WAIT_BATCHES = 8  # a document that has waited for as many goes before all that came later;
WAIT_DOCUMENTS = 512  # with small batches: for as many as make these sequences
MIN_TOKENS = 8  # with static shapes a sequence holds at most capacity / 8 documents


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """A masked document, or a piece of one."""

    input_ids_T: np.ndarray  # int32
    labels_T: np.ndarray  # int32
    key: int
    piece: int
    language: str | None
    arrived: int = 0  # batches that were made before it came

    def __len__(self) -> int:
        return len(self.input_ids_T)


class Packer:
    """Packs documents into B sequences of ``capacity`` tokens at a time; ``pool`` and ``batch`` are its whole state.

    The longest documents are placed first, each into the first sequence that has room (Johnson 1973). One that has
    waited for ``patience`` batches is placed before all others, the oldest first: it waits no longer than for as many
    more as the documents before it fill.
    """

    def __init__(self, *, sequences: int, capacity: int, limited: bool = False) -> None:
        self.sequences = sequences
        self.capacity = capacity
        self.limit = max(1, capacity // MIN_TOKENS) if limited else capacity  # documents of a sequence
        self.patience = max(WAIT_BATCHES, WAIT_DOCUMENTS // sequences)  # batches
        self.pool: list[Piece] = []
        self.batch = 0  # batches made
        self._tokens = 0
        self._wanted = POOL_BATCHES * sequences * capacity

    @property
    def hungry(self) -> bool:
        """Whether the pool should be filled before the next batch is made."""
        return self._tokens < self._wanted or len(self.pool) < POOL_DOCUMENTS

    def add(self, piece: Piece) -> None:
        """Put a document into the pool."""
        if len(piece) > self.capacity:
            raise ValueError(f"a document of {len(piece)} tokens does not fit a sequence of {self.capacity}.")
        self.pool.append(piece)
        self._tokens += len(piece)

    def restore(self, pool: Iterable[Piece], batch: int) -> None:
        """Go on from a state."""
        self.pool, self.batch, self._tokens = [], batch, 0
        for piece in pool:
            self.add(piece)

    def pack(self) -> list[list[Piece]]:
        """Take the documents of one batch out of the pool: B sequences, fewer only when the pool has no more."""
        room_B = np.full(self.sequences, self.capacity)
        packed: list[list[Piece]] = [[] for _ in range(self.sequences)]
        taken = set()
        lengths = [len(piece.input_ids_T) for piece in self.pool]
        too_long = self.capacity + 1  # for what room is left: rooms only shrink
        for index in self._order(lengths):
            length = lengths[index]
            if length >= too_long:
                continue
            fits_B = room_B >= length
            place = int(fits_B.argmax())
            if not fits_B[place]:
                too_long = length
                continue
            packed[place].append(self.pool[index])
            taken.add(index)
            room_B[place] -= length
            if len(packed[place]) == self.limit:
                room_B[place] = 0
        self.pool = [piece for index, piece in enumerate(self.pool) if index not in taken]
        self._tokens = sum(lengths) - sum(lengths[index] for index in taken)
        self.batch += 1
        return [sequence for sequence in packed if sequence]

    def _order(self, lengths: list[int]) -> list[int]:
        """The pool by age for those that have waited, then by length, the longest first; ties by age."""
        waited = self.batch - np.array([piece.arrived for piece in self.pool], np.int64)
        rank = np.where(waited >= self.patience, -self.capacity - 1, -np.array(lengths, np.int64))
        return np.argsort(rank, kind="stable").tolist()
