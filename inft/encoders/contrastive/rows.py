"""Rows {query, pos, neg} of JSONL and parquet files, each checked; what is wrong with one says where and what to do."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from params.errors import UserError

ENDINGS = (".jsonl", ".parquet")
SHOWN = 5  # bad rows that an error names
READ_AT_ONCE = 1024  # rows of a parquet file
EVALUATION_NAMES = ("validation", "eval", "test", "dev")  # of files and sources that are not trained on


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
    """Return the file itself, or the .jsonl and .parquet files of a directory by name; UserError without any.

    In a directory those named as an evaluation split are left out where there are others: `evaluation_files`.
    """
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise UserError(f"{path} is no {' or '.join(ENDINGS)} file: write rows {{query, pos, neg}} as JSON lines.")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or directory. Set dataset.path or dataset.sources to the rows.")
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())
    if not files:
        raise UserError(f"{path} has no {' or '.join(ENDINGS)} file: write rows {{query, pos, neg}} as JSON lines.")
    return [file for file in files if file.stem not in EVALUATION_NAMES] or files


def evaluation_files(path: Path) -> dict[str, Path]:
    """Return the files of a directory that are named as an evaluation split, beside others, by that name."""
    if not path.is_dir() or not (kept := row_files(path)):
        return {}
    found = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in ENDINGS and file not in kept}
    return {name: found[name] for name in EVALUATION_NAMES if name in found}


def read_pairs(files: list[Path]) -> Iterator[Pairs | BadPairs]:
    """Yield every row of the files in order; a blank line is none."""
    for file in files:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)


def check_pairs(files: list[Path]) -> int:
    """Return how many rows the files have; UserError that names the first bad ones and counts all of them."""
    good, bad, first = 0, 0, []
    for row in read_pairs(files):
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


def _json_rows(file: Path) -> Iterator[Pairs | BadPairs]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
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
                yield _checked(values, where)


def _parquet_rows(file: Path) -> Iterator[Pairs | BadPairs]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = [name for name in ("query", "pos", "neg") if name in table.schema_arrow.names]
            number = 0
            for batch in table.iter_batches(batch_size=READ_AT_ONCE, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield _checked(values, f"{file} row {number}")
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}. Write it again or remove it.") from error


def _checked(values: Any, where: str) -> Pairs | BadPairs:
    if not isinstance(values, Mapping):
        return BadPairs(where, f"a JSON {type(values).__name__}: write an object {{query, pos, neg}}.")
    texts = {name: _texts(values, name) for name in ("query", "pos", "neg")}
    for found in texts.values():
        if isinstance(found, str):
            return BadPairs(where, found)
    query, positives, negatives = (tuple(texts[name]) for name in ("query", "pos", "neg"))
    if len(query) != 1:
        return BadPairs(where, f"query is a list of {len(query)} texts: give one text, a row for each query.")
    return Pairs(query[0], positives, negatives)


def _texts(values: Mapping[str, Any], name: str) -> list[str] | str:
    """The texts of one field, or what is wrong with them."""
    value = values.get(name)
    if value is None:
        if name == "neg":
            return []
        fields = ", ".join(map(str, values)) or "none"
        return f"{name} is missing (the row has: {fields}). Name the field {name} or drop the row."
    texts = value if isinstance(value, list) else [value]
    if not texts and name != "neg":
        return f"{name} is an empty list: give a text or drop the row."
    for text in texts:
        if not isinstance(text, str):
            return f"{name} holds a {type(text).__name__}: give text."
        if not text.strip():
            return f"{name} holds an empty text: give a text or drop the {'row' if name == 'query' else 'entry'}."
        if max(text) >= "\ud800" and any("\ud800" <= letter <= "\udfff" for letter in text):
            return f"{name} holds half a surrogate pair, which is no text: write the character whole."
    return list(texts)
