"""In which order the rows of a data set are read: a pure function of (seed, epoch), known without reading any.

Not streaming, all rows are permuted anew in each epoch. Streaming, the shards are permuted, a shard's windows of
shuffle_buffer_size rows, and the rows in each window. A block is a few hundred rows in this order: what a worker
reads, tokenises and masks at a time. Blocks are numbered on through all epochs; process r of W takes those whose
number leaves r when divided by W.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from inft.encoders.data.counter import permuted, shuffled
from inft.encoders.data.shards import Shard, ShardRows
from inft.encoders.data.tokenised import Reading
from params.errors import UserError

BLOCK_ROWS = 512  # of a local shard; a remote one is read by the window, so that nothing is fetched twice
_OPEN_SHARDS = 4  # whose rows are remembered when streaming: an index may take 16 bytes a row
_ALL, _SHARDS, _WINDOWS, _ROWS = 0, 1, 2, 3  # what is permuted


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows ``start`` to ``stop`` (its end: None) of one shard."""

    shard: Shard
    number: int  # of the shard in the split, the same whichever others are empty
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The documents of one split, or of a share of it."""

    parts: tuple[Part, ...]
    split: str
    streaming: bool
    window: int  # rows that are shuffled together when streaming; 1: none
    reading: Reading
    _rows: OrderedDict[int, ShardRows] = field(default_factory=OrderedDict, repr=False, compare=False)

    def with_parts(self, parts: Sequence[Part]) -> "Source":
        """The same source of other parts."""
        return replace(self, parts=tuple(parts))  # what is known of the shards is shared

    def rows(self, index: int) -> ShardRows:
        """Where the rows of part ``index`` are; its shard is opened when it is not known."""
        part = self.parts[index]
        if part.number not in self._rows:
            self._rows[part.number] = part.shard.open()
            while self.streaming and len(self._rows) > _OPEN_SHARDS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(part.number)
        return self._rows[part.number]

    def count(self, index: int) -> tuple[int, int]:
        """The first row of part ``index`` and the end of its rows."""
        part, count = self.parts[index], self.rows(index).count
        return part.start, count if part.stop is None else min(part.stop, count)

    def total(self) -> int:
        """All rows; opens every shard."""
        return sum(stop - start for start, stop in map(self.count, range(len(self.parts))))

    @property
    def name(self) -> str:
        """Where the first shard lies, for messages."""
        return f"split {self.split} ({self.parts[0].shard.name}{' …' if len(self.parts) > 1 else ''})"


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A place in the endless sequence of blocks."""

    epoch: int = 0
    turn: int = 0  # shards of the epoch that are done (streaming)
    block: int = 0  # blocks of this shard, or not streaming of the epoch, that are done
    number: int = 0  # blocks of all epochs that are done

    def asdict(self) -> dict[str, int]:
        """The four numbers by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRows:
    """Rows of one part."""

    part: int
    rows: np.ndarray  # int64
    places: np.ndarray  # for Shard.read
    order: np.ndarray  # int64: where in the block each row stands


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What a worker reads at a time."""

    cursor: Cursor  # of the block itself
    begun: float  # share of the epoch that is done when the block begins
    share: float  # and when it ends
    reads: tuple[BlockRows, ...]


def blocks(source: Source, seed: int | None, start: Cursor | None = None) -> Iterator[Block]:
    """Yield all blocks from a cursor on, without end.

    ``seed`` None reads the rows in their order. Errors: UserError when an epoch has no row at all.
    """
    cursor = start or Cursor()
    make = _streamed if source.streaming or seed is None else _permuted
    while True:
        begun, done = cursor == replace(cursor, turn=0, block=0), cursor.number
        for block in make(source, seed, cursor):
            yield block
            done = block.cursor.number + 1
        if begun and done == cursor.number:
            raise UserError(f"{source.name} holds no row. Give shards with documents.")
        cursor = Cursor(epoch=cursor.epoch + 1, number=done)


def _permuted(source: Source, seed: int | None, cursor: Cursor) -> Iterator[Block]:
    """The blocks of one epoch in which all rows are permuted."""
    assert seed is not None
    limits = np.array([source.count(index) for index in range(len(source.parts))]).reshape(-1, 2)
    ends = np.cumsum(limits[:, 1] - limits[:, 0])
    total = int(ends[-1]) if len(ends) else 0
    count = -(-total // BLOCK_ROWS)
    for block in range(cursor.block, count):
        places = np.arange(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, total))
        chosen = permuted(places, total, seed, cursor.epoch, _ALL)
        part_R = np.searchsorted(ends, chosen, side="right")
        reads = []
        for part in np.unique(part_R).tolist():
            order = np.flatnonzero(part_R == part)
            rows = chosen[order] - (int(ends[part - 1]) if part else 0) + int(limits[part, 0])
            reads.append(_reads(source, part, rows, order))
        at = replace(cursor, block=block, number=cursor.number + block - cursor.block)
        yield Block(cursor=at, begun=block / count, share=(block + 1) / count, reads=tuple(reads))


def _streamed(source: Source, seed: int | None, cursor: Cursor) -> Iterator[Block]:
    """The blocks of one epoch in which shards are read one after the other."""
    mixed = seed is not None and source.window > 1
    order = shuffled(len(source.parts), seed or 0, cursor.epoch, _SHARDS) if mixed else np.arange(len(source.parts))
    number = cursor.number
    for turn in range(cursor.turn, len(order)):
        part = int(order[turn])
        made = list(_windows(source, part, (seed or 0, cursor.epoch) if mixed else None))
        first = cursor.block if turn == cursor.turn else 0
        for block in range(first, len(made)):
            rows = _window_rows(made[block], (seed or 0, cursor.epoch, part) if mixed else None)
            at = Cursor(epoch=cursor.epoch, turn=turn, block=block, number=number)
            begun, share = ((turn + done / len(made)) / len(order) for done in (block, block + 1))
            yield Block(cursor=at, begun=begun, share=share, reads=(_reads(source, part, rows, np.arange(len(rows))),))
            number += 1


@dataclass(frozen=True, slots=True)
class _Slice:
    """The rows of one block within its window, before the window is shuffled."""

    window: int
    first: int  # row of the shard that the window begins with
    count: int  # of the window's rows
    begin: int  # of the shuffled window
    end: int


def _windows(source: Source, part: int, key: tuple[int, int] | None) -> Iterator[_Slice]:
    start, stop = source.count(part)
    size = source.window if key else max(source.window, BLOCK_ROWS)
    edges = list(window_edges(start, stop, size, source.rows(part).bounds))
    order = np.arange(len(edges)) if key is None else shuffled(len(edges), *key, _WINDOWS, part)
    for window in order.tolist():
        first, end = edges[window]
        step = end - first if source.parts[part].shard.remote else BLOCK_ROWS
        for begin in range(0, end - first, step):
            yield _Slice(window, first, end - first, begin, min(begin + step, end - first))


def _window_rows(piece: _Slice, key: tuple[int, int, int] | None) -> np.ndarray:
    if key is None:
        return piece.first + np.arange(piece.begin, piece.end)
    seed, epoch, part = key
    return piece.first + shuffled(piece.count, seed, epoch, _ROWS, part, piece.window)[piece.begin : piece.end]


def window_edges(start: int, stop: int, size: int, bounds: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Yield the windows of rows ``start`` to ``stop``: of ``size`` rows, or of the row groups that hold as many.

    A row group of more than four windows is cut.
    """
    while start < stop:
        end = start + size
        if bounds is not None:
            end = int(bounds[min(int(np.searchsorted(bounds, end)), len(bounds) - 1)])
            end = end if end - start <= 4 * size else start + size
        yield start, min(end, stop)
        start = end


def _reads(source: Source, part: int, rows: np.ndarray, order: np.ndarray) -> BlockRows:
    return BlockRows(part=part, rows=rows, places=source.rows(part).places(rows), order=order)
