"""Rows with named columns from .jsonl, .csv, .tsv and .parquet files."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from params.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
LINES = ".txt"  # a text on each line, no columns


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One row."""

    values: Mapping[str, Any]
    where: str  # "train.tsv line 17", for messages


class Reader(Protocol):
    """Yields the rows of one kind of file."""

    def __call__(self, path: Path) -> Iterator[TableRow]:
        """The rows, first to last."""


def read_table(path: Path, columns: Sequence[str]) -> list[TableRow]:
    """Return the rows of a file, each of which has the columns; a missing cell of a csv or tsv file is None.

    A .tsv is read as GLUE's files are: tabs separate, quotes mean nothing. Errors: UserError naming file, row and
    column.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: what kind of file is it? Name it {', '.join(SUFFIXES)}.")
    rows = _rows_of(reader, path)
    for row in rows:
        missing = [name for name in columns if name not in row.values]
        if missing:
            has = ", ".join(map(str, row.values))
            raise UserError(f"{row.where}: has no column {missing[0]!r}. It has {has}.")
    return rows


def read_texts(path: Path, text_column: str, language_column: str | None = None) -> list[tuple[str, str | None]]:
    """Return the texts of a file and their languages; of a .txt file each line that is not blank.

    Errors: UserError naming a row without a text, or a language column that a .txt file cannot have.
    """
    if path.suffix == LINES:
        if language_column is not None:
            raise UserError(f"{path} has no columns: leave the language column out.")
        return [(row.values[text_column], None) for row in _rows_of(_lines(text_column), path)]
    columns = (text_column, *((language_column,) if language_column else ()))
    found = []
    for row in read_table(path, columns):
        text, language = row.values[text_column], row.values.get(language_column) if language_column else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row.where}: the column {text_column!r} has no text ({text!r}). Mend or drop the row.")
        found.append((text, None if language is None else str(language)))
    return found


@contextmanager
def utf8(path: Path) -> Iterator[None]:
    """While a file is read: UserError when it cannot be, or is not UTF-8."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error


def _rows_of(reader: Reader, path: Path) -> list[TableRow]:
    with utf8(path):
        rows = list(reader(path))
    if not rows:
        raise UserError(f"{path}: has no rows.")
    return rows


def _lines(column: str) -> Reader:
    def read(path: Path) -> Iterator[TableRow]:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield TableRow(values={column: line.strip()}, where=f"{path} line {number}")

    return read


def json_rows(path: Path) -> Iterator[TableRow]:
    """Yield the objects of a .jsonl file as they are read; UserError names a line that is none."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: is not JSON ({error}).") from error
            if not isinstance(values, dict):
                raise UserError(f"{where}: is a JSON {type(values).__name__}, not an object with columns.")
            yield TableRow(values=values, where=where)


def _csv(path: Path) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from _delimited(path, csv.DictReader(lines))


def _tsv(path: Path) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from _delimited(path, csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _delimited(path: Path, reader: "csv.DictReader[str]") -> Iterator[TableRow]:
    try:
        for values in reader:
            where = f"{path} line {reader.line_num}"
            if None in values:
                fields = reader.fieldnames or ()
                raise UserError(f"{where}: has more than the {len(fields)} columns of the first line.")
            yield TableRow(values=values, where=where)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: cannot be read ({error}).") from error


def _parquet(path: Path) -> Iterator[TableRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table as read_parquet

    try:
        rows = read_parquet(path).to_pylist()
    except ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}).") from error
    for number, values in enumerate(rows):
        yield TableRow(values=values, where=f"{path} row {number}")


_READERS: Mapping[str, Reader] = {".jsonl": json_rows, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
