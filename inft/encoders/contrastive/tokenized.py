"""Pairs as tokens on disk: one Arrow file a source, mapped into memory, beside a note of what it was made with."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inft.encoders.contrastive.rows import Pairs, check_pairs, read_pairs, row_files
from inft.training.storage import file_sha256, staged
from params.encoder import EncoderParams
from params.errors import UserError

FORMAT = 2
ROWS = "rows.arrow"
NOTE = "contrastive.json"  # what marks a directory as a tokenised source
TOKENIZED_AT_ONCE = 1000  # rows
TEXT, TEXTS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
SCHEMA = pa.schema(
    [
        ("query", TEXT), ("query_key", pa.int64()),
        ("pos", TEXTS), ("pos_keys", pa.list_(pa.int64())),
        ("neg", TEXTS), ("neg_keys", pa.list_(pa.int64())),
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """What decides the tokens of a text: two sources of one run share it."""

    tokenizer: str  # fingerprint
    query_prefix: str
    document_prefix: str
    query_max_length: int
    document_max_length: int

    @classmethod
    def of(cls, params: EncoderParams, tokenizer: Any) -> "Tokenization":
        """The one that the parameters ask for."""
        return cls(
            tokenizer=tokenizer_fingerprint(tokenizer),
            query_prefix=params.contrastive.query_prefix,
            document_prefix=params.contrastive.document_prefix,
            query_max_length=params.contrastive.query_max_length or params.dataset.max_seq_length,
            document_max_length=params.dataset.max_seq_length,
        )


class TokenizedRow(NamedTuple):
    """A row's texts as tokens (int32, special tokens included) and their keys: equal keys, equal texts."""

    query: np.ndarray
    query_key: int
    positives: list[np.ndarray]
    positive_keys: list[int]
    negatives: list[np.ndarray]
    negative_keys: list[int]


class TokenizedPairs:
    """The rows of one tokenised source, read from the disk as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.note = read_note(directory)
        try:
            self._table = pa.ipc.open_file(pa.memory_map(str(directory / ROWS))).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{directory / ROWS} cannot be read: {error}. Preprocess the source again.") from error
        if len(self._table) != self.note["rows"]:
            raise UserError(
                f"{directory / ROWS} has {len(self._table)} rows instead of {self.note['rows']}: preprocess it again."
            )

    def __len__(self) -> int:
        return len(self._table)

    def with_negatives(self, first: int, rows: int) -> int:
        """How many of some rows have hard negatives."""
        lengths = pc.list_value_length(self._table.column("neg_keys").slice(first, rows))
        return int(pc.sum(pc.greater(lengths, 0)).as_py() or 0)

    def row(self, number: int) -> TokenizedRow:
        """Return one row."""
        values = [self._table.column(name)[number] for name in SCHEMA.names]
        query, query_key, positives, positive_keys, negatives, negative_keys = values
        return TokenizedRow(
            query.values.to_numpy(),
            query_key.as_py(),
            [text.values.to_numpy() for text in positives],
            positive_keys.as_py(),
            [text.values.to_numpy() for text in negatives],
            negative_keys.as_py(),
        )


def tokenize_source(path: Path, output: Path, tokenizer: Any, tokenization: Tokenization) -> TokenizedPairs:
    """Tokenise the rows of a file or directory into `output`, which appears whole or not at all.

    An `output` that was made of the same files in the same way is left as it is.
    Errors: UserError that names the first rows that cannot be used and counts all.
    """
    files = row_files(path)
    made_of: dict[str, Any] = {"format": FORMAT, **asdict(tokenization)}
    made_of["files"] = [[file.name, file_sha256(file)] for file in files]
    if (output / NOTE).is_file() and read_note(output, any_format=True).items() >= made_of.items():
        check_intact(output)
        return TokenizedPairs(output)
    if output.exists() and not (output / NOTE).is_file():
        raise UserError(f"{output} exists and holds something else: choose another output, or remove it.")
    unread: set[str] = set()
    check_pairs(files, unread)
    with staged(output, what="the tokenised pairs", remedy="Free space there or choose another output.") as directory:
        counts = _write(directory / ROWS, files, tokenizer, tokenization)
        found = {"unread": sorted(unread), "sha256": file_sha256(directory / ROWS)}
        note = json.dumps(made_of | counts | found, indent=1, ensure_ascii=False)
        (directory / NOTE).write_text(note, encoding="utf-8")
    return TokenizedPairs(output)


def read_note(directory: Path, *, any_format: bool = False) -> dict[str, Any]:
    """What stands in a tokenised source's note; UserError when it is none, or of another format."""
    try:
        note: dict[str, Any] = json.loads((directory / NOTE).read_text(encoding="utf-8"))
        if note["format"] != FORMAT and not any_format:
            raise UserError(f"{directory} is of format {note['format']}, not {FORMAT}: preprocess the source again.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / NOTE} cannot be read ({error}): preprocess the source again.") from error
    return note


def check_intact(directory: Path) -> None:
    """UserError when the tokens are not those that were written; reads the whole file."""
    if file_sha256(directory / ROWS) != read_note(directory)["sha256"]:
        raise UserError(
            f"{directory / ROWS} is not as it was written: remove {directory} and preprocess the source again."
        )


def check_tokenization(source: TokenizedPairs, wanted: Tokenization) -> None:
    """UserError that shows how a source's tokens differ from those that the run would make."""
    theirs: Mapping[str, Any] = source.note
    different = [
        f"{name} {theirs.get(name)!r} instead of {value!r}"
        for name, value in asdict(wanted).items()
        if theirs.get(name) != value
    ]
    if different:
        raise UserError(
            f"{source.directory} was preprocessed with {', '.join(different)}: preprocess it again, or change the run."
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hexadecimal digest of a fast tokenizer's rules and vocabulary, whatever padding or truncation it is set to."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]


def text_key(text: str) -> int:
    """A number of 64 bits that equal texts share and other texts do not; never 0, which stands for unknown."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def tokens_of(texts: Sequence[str], prefix: str, longest: int, tokenizer: Any) -> list[np.ndarray]:
    """Return each text's tokens after the prefix, cut to `longest`; UserError for a text without any token."""
    if not texts:
        return []
    encoded = tokenizer([prefix + text for text in texts], truncation=True, max_length=longest, padding=False)
    found = [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    for text, ids in zip(texts, found, strict=True):
        if not len(ids):
            raise UserError(f"the tokenizer makes no token of {text[:40]!r}: drop the text.")
    return found


def _write(file: Path, files: list[Path], tokenizer: Any, tokenization: Tokenization) -> dict[str, int]:
    counts = {"rows": 0, "texts": 0, "tokens": 0, "at_limit": 0}
    rows = (row for row in read_pairs(files) if isinstance(row, Pairs))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while block := list(islice(rows, TOKENIZED_AT_ONCE)):
            writer.write_batch(_batch(block, tokenizer, tokenization, counts))
    return counts


def _batch(block: list[Pairs], tokenizer: Any, how: Tokenization, counts: dict[str, int]) -> pa.RecordBatch:
    documents = [text for row in block for text in (*row.positives, *row.negatives)]
    queries = tokens_of([row.query for row in block], how.query_prefix, how.query_max_length, tokenizer)
    tokens = tokens_of(documents, how.document_prefix, how.document_max_length, tokenizer)
    counts["rows"] += len(block)
    counts["texts"] += len(queries) + len(tokens)
    counts["tokens"] += sum(map(len, queries)) + sum(map(len, tokens))
    counts["at_limit"] += sum(len(text) >= how.query_max_length for text in queries)
    counts["at_limit"] += sum(len(text) >= how.document_max_length for text in tokens)
    return pa.RecordBatch.from_pylist(list(_records(block, queries, tokens)), schema=SCHEMA)


def _records(block: list[Pairs], queries: list[np.ndarray], tokens: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    left = iter(tokens)
    for row, query in zip(block, queries, strict=True):
        yield {
            "query": query,
            "query_key": text_key(row.query),
            "pos": list(islice(left, len(row.positives))),
            "pos_keys": [text_key(text) for text in row.positives],
            "neg": list(islice(left, len(row.negatives))),
            "neg_keys": [text_key(text) for text in row.negatives],
        }
