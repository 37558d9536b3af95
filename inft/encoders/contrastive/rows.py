"""Rows {query, pos, neg} of JSONL and parquet files, each checked; what is wrong with one says where and what to do."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from params.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
FIELDS = ("query", "pos", "neg")
SHOWN = 5  # bad rows that an error names
READ_AT_ONCE = 1024  # rows of a parquet file
EVALUATION_NAMES = ("validation", "eval", "test", "dev")  # of files and sources that are not trained on
_OF_TEXTS = r"(text|doc|document|passage|ctx|sample|example)?s?[0-9]*"
NEAR_MISSES: Mapping[str, str] = {  # of a field's name in lower case, without what joins words
    "query": r"quer(y|ies|ys)|question|anchor",
    "pos": rf"pos(itive)?s?{_OF_TEXTS}",
    "neg": rf"(hard)?neg(ative)?s?{_OF_TEXTS}",
}
JSON_WORDS: Mapping[type, str] = {
    bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object",
    type(None): "null",
}  # fmt: skip


class Pairs(NamedTuple):
    """A query, the texts that answer it and texts that do not."""

    query: str
    positives: tuple[str, ...]  # at least one
    negatives: tuple[str, ...]


class BadPairs(NamedTuple):
    """A row that cannot be used."""

    where: str  # file and line
    reason: str  # field and remedy


def row_files(path: Path) -> list[Path]:
    """Return the file itself, or by name the files of a directory or glob that hold rows; UserError without any.

    In a directory or glob those named as an evaluation split are left out where there are others: `evaluation_files`.
    """
    if path.is_file():
        if not _has_rows(path):
            raise UserError(f"{path} is no {' or '.join(ENDINGS)} file: write rows {{query, pos, neg}} as JSON lines.")
        return [path]
    files = _found(path)
    return [file for file in files if file_stem(file) not in EVALUATION_NAMES] or files


def evaluation_files(path: Path) -> dict[str, Path]:
    """Return the files of a directory or glob that are named as an evaluation split, beside others, by that name."""
    if path.is_file() or not (path.is_dir() or is_glob(path)):
        return {}
    kept = row_files(path)
    found = {file_stem(file): file for file in _found(path) if file not in kept}
    return {name: found[name] for name in EVALUATION_NAMES if name in found}


def is_glob(path: Path) -> bool:
    """Whether a path that does not exist as it reads is a pattern of files."""
    return glob.has_magic(str(path)) and not path.exists()


def file_stem(file: Path) -> str:
    """The file's name without its ending."""
    return next((file.name.removesuffix(ending) for ending in ENDINGS if file.name.endswith(ending)), file.stem)


def _found(path: Path) -> list[Path]:
    if is_glob(path):
        files = sorted(Path(name) for name in glob.iglob(str(path), recursive=True))
    elif path.is_dir():
        files = sorted(path.iterdir())
    else:
        raise UserError(f"{path}: there is no such file or directory. Set dataset.path or dataset.sources to the rows.")
    files = [file for file in files if _has_rows(file) and file.is_file()]
    if not files:
        what = "no file fits it" if is_glob(path) else "the directory has no file"
        raise UserError(f"{path}: {what} that ends in {', '.join(ENDINGS)}. Write rows {{query, pos, neg}}.")
    return files


def _has_rows(file: Path) -> bool:
    return file.name.endswith(ENDINGS)


def read_pairs(files: list[Path], unread: set[str] | None = None) -> Iterator[Pairs | BadPairs]:
    """Yield every row of the files in order; a blank line is none. `unread` collects the names of other fields."""
    unread = set() if unread is None else unread
    for file in files:
        yield from _parquet_rows(file, unread) if file.suffix == ".parquet" else _json_rows(file, unread)


def check_pairs(files: list[Path], unread: set[str] | None = None) -> int:
    """Return how many rows the files have; `unread` collects the names of fields that are not read.

    Errors: UserError that names the first bad rows and counts all of them.
    """
    good, bad, first = 0, 0, []
    for row in read_pairs(files, unread):
        if isinstance(row, Pairs):
            good += 1
            continue
        bad += 1
        if bad <= SHOWN:
            first.append(f"  {row.where}: {row.reason}")
    if bad:
        more = [f"  … and {bad - SHOWN} more"] if bad > SHOWN else []
        raise UserError("\n".join([f"{bad} of {good + bad} rows cannot be used:", *first, *more]))
    if not good:
        raise UserError(f"{files[0]} has no rows: write one JSON object {{query, pos, neg}} a line.")
    return good


def _json_rows(file: Path, unread: set[str]) -> Iterator[Pairs | BadPairs]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield BadPairs(where, f"not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8.")
        except (ValueError, RecursionError) as error:
            yield BadPairs(where, f"not JSON ({error}): write one object a line.")
        else:
            yield _checked(values, where, values if isinstance(values, Mapping) else (), unread)


def _lines(file: Path) -> Iterator[bytes]:
    if file.suffix != ".gz":
        with file.open("rb") as lines:
            yield from lines
        return
    try:
        with gzip.open(file, "rb") as unpacked:
            yield from unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be unpacked: {error}. Write it again or remove it.") from error


def _parquet_rows(file: Path, unread: set[str]) -> Iterator[Pairs | BadPairs]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            fields = table.schema_arrow.names
            names = [name for name in FIELDS if name in fields]
            number = 0
            for batch in table.iter_batches(batch_size=READ_AT_ONCE, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield _checked(values, f"{file} row {number}", fields, unread)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}. Write it again or remove it.") from error


def _checked(values: Any, where: str, fields: Iterable[str], unread: set[str]) -> Pairs | BadPairs:
    """`fields` are all that the row has, also those that `values` leaves out."""
    if not isinstance(values, Mapping):
        return BadPairs(where, f"the line is {JSON_WORDS[type(values)]}: write an object {{query, pos, neg}}.")
    unread.update(name for name in fields if name not in FIELDS)
    texts = {name: _texts(values, name, fields) for name in FIELDS}
    for found in texts.values():
        if isinstance(found, str):
            return BadPairs(where, found)
    query, positives, negatives = (tuple(texts[name]) for name in ("query", "pos", "neg"))
    if len(query) != 1:
        return BadPairs(where, f"query is a list of {len(query)} texts: give one text, a row for each query.")
    return Pairs(query[0], positives, negatives)


def _texts(values: Mapping[str, Any], name: str, fields: Iterable[str]) -> list[str] | str:
    """The texts of one field, or what is wrong with them."""
    value = values.get(name)
    if value is None:
        near = _near_miss(name, fields)
        if name == "neg":
            return [] if near is None else f"{near} is not read. Rename {near} to neg."
        remedy = f"Name the field {name} or drop the row." if near is None else f"Rename {near} to {name}."
        return f"{name} is missing (the row has: {', '.join(fields) or 'none'}). {remedy}"
    texts = value if isinstance(value, list) else [value]
    if not texts and name != "neg":
        return f"{name} is an empty list: give a text or drop the row."
    for text in texts:
        if not isinstance(text, str):
            word = JSON_WORDS.get(type(text), type(text).__name__)  # parquet has dates and more
            return f"{name} holds {word}: give text."
        if not text.strip():
            return f"{name} holds an empty text: give a text or drop the {'row' if name == 'query' else 'entry'}."
        if max(text) >= "\ud800" and any("\ud800" <= letter <= "\udfff" for letter in text):
            return f"{name} holds half a surrogate pair, which is no text: write the character whole."
    return list(texts)


def _near_miss(name: str, fields: Iterable[str]) -> str | None:
    """A field that was probably meant by a name that the row lacks."""
    if name in fields:
        return None
    others = (field for field in fields if field not in FIELDS)
    return next((field for field in others if re.fullmatch(NEAR_MISSES[name], _joined(field))), None)


def _joined(field: str) -> str:
    return re.sub(r"[^a-z0-9]", "", field.lower())
