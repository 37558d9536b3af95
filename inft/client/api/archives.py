"""A checkpoint's directory as a tar that is the same, byte for byte, whenever it is asked for."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1024 * 1024  # bytes read at once
END = bytes(2 * BLOCK)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The regular files right below a directory, in the order of their names, without owners and times."""

    members: tuple[tuple[bytes, Path, int], ...]  # header, file, bytes

    @classmethod
    def of(cls, directory: Path) -> "Archive":
        """Return the archive of a directory, whose files must not change any more; reads no contents."""
        files = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.is_symlink()]
        return cls(members=tuple((_header(path), path, path.stat().st_size) for path in files))

    @property
    def size(self) -> int:
        """The bytes of the whole tar."""
        return sum(len(header) + size + _padding(size) for header, _, size in self.members) + len(END)

    def chunks(self) -> Iterator[bytes]:
        """Yield the tar. Errors: OSError where a file has another size than before."""
        for header, path, size in self.members:
            yield header
            with path.open("rb") as file:
                left = size
                while left:
                    chunk = file.read(min(CHUNK, left))
                    if not chunk:
                        raise OSError(f"{path} is shorter than it was")
                    left -= len(chunk)
                    yield chunk
            yield bytes(_padding(size))
        yield END


def _header(path: Path) -> bytes:
    member = tarfile.TarInfo(path.name)
    member.size, member.mode = path.stat().st_size, 0o644
    return member.tobuf(format=tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % BLOCK
