"""The loader's processes: blocks of rows become masked documents, in the order of the plan.

What they give does not depend on how many there are: the plan is made in the main process, and masks depend on the
document alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from inft.encoders.data.blocks import Block, Cursor, Source, blocks
from inft.encoders.data.counts import SHOWN, Counts
from inft.encoders.data.masking import MaskRule, mask_documents
from inft.encoders.data.packing import Piece
from inft.encoders.data.tokenised import BadRow, Document, read_documents
from params.encoder import DatasetParams
from params.errors import UserError

_CUDA_WORKERS, _CUDA_PREFETCH, _PREFETCH = 4, 4, 2


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How many processes read, and how far ahead."""

    num_workers: int = 0
    pin_memory: bool = False
    persistent_workers: bool = False
    prefetch_factor: int | None = None  # blocks of each worker
    notices: tuple[str, ...] = ()  # what was chosen for the user, and settings without effect


def loader_settings(params: DatasetParams, device_type: str, *, cpus: int | None = None) -> LoaderSettings:
    """Return the settings of ``dataset.*``, with those for throughput on CUDA where they are unset."""
    cuda, notices = device_type == "cuda", []
    workers = params.num_workers
    if cuda and not workers:
        workers = max(1, min(_CUDA_WORKERS, (cpus or os.cpu_count() or 2) - 1))
        notices.append(f"dataset.num_workers 0 would let the GPU wait for the tokenizer: {workers} are started.")
    if cuda and params.pin_memory is False:
        notices.append("dataset.pin_memory false makes every copy to the GPU wait: unset it for throughput.")
    if params.pin_memory and not cuda:
        notices.append("dataset.pin_memory true has no effect without CUDA.")
    prefetch = params.prefetch_factor
    if workers and prefetch is None:
        prefetch = _CUDA_PREFETCH if cuda else _PREFETCH
    if not workers:
        unused = {"prefetch_factor": params.prefetch_factor, "persistent_workers": params.persistent_workers}
        named = [f"dataset.{name}" for name, value in unused.items() if value]
        if named:
            notices.append(f"{' and '.join(named)} need dataset.num_workers of at least 1 and have no effect.")
    persistent = workers > 0 and params.persistent_workers is not False
    return LoaderSettings(
        num_workers=workers,
        pin_memory=cuda if params.pin_memory is None else params.pin_memory and cuda,
        persistent_workers=persistent,
        prefetch_factor=prefetch if workers else None,
        notices=tuple(notices),
    )


@dataclass(frozen=True, kw_only=True)
class ReadBlock:
    """The documents of one block, masked where a rule is given."""

    cursor: Cursor
    begun: float  # share of the epoch that is done when the block begins
    share: float  # and when it ends
    documents: "MaskedDocuments | None" = None
    counts: Counts = field(default_factory=Counts)
    bad: tuple[tuple[int, BadRow], ...] = ()  # the first unreadable rows, each with the number of its part
    error: str | None = None  # what a user can mend; a worker's exceptions would come with its traceback


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDocuments:
    """Documents in a row: few arrays travel faster from a worker than many."""

    input_ids_T: np.ndarray  # int32
    labels_T: np.ndarray  # int32; empty without a rule
    ends_N: np.ndarray  # int64
    keys_N: np.ndarray  # int64
    pieces_N: np.ndarray  # int64
    languages: tuple[str | None, ...]

    def piece(self, index: int, arrived: int) -> Piece:
        """A copy of one document, which does not keep the others in memory."""
        span = slice(int(self.ends_N[index - 1]) if index else 0, int(self.ends_N[index]))
        return Piece(
            input_ids_T=self.input_ids_T[span].copy(),
            labels_T=self.labels_T[span].copy(),
            key=int(self.keys_N[index]),
            piece=int(self.pieces_N[index]),
            language=self.languages[index],
            arrived=arrived,
        )


class BlockReader(Dataset[ReadBlock]):
    """Reads blocks; lives in every worker."""

    def __init__(self, source: Source, rule: MaskRule | None, *, fixed_masks: bool = False) -> None:
        self._source = source
        self._rule = rule
        self._fixed_masks = fixed_masks

    def __getitem__(self, block: Any) -> ReadBlock:
        try:
            documents, counts, bad = block_documents(self._source, block)
        except UserError as error:
            return ReadBlock(cursor=block.cursor, begun=block.begun, share=block.share, error=str(error))
        epoch = 0 if self._fixed_masks else block.cursor.epoch
        masked = _masked(documents, self._rule, epoch) if documents else None
        return ReadBlock(
            cursor=block.cursor, begun=block.begun, share=block.share, documents=masked, counts=counts, bad=tuple(bad)
        )


def block_documents(source: Source, block: Block) -> tuple[list[Document], Counts, list[tuple[int, BadRow]]]:
    """Return the documents of a block in the order of the plan, what was counted, and the first unreadable rows."""
    ordered: list[tuple[int, list[Document]]] = []
    counts, bad = Counts(), list[tuple[int, BadRow]]()
    for read in block.reads:
        part = source.parts[read.part]
        documents, counted, unreadable = read_documents(source.reading, part.shard, part.number, read.rows, read.places)
        counts += counted
        bad += [(read.part, row) for row in unreadable]
        ordered += zip(read.order.tolist(), documents, strict=True)
    ordered.sort(key=lambda pair: pair[0])
    return [document for _, found in ordered for document in found], counts, bad[:SHOWN]


def name_bad_rows(source: Source, block: ReadBlock) -> Iterator[str]:
    """Yield where each of the unreadable rows is, and why; a long file is searched for its lines."""
    for part, row in block.bad:
        yield f"{source.parts[part].shard.where(row.place)}: {row.reason}"


def _masked(documents: list[Document], rule: MaskRule | None, epoch: int) -> MaskedDocuments:
    lengths = np.array([len(document.tokens) for document in documents])
    keys = np.array([document.key for document in documents])
    numbers = np.array([document.piece for document in documents])
    tokens = np.concatenate([document.tokens for document in documents])
    seen, labels = tokens, tokens[:0]
    if rule is not None:
        seen, labels = mask_documents(tokens, lengths, keys, numbers, rule=rule, epoch=epoch)
    return MaskedDocuments(
        input_ids_T=seen,
        labels_T=labels,
        ends_N=np.cumsum(lengths),
        keys_N=keys,
        pieces_N=numbers,
        languages=tuple(document.language for document in documents),
    )


class BlockPlan(Sampler[Any]):
    """The blocks that one process reads from a cursor on, in order; runs in the main process.

    It knows nothing of who iterates: a loader in a cycle of references would be collected in a forked worker.
    """

    def __init__(
        self,
        source: Source,
        seed: int | None,
        *,
        cursor: Cursor | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ) -> None:
        self._source, self._seed, self._cursor = source, seed, cursor or Cursor()
        self._rank, self._world_size = rank, world_size
        self._epochs = epochs  # that are begun; None: without end
        self.next_epoch: Cursor | None = None  # where the plan ended

    def __iter__(self) -> Iterator[Block]:
        begun: set[int] = set()
        for block in blocks(self._source, self._seed, self._cursor):
            if self._epochs is not None and block.cursor.epoch not in begun and len(begun) == self._epochs:
                self.next_epoch = block.cursor
                return
            if block.cursor.number % self._world_size == self._rank:
                begun.add(block.cursor.epoch)
                yield block


def read_blocks(reader: BlockReader, plan: BlockPlan, settings: LoaderSettings) -> Iterator[ReadBlock]:
    """Read the blocks of a plan; the workers are forked here, and end when the iterator is let go."""
    loader = DataLoader(
        reader,
        sampler=plan,
        batch_size=None,
        collate_fn=_same,
        num_workers=settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
        persistent_workers=settings.persistent_workers,
        generator=torch.Generator(),  # of its own: the random state of training must not depend on who reads
    )
    if not settings.num_workers:
        return iter(loader)
    with _no_tokenizer_threads():
        return _watched(iter(loader))


def _watched(blocks_read: Iterator[ReadBlock]) -> Iterator[ReadBlock]:
    while True:
        with killed_readers_told():
            block = next(blocks_read, None)
        if block is None:
            return
        yield block


@contextmanager
def killed_readers_told() -> Iterator[None]:
    """Turn torch's error for a reading process that was killed into a UserError.

    Torch raises it out of a signal handler, and so wherever the main process happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a reading process was killed ({str(error).splitlines()[0].rstrip('. ')}). Was the machine out of memory? "
            "Lower dataset.num_workers or dataset.prefetch_factor, and go on from the last checkpoint with --resume."
        ) from error


def raise_error(block: ReadBlock) -> ReadBlock:
    """The block, unless a user's mistake was met in it."""
    if block.error is not None:
        raise UserError(block.error)
    return block


def _same(block: ReadBlock) -> ReadBlock:
    return block


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """The tokenizer's threads do not survive a fork; told so, it neither warns nor waits for them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
