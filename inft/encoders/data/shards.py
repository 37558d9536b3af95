"""One file or table of documents: how many rows it has, and how any of them are read.

The main process opens a shard and learns where its rows are; workers are told places and read them. Lines of text
files are in lines.py.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from inft.data.hub import import_datasets
from params.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

Columns = Mapping[str, Sequence[Any]]  # column -> a value of each row
GROUP_BYTES = 256 * 2**20  # decoded row groups that a process keeps; the last one stays, however large
SAMPLE_BYTES = 2**16  # at both ends of a file, hashed into its description
SAMPLE_ROWS = 16  # likewise of a table


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """Where the rows of a shard are."""

    count: int
    spans_R2: np.ndarray | None = None  # int64: first byte and end of each row; none: a row's number is its place
    bounds: np.ndarray | None = None  # int64: where row groups end; a window of rows should not cut one

    def places(self, rows: np.ndarray) -> np.ndarray:
        """What ``Shard.read`` takes for rows of these numbers."""
        return rows if self.spans_R2 is None else self.spans_R2[rows]


class Unreadable(NamedTuple):
    """What a shard gives in place of the text of a row that it cannot read."""

    reason: str


class Shard(Protocol):
    """A part of a data set; one object serves every process."""

    @property
    def name(self) -> str:
        """Its name within the data set, the same wherever the data set lies."""

    @property
    def remote(self) -> bool:
        """Whether every read goes over a network."""

    def open(self) -> ShardRows:
        """Find the rows; UserError when the shard is corrupt."""

    def columns(self) -> tuple[str, ...] | None:
        """The columns that all rows have; None when each row has its own. Only of a shard that has rows."""

    def columns_of(self, places: np.ndarray) -> tuple[str, ...]:
        """The columns that any of the rows at places has; UserError when none of them can be read."""

    def read(self, places: np.ndarray, columns: Sequence[str]) -> Columns:
        """Return these columns of the rows at places, in their order.

        A corrupt row has Unreadable in the first column. Errors: UserError when more than single rows are corrupt.
        """

    def where(self, place: Any) -> str:
        """Words that lead a user to the row at one place."""

    def description(self) -> dict[str, Any]:
        """Size and a hash of samples of the content: json-able, and equal only for equal content in practice."""


@dataclass(frozen=True)
class ParquetShard:
    """A parquet file, on this machine or on any file system that fsspec knows (``hf://``, ``s3://`` …)."""

    name: str
    url: str

    @property
    def remote(self) -> bool:
        """Whether every read goes over a network."""
        return is_remote(self.url)

    def open(self) -> ShardRows:
        """Read the footer."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return ShardRows(count=metadata.num_rows, bounds=np.cumsum(sizes, dtype=np.int64))

    def columns(self) -> tuple[str, ...]:
        """The names in the footer."""
        return tuple(self._file.schema_arrow.names)

    def columns_of(self, places: np.ndarray) -> tuple[str, ...]:
        """Those of all rows."""
        return self.columns()

    def read(self, places: np.ndarray, columns: Sequence[str]) -> Columns:
        """Decode the row groups that the rows are in, unless this process still has them."""
        bounds = self.open().bounds
        assert bounds is not None
        group_R = np.searchsorted(bounds, places, side="right")
        found: dict[str, list[Any]] = {column: [None] * len(places) for column in columns}
        for group in np.unique(group_R).tolist():
            table = _GROUPS.get(self, group, tuple(columns))
            at = np.flatnonzero(group_R == group)
            first = int(bounds[group - 1]) if group else 0
            for column, values in table.take(places[at] - first).to_pydict().items():
                for row, value in zip(at.tolist(), values, strict=True):
                    found[column][row] = value
        return found

    def read_group(self, group: int, columns: tuple[str, ...]) -> "pa.Table":
        """Decode columns of one row group; UserError naming it when it is corrupt."""
        import pyarrow as pa

        try:
            return self._file.read_row_group(group, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.url}: row group {group} cannot be read ({error}). {_REPLACE}") from error

    def where(self, place: Any) -> str:
        """File and row, from 0."""
        return f"{self.url} row {int(place)}"

    def description(self) -> dict[str, Any]:
        """Bytes, rows, and a hash: of samples of a local file, of a remote one the tag that its host gives."""
        rows = self._file.metadata.num_rows
        if not self.remote:
            return {"rows": rows, **file_sample(Path(self.url))}
        filesystem, path = url_filesystem(self.url)
        info = filesystem.info(path)
        tag = next((str(info[key]) for key in ("etag", "ETag", "blob_id", "sha") if info.get(key)), "")
        return {"rows": rows, "bytes": info.get("size"), "sample": tag}

    @property
    def _file(self) -> "pq.ParquetFile":
        return _parquet_file(self.url, os.getpid())  # a handle must not be shared with a forked worker


_REPLACE = "Replace the file, or take it out of the data set."


@lru_cache(maxsize=4)
def _parquet_file(url: str, _process: int) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not is_remote(url):
            return pq.ParquetFile(url, memory_map=True)
        filesystem, path = url_filesystem(url)
        return pq.ParquetFile(filesystem.open(path, "rb"))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{url}: cannot be read as parquet ({error}). {_REPLACE}") from error


class _GroupCache:
    """The row groups that a process decoded last."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Any, ...], pa.Table] = OrderedDict()

    def get(self, shard: ParquetShard, group: int, columns: tuple[str, ...]) -> "pa.Table":
        key = (shard.url, group, columns)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        table = self._held[key] = shard.read_group(group, columns)
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > GROUP_BYTES:
            self._held.popitem(last=False)
        return table


_GROUPS = _GroupCache()


@dataclass(frozen=True)
class TableShard:
    """A memory-mapped table of the datasets library."""

    name: str
    path: str  # for messages: file, directory or hub id
    table: "Dataset" = field(compare=False, repr=False)
    remote: bool = False

    def open(self) -> ShardRows:
        """The length is known."""
        return ShardRows(count=len(self.table))

    def columns(self) -> tuple[str, ...]:
        """The table's."""
        return tuple(self.table.column_names)

    def columns_of(self, places: np.ndarray) -> tuple[str, ...]:
        """Those of all rows."""
        return self.columns()

    def read(self, places: np.ndarray, columns: Sequence[str]) -> Columns:
        """Fetch the rows; lists of numbers come as numpy arrays."""
        import pyarrow as pa

        try:
            rows = self._of(tuple(columns))[places.tolist()]
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: its rows cannot be read ({error}). {_REPLACE}") from error
        return {column: _values(rows.column(column)) for column in columns}

    def where(self, place: Any) -> str:
        """Table and row, from 0."""
        return f"{self.path} row {int(place)}"

    def description(self) -> dict[str, Any]:
        """Rows, columns and a hash of the first and the last rows."""
        count = len(self.table)
        rows = [*range(min(count, SAMPLE_ROWS)), *range(max(0, count - SAMPLE_ROWS), count)]
        sample = repr(self._of(tuple(self.table.column_names))[rows].to_pylist()) if rows else ""
        return {
            "rows": count,
            "columns": self.table.column_names,
            "sample": hashlib.sha256(sample.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        }

    def _of(self, columns: tuple[str, ...]) -> "Dataset":
        if columns not in self._views:
            self._views[columns] = self.table.select_columns(list(columns)).with_format("arrow")
        return self._views[columns]

    @cached_property
    def _views(self) -> dict[tuple[str, ...], "Dataset"]:
        return {}


def _values(column: "pa.ChunkedArray") -> Sequence[Any]:
    import pyarrow as pa

    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return column.to_pylist()
    whole = column.combine_chunks()
    return [None if row is None else row.values.to_numpy(zero_copy_only=False) for row in whole]


def open_arrow(path: Path) -> "Dataset":
    """Map an arrow file into memory; UserError when it is none."""
    import pyarrow as pa

    try:
        return import_datasets().Dataset.from_file(str(path))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read as an arrow file ({error}). {_REPLACE}") from error


def file_sample(path: Path) -> dict[str, Any]:
    """Bytes of a file, and the hash of its beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "sample": digest.hexdigest()[:16]}


def is_remote(location: str) -> bool:
    """Whether a location names a protocol, such as ``s3://bucket/file``."""
    return "://" in location


def url_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it; UserError when its package is missing."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from error
