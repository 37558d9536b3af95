"""The folder source: images beside a metadata.csv or metadata.jsonl, whole or in a sub-directory per split."""

import csv
from collections.abc import Iterator
from pathlib import Path

from inft.data.columns import Columns, Record, read_records
from inft.data.images import file_image
from inft.data.jsonl import read_lines
from inft.data.locate import metadata_file, missing_split, require_split_of_file, split_names, tells_split
from inft.data.rows import BadRow, MissingSplit, Row, RowKind
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig


def rows(
    config: MUNIChusLoadConfig, *, location: str, split: str, kind: RowKind = "captions"
) -> Iterator[Row | BadRow]:
    """Yield the rows of a split; metadata in the directory itself is the configured split.

    Errors: MissingSplit without metadata for the split; UserError for a csv that cannot be read.
    """
    file = split_metadata(Path(location), split, own=config.split)
    columns = Columns(config, source=str(file), kind=kind)
    records = read_csv(file, columns) if file.suffix.lower() == ".csv" else read_lines(file, columns)
    yield from read_records(config, records, columns=columns)


def split_metadata(path: Path, split: str, *, own: str) -> Path:
    """Return the metadata file of a split."""
    if path.is_file():
        require_split_of_file(path, split, own=own)
        return path
    whole = split == own and tells_split(path / "metadata", split)
    places = [path / name for name in split_names(split)] + ([path] if whole else [])
    file = next((file for file in map(metadata_file, places) if file is not None), None)
    if file is None:
        available = [child.name for child in sorted(path.iterdir()) if child.is_dir() and metadata_file(child)]
        raise MissingSplit(missing_split(str(path), split, available or ["train"]))
    return file


def read_csv(file: Path, columns: Columns) -> Iterator[Record | BadRow]:
    """Yield a record for each csv line; one with too many or too few fields is a BadRow."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        try:
            for values in reader:
                yield _record(values, f"{file.name} line {reader.line_num}", file.parent, columns)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 near line {reader.line_num + 1}: save it as UTF-8.") from error
        except csv.Error as error:
            raise UserError(f"{file} line {reader.line_num}: {error}. Is a quotation mark unclosed?") from error


def _record(values: dict[str, str], where: str, directory: Path, columns: Columns) -> Record | BadRow:
    # DictReader puts surplus fields under the key None and fills lacking ones with None.
    if None in values:
        return BadRow(where=where, reason="more fields than the header names; is a comma outside quotation marks?")
    if None in values.values():
        return BadRow(where=where, reason="fewer fields than the header names")
    column = columns.find("image", values)
    image = columns.no_image(values) if column is None else file_image(directory, values[column])
    return Record(values=values, image=image, where=where)
