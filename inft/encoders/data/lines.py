"""Text files of documents: jsonl, json, csv, tsv and txt, plain or compressed; any row is found by its bytes.

A row is a line that is not empty (of a csv file, a record, which may hold line breaks in quotes; of a json file that
is one array, an element). A compressed file is unpacked once, into the cache of the datasets library.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inft.data.hub import import_datasets
from inft.encoders.data.shards import Columns, ShardRows, Unreadable, file_sample
from inft.training.storage import STAGING, disk_trouble
from params.errors import UserError

LineFormat = Literal["jsonl", "array", "csv", "tsv", "text"]
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
PACKED = (".gz", ".bz2", ".zst", ".lz4")
PIECE = 2**24  # bytes that are searched for line ends at a time
SAMPLE = 2**12  # bytes that tell an array from lines
_NEWLINE, _RETURN, _QUOTE = b"\n"[0], b"\r"[0], b'"'[0]
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_BOM = b"\xef\xbb\xbf"
_LONGEST = 2**31 - 1  # characters of a field: a document may be longer than the csv module's default of 128 KiB


def line_suffix(path: Path) -> str:
    """The suffix that tells the format, without that of the compression."""
    return (Path(path.stem).suffix if path.suffix.lower() in PACKED else path.suffix).lower()


@dataclass(frozen=True)
class LineShard:
    """A text file; ``text_column`` is the name that the lines of a txt file go by."""

    name: str
    path: Path
    text_column: str
    remote: bool = False

    def open(self) -> ShardRows:
        """Search the whole file for line ends, at the speed of the disk; an array is parsed."""
        file = self._file()
        if self._format == "array":
            return ShardRows(count=len(_array(file)))
        spans_R2 = find_rows(file, table=self._format in _DELIMITERS)
        return ShardRows(count=len(spans_R2), spans_R2=spans_R2)

    def columns(self) -> tuple[str, ...] | None:
        """The header of a csv file; json rows have their own."""
        if self._format == "text":
            return (self.text_column,)
        return _header(self._file(), self._format) if self._format in _DELIMITERS else None

    def columns_of(self, places: np.ndarray) -> tuple[str, ...]:
        """The keys of the rows, in the order in which they come up."""
        rows = list(self._objects(places))
        objects = [row for row in rows if isinstance(row, dict)]
        corrupt = [row for row in rows if isinstance(row, Unreadable)]
        if not objects:
            count = f"None of the first {len(rows):,} rows can be read" if len(rows) > 1 else "No row can be read"
            raise UserError(f"{self.where(places[0])}: {corrupt[0].reason}. {count}.")
        return tuple(dict.fromkeys(key for row in objects for key in row))

    def read(self, places: np.ndarray, columns: Sequence[str]) -> Columns:
        """Read and parse the rows; what a row lacks besides the first column, the text, is None."""
        found: dict[str, list[Any]] = {column: [] for column in columns}
        for row in self._objects(places):
            if not isinstance(row, dict):
                row = {columns[0]: row}
            elif columns[0] not in row:
                row = {columns[0]: Unreadable(_lacks(columns[0], row))}
            for column in columns:
                found[column].append(row.get(column))
        return found

    def where(self, place: Any) -> str:
        """File and line, from 1."""
        if self._format == "array":
            return f"{self.path} element {int(place)}"
        with self._file().open("rb") as file:
            left, line = int(place[0]), 1
            while left and (piece := file.read(min(left, PIECE))):
                left, line = left - len(piece), line + piece.count(b"\n")
        return f"{self.path} line {line}"

    def description(self) -> dict[str, Any]:
        """Bytes and a hash of both ends of the file as it lies on the disk."""
        return file_sample(self.path)

    def _objects(self, places: np.ndarray) -> Iterator[dict[str, Any] | Unreadable]:
        if self._format == "array":
            rows: Iterator[Any] = iter([_array(self._file())[place] for place in places.tolist()])
        else:
            rows = self._rows(places)
        for row in rows:
            known = isinstance(row, dict | Unreadable)
            yield row if known else Unreadable(f"a JSON {type(row).__name__}, not an object")

    def _rows(self, spans_R2: np.ndarray) -> Iterator[Any]:
        """What stands on each line; of one that is corrupt Unreadable."""
        parse = self._parser()
        with self._file().open("rb") as file:
            for span in spans_R2:
                file.seek(int(span[0]))
                line = file.read(int(span[1] - span[0]))
                try:
                    row = parse(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    row = Unreadable(f"not UTF-8 ({error.reason} at byte {error.start} of the row)")
                except (ValueError, RecursionError, csv.Error) as error:
                    if b"\n" in line:  # only a csv record has several lines: the next ones may have been swallowed
                        raise UserError(f"{self.where(span)}: {_swallowed(line, error)}") from error
                    row = Unreadable(f"not {self._format.upper()} ({error})")
                yield row

    def _parser(self) -> Callable[[str], Any]:
        if self._format == "jsonl":  # a line of blanks is an empty document
            return lambda line: json.loads(line) if line.strip() else {self.text_column: None}
        if self._format == "text":
            return lambda line: {self.text_column: line}
        header, delimiter = _header(self._file(), self._format), _DELIMITERS[self._format]
        return lambda line: _record(line, header, delimiter)

    @property
    def _format(self) -> LineFormat:
        suffix = line_suffix(self.path)
        if suffix == ".json" and _is_array(self._file()):
            return "array"
        return SUFFIXES[suffix]  # type: ignore[return-value]

    def _file(self) -> Path:
        """The file to read, unpacked where it is compressed."""
        if self.path.suffix.lower() not in PACKED:
            return self.path
        status = self.path.stat()
        return unpacked(self.path, status.st_size, status.st_mtime_ns)


def missing_column(where: str, column: str, available: Iterable[str], remedy: str) -> UserError:
    """The error for rows without a column."""
    return UserError(f"{where}: {_lacks(column, available)}. {remedy}")


def _lacks(column: str, available: Iterable[str]) -> str:
    return f"no column {column!r}. Its columns are: {', '.join(map(str, available))}"


def _swallowed(record: bytes, error: Exception) -> str:
    count = record.count(b"\n") + 1
    return (
        f"a record of {count:,} lines that cannot be read ({error}). A quote without its other half seems to join rows "
        "that are apart: double it, or take it out."
    )


def find_rows(path: Path, *, table: bool) -> np.ndarray:
    """Return int64 [R, 2], first byte and end of every line that is not empty, without its line end.

    Of a ``table``, a line end inside double quotes belongs to the row (RFC 4180), and the first row, the header, is
    left out.
    """
    end_R, returns_R = _line_ends(path, table=table)
    start_R = np.concatenate([[0], end_R[:-1] + 1])
    with path.open("rb") as file:
        start_R[0] = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    end_R = end_R - returns_R
    spans_R2 = np.stack([start_R, end_R], 1)[end_R > start_R]
    return spans_R2[1:] if table else spans_R2


def _line_ends(path: Path, *, table: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where each line ends (the last one at the end of the file), and whether a carriage return stands before."""
    ends, returns = [], []
    begin, quotes, last = 0, 0, 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            bytes_P = np.frombuffer(piece, np.uint8)
            found = np.flatnonzero(bytes_P == _NEWLINE)
            if table:
                quote_Q = np.flatnonzero(bytes_P == _QUOTE)
                found = found[(quotes + np.searchsorted(quote_Q, found)) % 2 == 0]
                quotes += len(quote_Q)
            before = np.concatenate([[last], bytes_P[:-1]])
            ends.append(found + begin)
            returns.append(before[found] == _RETURN)
            begin, last = begin + len(piece), int(bytes_P[-1])
    ends.append(np.array([begin]))
    returns.append(np.array([last == _RETURN]))
    return np.concatenate(ends).astype(np.int64), np.concatenate(returns)


def _record(line: str, header: tuple[str, ...], delimiter: str) -> dict[str, str | None]:
    before = csv.field_size_limit(_LONGEST)  # the module's own, which other readers rely on
    try:
        (values,) = csv.reader([line.removesuffix("\r")], delimiter=delimiter, strict=True)
    finally:
        csv.field_size_limit(before)
    if len(values) != len(header):
        raise ValueError(f"{len(values)} fields, the header has {len(header)}")
    return dict(zip(header, values, strict=True))


@lru_cache(maxsize=64)
def _header(path: Path, kind: str) -> tuple[str, ...]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return tuple(next(csv.reader(file, delimiter=_DELIMITERS[kind]), ()))


@lru_cache(maxsize=64)
def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(SAMPLE).removeprefix(_BOM).lstrip()[:1] == b"["


@lru_cache(maxsize=2)
def _array(path: Path) -> list[Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array ({error}). Write one object a line, as .jsonl.") from error


@lru_cache(maxsize=256)
def unpacked(path: Path, size: int, changed: int) -> Path:
    """Return the uncompressed copy of a file of this size and time of change (ns), made when there is none."""
    import pyarrow as pa

    cache = Path(import_datasets().config.HF_DATASETS_CACHE) / "inft-unpacked"
    tag = hashlib.sha256(f"{path.resolve()} {size} {changed}".encode()).hexdigest()[:20]
    final = cache / f"{tag}-{path.stem}"
    if final.exists():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f"{STAGING}{os.getpid()}-{final.name}")
    try:
        with pa.input_stream(str(path), compression="detect") as packed, draft.open("wb") as plain:
            shutil.copyfileobj(packed, plain, PIECE)
        draft.replace(final)
    except OSError as error:
        draft.unlink(missing_ok=True)
        if disk_trouble(error) is not None:
            raise UserError(f"{path} cannot be unpacked to {cache}: {disk_trouble(error)}. {_CACHE}") from error
        raise UserError(f"{path}: cannot be unpacked ({error}). Replace the file, or take it out.") from error
    except BaseException:  # Ctrl-C, too, must leave no draft
        draft.unlink(missing_ok=True)
        raise
    return final


_CACHE = "Free space there, or set HF_DATASETS_CACHE to another directory."
