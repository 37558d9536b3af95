"""Files of vectors that grow block by block and appear whole: .npy (numpy's format 1.0) or .parquet.

Axes: B texts, D embedding size.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inft.encoders.outputs import check_output
from inft.training.storage import STAGING, disk_trouble
from params.errors import UserError

ENDINGS = (".npy", ".parquet")
HEADER = 128  # bytes of a .npy header: room for any number of rows


class VectorWriter(Protocol):
    """Takes vectors in order."""

    def write(self, ids: Sequence[int | str], vectors_BD: np.ndarray) -> None:
        """Append rows."""

    def close(self) -> None:
        """Finish the file."""


def check_ending(output: Path) -> None:
    """UserError unless the file's ending says how to write it."""
    if output.suffix not in ENDINGS:
        raise UserError(f"{output}: name it {' or '.join(f'*{ending}' for ending in ENDINGS)}.")


@contextmanager
def open_vectors(output: Path, size: int) -> Iterator[VectorWriter]:
    """Yield a writer into a draft that takes the place of `output` when the block ends well, and goes when it fails."""
    check_ending(output)
    check_output(output, overwrite=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f"{STAGING}{output.name}")
    try:
        writer = NpyWriter(draft, size) if output.suffix == ".npy" else ParquetWriter(draft, size)
        try:
            yield writer
        finally:
            writer.close()
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(output)
    except BaseException as error:  # Ctrl-C, too, must leave no draft
        draft.unlink(missing_ok=True)
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(f"{output} could not be written: {reason}. Free space there or choose another -o.") from error


class NpyWriter:
    """Rows of float32 behind a header that is written last, when their number is known."""

    def __init__(self, file: Path, size: int) -> None:
        self.size = size
        self.rows = 0
        self._file = file.open("wb")
        self._file.write(b"\0" * HEADER)

    def write(self, ids: Sequence[int | str], vectors_BD: np.ndarray) -> None:
        """Append rows; their place in the file is all the id that they have."""
        self._file.write(np.ascontiguousarray(vectors_BD, dtype="<f4").data)
        self.rows += len(vectors_BD)

    def close(self) -> None:
        """Write the header."""
        with self._file as file:
            file.seek(0)
            told = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.size}), }}"
            start = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
            file.write(start + told.ljust(HEADER - 11).encode("latin1") + b"\n")


class ParquetWriter:
    """Columns id (int64, or text where rows have ids) and vector (float32, fixed size)."""

    def __init__(self, file: Path, size: int) -> None:
        self._place = file
        self._vector = pa.list_(pa.float32(), size)
        self._writer: Any = None

    def write(self, ids: Sequence[int | str], vectors_BD: np.ndarray) -> None:
        """Append rows as one row group."""
        kind = pa.string() if isinstance(ids[0], str) else pa.int64()
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._place, pa.schema([("id", kind), ("vector", self._vector)]))
        flat = pa.array(np.ascontiguousarray(vectors_BD, dtype=np.float32).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, type=self._vector)
        self._writer.write_table(pa.table({"id": pa.array(ids, kind), "vector": vectors}))

    def close(self) -> None:
        """Write the footer."""
        if self._writer is not None:
            self._writer.close()
