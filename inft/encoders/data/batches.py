"""The batches that an encoder is pretrained on, without end, and those that it is evaluated on."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from inft.encoders.data.blocks import Cursor
from inft.encoders.data.counts import Counts, Tally
from inft.encoders.data.documents import TextData
from inft.encoders.data.flat import FlatBatch, flatten, static_shape
from inft.encoders.data.loaderstate import LoaderState
from inft.encoders.data.masking import EVALUATION_PROBABILITY, EVALUATION_SEED, MaskRule
from inft.encoders.data.packing import Packer, Piece
from inft.encoders.data.reader import (
    BlockPlan,
    BlockReader,
    ReadBlock,
    loader_settings,
    name_bad_rows,
    raise_error,
    read_blocks,
)
from params.encoder import EncoderParams
from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STREAMED_EVALUATION_BATCHES = 64  # unless trainer.eval_max_batches says otherwise


class PretrainingBatches:
    """An endless iterator over FlatBatches, which do not depend on how many workers read.

    Packed with full batches, documents wait in a pool until per_device_train_batch_size sequences of max_seq_length
    tokens are full. Packed without (enforce_full_packed_batches false) a batch is the next per_device_train_batch_size
    documents, which fill fewer sequences. Not packed it is the same documents; there is no padding either way, unless
    ``static`` gives every batch one shape. A device type of cuda brings defaults for throughput; ``notices`` tell.
    """

    def __init__(
        self,
        data: TextData,
        tokenizer: "PreTrainedTokenizerBase",
        params: EncoderParams,
        rank: int = 0,
        world_size: int = 1,
        *,
        state: LoaderState | None = None,
        device_type: str = "cpu",
        static: bool | None = None,
    ) -> None:
        source = self._source = data.train
        self._rank, self._world_size, self._seed = rank, world_size, params.seed
        self._size = params.trainer.per_device_train_batch_size
        self._loading = loader_settings(params.dataset, device_type)
        self.notices = self._loading.notices
        self._settings = _sequence_settings(params, rank, world_size)
        packed = params.datacollator.pack_sequences and params.trainer.enforce_full_packed_batches
        capacity = params.dataset.max_seq_length
        self._shape = None
        if _is_static(params) if static is None else static:
            pad = tokenizer.pad_token_id or 0
            self._shape = static_shape(sequences=self._size, capacity=capacity, packed=packed, pad_token_id=pad)
        self._packer = (
            Packer(sequences=self._size, capacity=capacity, limited=self._shape is not None) if packed else None
        )
        self._reader = BlockReader(source, _rule(params, tokenizer))
        self._iterator: Iterator[ReadBlock] | None = None
        self._block: ReadBlock | None = None
        self._most_bad = params.dataset.max_bad_fraction
        self._restore(state or LoaderState(settings=self._settings))

    def _restore(self, state: LoaderState) -> None:
        state.require(self._settings)
        self._cursor, self._taken, self._counted = state.cursor, state.taken, state.counted
        self._tally = Tally(self._most_bad, state.counts, state.bad_rows)
        self._made = state.batch
        self._fruitful = state.cursor.epoch if state.counted else -1  # the last epoch that gave a document
        if self._packer is not None:
            self._packer.restore(state.pool, state.batch)

    def __iter__(self) -> Iterator[FlatBatch]:
        return self

    def __next__(self) -> FlatBatch:
        batch = flatten(self._pieces(), self._shape)
        self._made += 1
        return batch.pin_memory() if self._loading.pin_memory else batch

    def state(self) -> LoaderState:
        """The state after the batch last returned."""
        return LoaderState(
            settings=self._settings,
            cursor=self._cursor,
            taken=self._taken,
            counted=self._counted,
            counts=self.counts,
            bad_rows=self.bad_rows,
            batch=self._made,
            pool=() if self._packer is None else tuple(self._packer.pool),
        )

    @property
    def counts(self) -> Counts:
        """What was read in all epochs so far, the block in hand included."""
        return self._tally.counts

    @property
    def bad_rows(self) -> tuple[str, ...]:
        """The first few rows that could not be read: file, row and reason."""
        return self._tally.bad_rows

    @property
    def epoch(self) -> float:
        """Epochs whose documents were taken, those that wait in the pool included."""
        block = self._block
        if block is None:
            return float(self._cursor.epoch)
        count = 0 if block.documents is None else len(block.documents.ends_N)
        done = self._taken / count if count else 1.0
        return self._cursor.epoch + block.begun + (block.share - block.begun) * done

    def close(self) -> None:
        """End the workers."""
        self._iterator = self._block = None

    def _pieces(self) -> Sequence[Piece]:
        packer = self._packer
        if packer is None:
            return [self._take() for _ in range(self._size)]
        while packer.hungry:
            packer.add(self._take())
        return [piece for sequence in packer.pack() for piece in sequence]

    def _take(self) -> Piece:
        """The next document."""
        while self._block is None or self._block.documents is None or self._taken == len(self._block.documents.ends_N):
            self._advance()
        self._taken += 1
        self._fruitful = self._cursor.epoch
        return self._block.documents.piece(self._taken - 1, arrived=self._made)

    def _advance(self) -> None:
        """Go to the next block; the first one after a resume is read again, and what was taken of it passed over."""
        again = self._block is None and self._counted
        try:
            block = raise_error(self._fetch())
            if block.cursor.epoch > self._cursor.epoch:
                self._tally.check(ended=True)
            self._block, self._cursor = block, block.cursor
            if not again:
                self._taken, self._counted = 0, True
                self._tally.add(block.counts, name_bad_rows(self._source, block))
                self._tally.check()
        except UserError:
            self.close()  # not when the traceback is let go, perhaps in a worker that was forked meanwhile
            raise
        if block.cursor.epoch > self._fruitful + max(1, self._world_size):
            raise UserError(
                f"{self._source.name}: every document is empty ({self.counts.empty:,} were) or dropped as too long "
                f"({self.counts.dropped:,} were). Check dataset.text_column, dataset.max_seq_length and "
                "dataset.long_documents."
            )

    def _fetch(self) -> ReadBlock:
        if self._iterator is None:
            self._begin(self._cursor)
        assert self._iterator is not None
        try:
            return next(self._iterator)
        except StopIteration:  # workers that do not persist end with the epoch
            assert self._plan.next_epoch is not None
            self._begin(self._plan.next_epoch)
            return next(self._iterator)

    def _begin(self, cursor: Cursor) -> None:
        endless = self._loading.persistent_workers or not self._loading.num_workers
        self._plan = BlockPlan(
            self._source,
            self._seed,
            cursor=cursor,
            rank=self._rank,
            world_size=self._world_size,
            epochs=None if endless else 1,
        )
        self._iterator = read_blocks(self._reader, self._plan, self._loading)


class EvaluationBatches:
    """The same FlatBatches at each iteration: fixed documents in a fixed order under fixed masks.

    15 % of the tokens are predicted, whatever training does, as 80 / 10 / 10 or with mask_all all as [MASK]; the masks
    depend on the document alone, and so are the same in every run. Batches are dealt out to the processes in turn;
    trainer.eval_max_batches (64 when streaming and unset) counts those of all processes.
    """

    def __init__(
        self,
        data: TextData,
        tokenizer: "PreTrainedTokenizerBase",
        params: EncoderParams,
        rank: int = 0,
        world_size: int = 1,
        *,
        device_type: str = "cpu",
        static: bool | None = None,
    ) -> None:
        if data.heldout is None:
            raise ValueError("there are no documents to evaluate on: TextData.heldout is None.")
        source = self._source = data.heldout
        self._rank, self._world_size = rank, world_size
        self._size = params.trainer.per_device_eval_batch_size
        self.max_batches = params.trainer.eval_max_batches
        if self.max_batches is None and source.streaming:
            self.max_batches = STREAMED_EVALUATION_BATCHES
        # A limited evaluation of a table is of rows from all over it; of a stream, of its first rows.
        self._order = EVALUATION_SEED if self.max_batches is not None and not source.streaming else None
        self._loading = loader_settings(params.dataset, device_type)
        self._shape = None
        if _is_static(params) if static is None else static:
            pad, capacity = tokenizer.pad_token_id or 0, params.dataset.max_seq_length
            self._shape = static_shape(sequences=self._size, capacity=capacity, packed=False, pad_token_id=pad)
        rule = _rule(params, tokenizer, seed=EVALUATION_SEED, probability=EVALUATION_PROBABILITY)
        self._reader = BlockReader(source, rule, fixed_masks=True)
        self._most_bad = params.dataset.max_bad_fraction
        self.counts = Counts()  # of the last pass

    def __iter__(self) -> Iterator[FlatBatch]:
        for number, pieces in enumerate(self._groups()):
            if number == self.max_batches:
                return
            if number % self._world_size == self._rank:
                batch = flatten(pieces, self._shape)
                yield batch.pin_memory() if self._loading.pin_memory else batch

    def _groups(self) -> Iterator[list[Piece]]:
        group: list[Piece] = []
        tally = Tally(self._most_bad)
        for block in read_blocks(self._reader, BlockPlan(self._source, self._order, epochs=1), self._loading):
            documents = raise_error(block).documents
            tally.add(block.counts, name_bad_rows(self._source, block))
            tally.check()
            self.counts = tally.counts
            for index in range(0 if documents is None else len(documents.ends_N)):
                assert documents is not None
                group.append(documents.piece(index, arrived=0))
                if len(group) == self._size:
                    yield group
                    group = []
        tally.check(ended=True)
        if group:
            yield group


def _rule(
    params: EncoderParams,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int | None = None,
    probability: float | None = None,
) -> MaskRule:
    assert isinstance(tokenizer.mask_token_id, int)
    return MaskRule(
        seed=params.seed if seed is None else seed,
        probability=params.datacollator.mlm_probability if probability is None else probability,
        mask_all=params.datacollator.mask_all,
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
    )


def _is_static(params: EncoderParams) -> bool:
    return params.trainer.torch_compile and params.trainer.torch_compile_dynamic is not True


def _sequence_settings(params: EncoderParams, rank: int, world_size: int) -> dict[str, Any]:
    """What the sequence of batches depends on, besides the data; json-able."""
    data, trainer, collator = params.dataset, params.trainer, params.datacollator
    return {
        "rank": rank,
        "processes": world_size,
        "seed": params.seed,
        "dataset.streaming": data.streaming,
        "dataset.shuffle_buffer_size": data.shuffle_buffer_size if data.streaming else None,
        "dataset.max_seq_length": data.max_seq_length,
        "dataset.long_documents": data.long_documents,
        "trainer.per_device_train_batch_size": trainer.per_device_train_batch_size,
        "trainer.enforce_full_packed_batches": trainer.enforce_full_packed_batches,
        "trainer.torch_compile": trainer.torch_compile,
        "trainer.torch_compile_dynamic": trainer.torch_compile_dynamic,
        "datacollator.mlm_probability": collator.mlm_probability,
        "datacollator.mask_all": collator.mask_all,
        "datacollator.pack_sequences": collator.pack_sequences,
    }
