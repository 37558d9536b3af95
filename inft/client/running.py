"""Which operation is running, in a file: so that a start can tell which one the process before it ended in.

No transaction and no waiting for the disk: what a killed process wrote is there, and after a power cut nothing is
concluded.
"""

import os
import re
from pathlib import Path

FILE = "running"
_LENGTH = 64  # bytes: an id, filled up with spaces
_ID = re.compile(r"fut-[0-9a-f]{24}")


class Running:
    """The file in a state directory."""

    def __init__(self, directory: Path) -> None:
        self._handle = os.open(directory / FILE, os.O_RDWR | os.O_CREAT, 0o600)

    def left_over(self) -> str | None:
        """Return the operation that a process ended in; None where it ended in none."""
        found = _ID.fullmatch(os.pread(self._handle, _LENGTH, 0).decode("ascii", "replace").strip())
        return None if found is None else found[0]

    def set(self, operation_id: str | None) -> None:
        """Take note of the operation that begins, or of none."""
        os.pwrite(self._handle, (operation_id or "").ljust(_LENGTH).encode(), 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)
