"""Documents as token ids: how text becomes them, and what becomes of long and of empty ones.

Axes: N documents (pieces of split ones count singly), T their tokens in a row.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from inft.encoders.data.counts import Counts
from inft.encoders.data.shards import Shard, Unreadable
from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_BITS = 40  # of a key: the row's number; above them that of its shard
IDS_COLUMN, KEY_COLUMN, PIECE_COLUMN, LANGUAGE_COLUMN = "input_ids", "key", "piece", "language"  # of tokenised data
TOKENISED_FILE = "tokenised.json"  # beside them


class Document(NamedTuple):
    """A document, or a piece of a split one."""

    key: int  # of the document in the data set; pieces share it
    tokens: np.ndarray  # int32, special ones included
    language: str | None
    piece: int = 0  # 0, or the number of the piece


class BadRow(NamedTuple):
    """A row that cannot be read."""

    place: Any  # as Shard.read takes it
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become documents; one object serves every worker."""

    tokenizer: "PreTrainedTokenizerBase"
    text_column: str
    language_column: str | None
    max_length: int  # tokens, special ones included
    long_documents: Literal["split", "drop"]
    tokenised: bool = False  # the rows hold token ids
    keyed: bool = False  # they also hold the keys and pieces that the documents had as text

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, the one with the content first."""
        language = () if self.language_column is None else (self.language_column,)
        if not self.tokenised:
            return (self.text_column, *language)
        return (IDS_COLUMN, *language, *((KEY_COLUMN, PIECE_COLUMN) if self.keyed else ()))

    def words(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens are not special; an unknown word is a word."""
        return ~np.isin(ids, self._special)

    @cached_property
    def _special(self) -> np.ndarray:
        return np.array(sorted({*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}), np.int32)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> None:
    """Raise UserError for a tokenizer that cannot serve masked language modelling, or has more than these tokens."""
    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.is_fast:
        raise UserError(f"{name} has no fast tokenizer (tokenizer.json): choose another, or save it as a fast one.")
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"{name} has no mask token: nothing could be hidden from the model. Choose a tokenizer of a masked "
            "language model, or add one with tokenizer.add_special_tokens({'mask_token': '[MASK]'}) and save it."
        )
    largest = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    if vocab_size is not None and largest > vocab_size:
        raise UserError(
            f"{name} has {largest:,} tokens, model.vocab_size is {vocab_size:,}: tokens would have no embedding. "
            f"Set model.vocab_size to at least {largest}."
        )


def read_documents(
    reading: Reading, shard: Shard, number: int, rows: np.ndarray, places: np.ndarray
) -> tuple[list[list[Document]], Counts, list[BadRow]]:
    """Return for each of some rows of a shard its document, in pieces if it is long; the counts; unreadable rows.

    ``number`` is the shard's, ``rows`` are the rows' numbers in it and ``places`` where it finds them. A row that is
    corrupt, has no such column or holds something else than text is unreadable. Errors: UserError for a damaged shard.
    """
    values = shard.read(places, reading.columns)
    told = values[reading.columns[0]]
    reasons = [_unreadable(reading, value) for value in told]
    bad = [BadRow(place, reason) for place, reason in zip(places, reasons, strict=True) if reason]
    content = [None if reason else value for value, reason in zip(told, reasons, strict=True)]
    languages = _languages(reading, values, len(rows))
    keys, pieces = (rows + (number << ROW_BITS)).tolist(), [0] * len(rows)
    if reading.keyed:
        keys, pieces = list(values[KEY_COLUMN]), list(values[PIECE_COLUMN])
    ids_N = list(_stored_ids(reading, content, shard, places) if reading.tokenised else _ids(reading, content))
    words_N = np.split(reading.words(np.concatenate(ids_N)), np.cumsum([len(ids) for ids in ids_N])[:-1])
    found: list[list[Document]] = []
    split = dropped = empty = 0
    for row, (ids, words) in enumerate(zip(ids_N, words_N, strict=True)):
        parts = list(pieces_of(ids, words, reading.max_length))
        if len(parts) > 1 and reading.long_documents == "drop":
            parts, dropped = [], dropped + 1
        elif not parts:
            empty += 1
        split += len(parts) > 1
        first = int(pieces[row])
        found.append([Document(int(keys[row]), part, languages[row], first + i) for i, part in enumerate(parts)])
    empty -= len(bad)  # they are without a token, too
    return found, Counts(documents=len(rows), split=split, dropped=dropped, empty=empty, bad=len(bad)), bad


def pieces_of(ids: np.ndarray, words: np.ndarray, max_length: int) -> Iterator[np.ndarray]:
    """Yield a document in pieces of at most ``max_length`` tokens, each between the special tokens of the whole.

    ``words`` tells which of its tokens are not special; without any nothing is yielded.
    """
    if not words.any():
        return
    if len(ids) <= max_length:
        yield ids
        return
    first, end = int(words.argmax()), len(words) - int(words[::-1].argmax())
    room = max_length - first - (len(ids) - end)
    for start in range(first, end, room):
        yield np.concatenate([ids[:first], ids[start : min(start + room, end)], ids[end:]])


def _languages(reading: Reading, values: Mapping[str, Sequence[Any]], count: int) -> list[str | None]:
    if reading.language_column is None:
        return [None] * count
    return [None if value is None else str(value) for value in values[reading.language_column]]


def _unreadable(reading: Reading, value: Any) -> str | None:
    """Why a row is passed over; None for one that is read."""
    if isinstance(value, Unreadable):
        return value.reason
    if reading.tokenised or value is None:
        return None
    if not isinstance(value, str):
        return f"its {reading.text_column} is {type(value).__name__} {str(value)[:60]!r}, not text"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a pair; the tokenizer takes none
        return f"its {reading.text_column} is no Unicode (a lone surrogate at character {error.start})"
    return None


def _ids(reading: Reading, texts: Sequence[str | None]) -> Iterator[np.ndarray]:
    """The token ids of each text; of one that is missing or blank none."""
    shown = [row for row, text in enumerate(texts) if text and not text.isspace()]
    encoded: list[list[int]] = []
    if shown:  # a special token's name in a text is a word like others, and not that token
        encoded = reading.tokenizer(
            [texts[row] for row in shown],
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
    found = dict(zip(shown, encoded, strict=True))
    for row in range(len(texts)):
        yield np.array(found.get(row, ()), np.int32)


def _stored_ids(reading: Reading, rows: Sequence[Any], shard: Shard, places: np.ndarray) -> Iterator[np.ndarray]:
    size = len(reading.tokenizer)
    for row, place in zip(rows, places, strict=True):
        ids = np.asarray(() if row is None else row)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise UserError(f"{shard.where(place)}: its {IDS_COLUMN} are no token ids. Tokenise the data again.")
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise UserError(
                f"{shard.where(place)}: token {int(ids.max())} is none of the tokenizer's {size:,}. The data were "
                "tokenised with another one: set tokenizer.name to it, or tokenise the data again."
            )
        yield ids.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """What the file beside tokenised data says of them."""

    tokenizer: str  # fingerprint
    tokenizer_name: str
    max_seq_length: int
    long_documents: str
    source: str  # fingerprint of the text
    text_column: str
    counts: Mapping[str, Mapping[str, int]]  # split -> name -> number


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hexadecimal hash of everything that decides how a fast tokenizer makes ids of text."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # what the last call asked for
        words.pop(passing, None)
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def read_tokenised(directory: Path, tokenizer: "PreTrainedTokenizerBase") -> Tokenised | None:
    """Return what is told of tokenised data; None where a directory holds none.

    Errors: UserError for data of another tokenizer.
    """
    file = directory / TOKENISED_FILE
    if not file.is_file():
        return None
    try:
        found = Tokenised(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Tokenise the data again.") from error
    if found.tokenizer != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{directory} was tokenised with {found.tokenizer_name}, whose vocabulary or rules differ from those of "
            f"{tokenizer.name_or_path}. Set tokenizer.name to it, or tokenise the data again."
        )
    return found


def require_length(stored: Tokenised, directory: Path, max_seq_length: int) -> None:
    """Raise UserError for stored documents that are longer than a run takes, or were cut shorter than it asks for."""
    if stored.max_seq_length > max_seq_length:
        raise UserError(
            f"{directory} holds documents of up to {stored.max_seq_length} tokens, dataset.max_seq_length is "
            f"{max_seq_length}. Raise it to {stored.max_seq_length}, or tokenise the data again."
        )
    cut = sum(counts.get("split", 0) + counts.get("dropped", 0) for counts in stored.counts.values())
    if stored.max_seq_length < max_seq_length and cut:
        raise UserError(
            f"{directory}: {cut:,} documents were split or dropped when it was tokenised for {stored.max_seq_length} "
            f"tokens: they would be no longer under dataset.max_seq_length {max_seq_length}. Tokenise the text again "
            f"with dataset.max_seq_length {max_seq_length}, or lower it to {stored.max_seq_length}."
        )
