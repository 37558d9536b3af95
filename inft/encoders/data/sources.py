"""From the shards of a split to a source of documents: empty shards, missing columns, rows kept for evaluation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from inft.encoders.data.blocks import Part, Source
from inft.encoders.data.lines import missing_column
from inft.encoders.data.splits import Splits
from inft.encoders.data.tokenised import IDS_COLUMN, KEY_COLUMN, LANGUAGE_COLUMN, Reading, Tokenised
from params.encoder import EncoderParams
from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FIRST_ROWS = 100  # of a shard whose rows have columns of their own: a column that none of them has is missing


def open_source(
    params: EncoderParams,
    tokenizer: "PreTrainedTokenizerBase",
    splits: Splits,
    split: str,
    *,
    stored: Tokenised | None = None,
) -> tuple[Source, list[str]]:
    """Return the documents of a split, and notices of empty shards and of token ids of unknown origin.

    Unless they are streamed all shards are opened. Errors: UserError for one that is corrupt or has not the columns.
    """
    data = params.dataset
    _check_room(params, tokenizer)
    source = Source(
        parts=tuple(Part(shard=shard, number=number) for number, shard in enumerate(splits[split])),
        split=split,
        streaming=data.streaming,
        window=data.shuffle_buffer_size,
        reading=_reading(params, tokenizer, None, stored),
    )
    source, notices = (source, []) if data.streaming else _without_empty(source)
    first = next((index for index in range(len(source.parts)) if source.rows(index).count), None)
    if first is None:
        names = ", ".join(shard.name for shard in splits[split])
        raise UserError(f"every shard of split {split} is empty: {names}. Give shards with documents.")
    reading = _reading(params, tokenizer, source.parts[first].shard.columns(), stored)
    if reading.tokenised and stored is None:
        notices.append(f"the data hold {IDS_COLUMN}, but not which tokenizer made them: make sure that it is this one.")
    source = replace(source, reading=reading)
    for index in [first] if data.streaming else range(len(source.parts)):
        _check_columns(source, index)
    return source, notices


def _without_empty(source: Source) -> tuple[Source, list[str]]:
    kept = [part for index, part in enumerate(source.parts) if source.rows(index).count]
    if not kept or len(kept) == len(source.parts):
        return source, []
    names = ", ".join(part.shard.name for part in source.parts if part not in kept)
    return source.with_parts(kept), [f"empty shards of split {source.split} are skipped: {names}."]


def reserve(train: Source, samples: int) -> tuple[Source, Source]:
    """Split off the first rows: (what is trained on, what is evaluated on).

    Of tokenised documents, the pieces of one stay together. Errors: UserError when nothing is left to train on.
    """
    kept: list[Part] = []
    left, count = samples, 0
    for index, part in enumerate(train.parts):
        count = train.rows(index).count
        stop = _whole_documents(train, index, min(left, count), count)
        kept.append(replace(part, stop=stop))
        left -= min(left, stop)
        if not left:
            break
    rest = list(train.parts[len(kept) :])
    if (stop := kept[-1].stop or 0) < count:
        rest.insert(0, replace(train.parts[len(kept) - 1], start=stop))
    if left or not rest:
        raise UserError(
            f"dataset.eval_samples {samples:,} leaves nothing to train on: split {train.split} has "
            f"{samples - left:,} rows. Lower it."
        )
    return train.with_parts(rest), train.with_parts(kept)


def _whole_documents(train: Source, index: int, stop: int, count: int) -> int:
    """The row at which the document ends that row ``stop`` - 1 is a piece of."""
    if not train.reading.keyed or stop == count:
        return stop
    shard, rows = train.parts[index].shard, train.rows(index)
    while stop < count:
        before, after = shard.read(rows.places(np.array([stop - 1, stop])), [KEY_COLUMN])[KEY_COLUMN]
        if before != after:
            break
        stop += 1
    return stop


def _reading(
    params: EncoderParams,
    tokenizer: "PreTrainedTokenizerBase",
    columns: Sequence[str] | None,
    stored: Tokenised | None,
) -> Reading:
    data = params.dataset
    tokenised = columns is not None and IDS_COLUMN in columns and data.text_column not in columns
    language = data.language_column
    if stored is not None:
        language = LANGUAGE_COLUMN if columns is not None and LANGUAGE_COLUMN in columns else None
        if columns is not None and data.language_column is not None and language is None:
            raise UserError(
                f"{data.path} was tokenised without languages: set dataset.language_column when you preprocess, or "
                "leave it out."
            )
    return Reading(
        tokenizer=tokenizer,
        text_column=data.text_column,
        language_column=language,
        max_length=data.max_seq_length,
        long_documents=data.long_documents,
        tokenised=tokenised,
        keyed=tokenised and stored is not None,
    )


def _check_columns(source: Source, index: int) -> None:
    """Raise UserError unless the rows of a shard have the columns that are read; of json, any of its first rows."""
    shard, reading, rows = source.parts[index].shard, source.reading, source.rows(index)
    columns, where = shard.columns(), shard.name
    if columns is None:
        first = min(FIRST_ROWS, rows.count)
        columns = shard.columns_of(rows.places(np.arange(first)))
        where += f", rows 1 to {first}"
    missing = [column for column in reading.columns if column not in columns]
    if not missing:
        return
    remedy = "Name the one that holds the text with dataset.text_column."
    if missing[0] == reading.language_column:
        remedy = "Name the one that holds the language with dataset.language_column, or leave that out."
    raise missing_column(where, missing[0], columns, remedy)


def _check_room(params: EncoderParams, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UserError when the special tokens alone fill a document."""
    special, most = tokenizer.num_special_tokens_to_add(), params.dataset.max_seq_length
    if special >= most:
        raise UserError(
            f"dataset.max_seq_length {most} leaves no room for text beside the {special} special tokens of "
            f"{tokenizer.name_or_path or 'the tokenizer'}. Raise it."
        )
