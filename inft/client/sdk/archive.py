"""A checkpoint that comes from elsewhere: a tar unpacked into an empty directory and nowhere else, and its check."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from inft.client.errors import InternalError
from inft.client.manifest import content_hash
from inft.training.storage import STATE_FILE, file_sha256


class _Stream:
    """Chunks of bytes as a file that is read from front to back."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


def unpack(chunks: Iterator[bytes], directory: Path) -> None:
    """Write the files of a tar into `directory` as its bytes come.

    Errors: InternalError for a damaged tar, and for a member that is no regular file right below it.
    """
    try:
        with tarfile.open(fileobj=_Stream(chunks), mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                _require_plain(member, directory)
                file = archive.extractfile(member)
                assert file is not None, member.name
                with (directory / member.name).open("xb") as target:
                    shutil.copyfileobj(file, target)
    except tarfile.TarError as error:
        raise InternalError(f"the checkpoint that the service sent is damaged ({error}): pull it again.") from error


def check_content(directory: Path, wanted: str) -> None:
    """Raise InternalError, with the file, unless a checkpoint's files are those of the content hash `wanted`."""
    try:
        stored = json.loads((directory / STATE_FILE).read_bytes())
        claimed, files = stored.pop("content_hash"), dict(stored["files"])
        found = content_hash(stored)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(STATE_FILE) from error
    if not claimed == found == wanted:
        raise _damaged(STATE_FILE)
    for path in sorted(directory.iterdir()):
        if path.name != STATE_FILE and files.pop(path.name, None) != file_sha256(path):
            raise _damaged(path.name)
    if files:
        raise _damaged(next(iter(files)))


def _damaged(name: str) -> InternalError:
    return InternalError(f"{name} of the checkpoint is missing or not as it was written: pull it again.")


def _require_plain(member: tarfile.TarInfo, directory: Path) -> None:
    name = member.name
    plain = PurePosixPath(name).name == name and name not in ("", ".", "..") and not set(name) & {"\\", "\0"}
    if not (plain and member.isreg()) or (directory / name).exists():
        raise InternalError(f"the checkpoint that the service sent holds {name!r}, no new plain file: it is not kept.")
