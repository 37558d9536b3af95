"""Rows of tables as they are: JSONL, CSV, TSV and parquet files, directories of them, and data sets of the hub."""

import csv
import gzip
import io
import json
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from params.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")  # all but parquet also with .gz
_KINDS = f"{', '.join('*' + suffix for suffix in SUFFIXES)} (all but parquet also as .gz)"
HUB = "hub:"
OTHER_COMMAND = re.compile(r"--(?:data|model|demo|set)\b")  # flags of inft, whose reader of the hub is used here
CONNECT_SECONDS = 30.0
NOT_FOUND = 404
_BROKEN = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A row before its values are looked at."""

    values: Mapping[str, Any]
    where: str  # "train.jsonl line 17"


def read_records(location: str, *, split: str = "train") -> Iterator[Record]:
    """Yield the rows of a file, of a directory's files by name, or of ``hub:OWNER/NAME[:CONFIG]``.

    ``split`` is that of a hub data set; a file is read whole.
    Errors: UserError for what is not there or of another kind, and naming file and line for what cannot be read.
    """
    if location.startswith(HUB):
        name, _, config = location.removeprefix(HUB).partition(":")
        yield from hub_records(name, config or None, split=split)
        return
    for file in find_files(location):
        yield from file_records(file)


def find_files(location: str, *, named: re.Pattern[str] | None = None) -> list[Path]:
    """Return the file, or the files of a directory and those below it in the order of their names.

    A table is told by its suffix, or by a name in which ``named`` is found.
    """
    path = Path(location).expanduser()

    def is_table(file: Path) -> bool:
        return table_suffix(file) in SUFFIXES or (named is not None and named.search(file.name) is not None)

    if path.is_file():
        if not is_table(path):
            raise UserError(f"{path} is no table that can be read here. Give {_KINDS}.")
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no file or directory {path}. Give a path to {_KINDS}, or hub:OWNER/NAME.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and is_table(file))
    if not files:
        raise UserError(f"{path} holds no table. Put {_KINDS} there, or give the path of a file.")
    return files


def table_suffix(path: Path) -> str:
    """The suffix that tells a table's kind, in lower case: .jsonl of pairs.jsonl and of pairs.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def file_records(file: Path) -> Iterator[Record]:
    """Yield the rows of one file."""
    suffix = table_suffix(file)
    if suffix == ".parquet":
        yield from _parquet(file)
    elif suffix == ".jsonl":
        yield from _json_lines(file)
    else:
        yield from _columns(file, delimiter="," if suffix == ".csv" else "\t")


def hub_records(name: str, config: str | None, *, split: str) -> Iterator[Record]:
    """Yield the rows of a data set of the hub, downloaded or from the cache; UserError when it is out of reach."""
    from inft.data.hub import hub_tables, pick_split

    try:
        table = pick_split(hub_tables(name, config), split, source=name)
    except UserError as error:
        raise UserError(_in_own_flags(str(error))) from error
    for index, values in enumerate(table):
        yield Record(values=values, where=f"{name} row {index}")


def _in_own_flags(message: str) -> str:
    """A message about the hub with the remedy of this script in place of sentences that name flags of inft."""
    sentences = re.split(r"(?<=\.) (?=[A-Z])| (?=\(--)", message)
    kept = [sentence for sentence in sentences if not OTHER_COMMAND.search(sentence)]
    if kept == sentences:
        return message
    return (
        f"{' '.join(kept).rstrip('.')}. Give hub:OWNER/NAME:CONFIG, or download the rows where there is a network and "
        "give their path: --sources NAME=PATH for pairs, --sft_data PATH or --eval_data PATH for SFT rows."
    )


@contextmanager
def text_of(location: str | Path, *, newline: str = "\n", may_be_missing: bool = False) -> Iterator[TextIO]:
    """Open a text file, gzipped or not, of this machine or of an http(s) address; errors of reading name it.

    With ``may_be_missing`` an address that the server does not know (404) is an empty file.
    """
    try:
        with _opened(location) as binary, _unpacked(binary, location) as plain:
            yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline=newline)
    except _BROKEN as error:
        raise UserError(f"{location} cannot be read ({error}). Is it whole, and UTF-8?") from error
    except urllib.error.HTTPError as error:
        if error.code != NOT_FOUND or not may_be_missing:
            raise UserError(f"{location} cannot be read: the server answers {error.code} {error.reason}.") from error
        yield io.StringIO()
    except OSError as error:
        remedy = " Download it where there is a network, and give its path." if "://" in str(location) else ""
        raise UserError(f"{location} cannot be read: {getattr(error, 'reason', None) or error}.{remedy}") from error


def _opened(location: str | Path) -> Any:
    if "://" in str(location):
        return urllib.request.urlopen(str(location), timeout=CONNECT_SECONDS)
    return Path(location).open("rb")


def _unpacked(binary: Any, location: str | Path) -> Any:
    return gzip.GzipFile(fileobj=binary) if str(location).lower().endswith(".gz") else binary


def _json_lines(file: Path) -> Iterator[Record]:
    with text_of(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}). Mend the line, or remove it.") from error
            if not isinstance(values, dict):
                raise UserError(f"{where} is a JSON {type(values).__name__}. Each line must be an object of columns.")
            yield Record(values=values, where=where)


def _columns(file: Path, *, delimiter: str) -> Iterator[Record]:
    with text_of(file, newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            for fields in rows:
                where = f"{file} line {rows.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{where} has {len(fields)} fields and the header {len(header)}. Quote a field that holds the "
                        "delimiter or a line break, or mend the line."
                    )
                yield Record(values=dict(zip(header, fields, strict=True)), where=where)
        except csv.Error as error:
            raise UserError(f"{file} line {rows.line_num} cannot be read ({error}). Mend its quotes.") from error


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            index = 0
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    yield Record(values=values, where=f"{file} row {index}")
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet ({error}). Is it whole?") from error
