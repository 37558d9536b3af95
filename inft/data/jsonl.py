"""The jsonl source: one JSON object a line, images as paths beside the file."""

import json
from collections.abc import Iterator
from pathlib import Path

from inft.data.columns import Columns, Record, read_records
from inft.data.images import file_image
from inft.data.locate import known_split, missing_split, require_split_of_file, split_names, tells_split
from inft.data.rows import BadRow, MissingSplit, Row, RowKind
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig


def rows(
    config: MUNIChusLoadConfig, *, location: str, split: str, kind: RowKind = "captions"
) -> Iterator[Row | BadRow]:
    """Yield the rows of a split of a directory, or of a file, which is the configured split and no other.

    Errors: MissingSplit without a file for the split; UserError when no line has a column that such rows need.
    """
    file = split_file(Path(location), split, own=config.split)
    columns = Columns(config, source=str(file), kind=kind)
    yield from read_records(config, read_lines(file, columns), columns=columns)


def split_file(path: Path, split: str, *, own: str) -> Path:
    """Return the file that holds a split: train.jsonl, or for ``own`` a directory's only other jsonl file."""
    if path.is_file():
        require_split_of_file(path, split, own=own)
        return path
    files = sorted(path.glob("*.jsonl"))
    for name in split_names(split):
        if (path / f"{name}.jsonl").is_file():
            return path / f"{name}.jsonl"
    others = [file for file in files if not known_split(file.stem)]
    if split != own or not others:
        raise MissingSplit(missing_split(str(path), split, [file.stem for file in files]))
    if len(others) > 1 and path / "captions.jsonl" not in others:
        raise UserError(f"{path} has several jsonl files ({', '.join(o.name for o in others)}): name one with --data.")
    file = path / "captions.jsonl" if path / "captions.jsonl" in others else others[0]
    if not tells_split(file, split):
        raise MissingSplit(missing_split(str(path), split, [file.stem for file in files]))
    return file


def read_lines(file: Path, columns: Columns) -> Iterator[Record | BadRow]:
    """Yield a record for each line that is not blank; a line that is no JSON object is a BadRow."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _record(line, f"{file.name} line {number}", file.parent, columns)


def _record(line: bytes, where: str, directory: Path, columns: Columns) -> Record | BadRow:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(where=where, reason=f"not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRow(where=where, reason=f"not JSON ({error})")
    if not isinstance(values, dict):
        return BadRow(where=where, reason=f"a JSON {type(values).__name__}, not an object")
    column = columns.find("image", values)
    image = columns.no_image(values) if column is None else file_image(directory, values[column])
    return Record(values=values, image=image, where=where)
