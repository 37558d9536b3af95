"""Directories that appear whole or not at all, their checksums, and what is said when the disk is full."""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from params.errors import UserError

BEST_FILE = "best.json"  # beside a stored adapter: which step it is of and why
STATE_FILE = "state.json"  # of a checkpoint of the training client: all but the tensors, and the files' SHA-256
STAGING = ".inft-staging-"  # prefix of a directory that is being written; left over only by a killed run
PREVIOUS = ".inft-previous-"  # prefix of a directory on its way out
RESUME = "Free space there (or lower sft.save_total_limit), then run the same command with --resume."
_DISK_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not grow that large",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
}


@contextmanager
def locked(directory: Path, *, doing: str = "training into", setting: str = "--output-dir") -> Iterator[None]:
    """Hold a directory for this process; UserError when another one does. The lock ends with the process."""
    handle = os.open(directory, os.O_RDONLY)
    with ExitStack() as stack:
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is {doing} {directory}. Wait for it, stop it, or choose another {setting}."
            ) from error
        held = True
        # Workers inherit the handle and outlive a killed run by seconds: they must not hold the directory on.
        os.register_at_fork(after_in_child=lambda: os.close(handle) if held else None)
        try:
            yield
        finally:
            held = False


@contextmanager
def staged(final: Path, *, what: str, remedy: str = RESUME) -> Iterator[Path]:
    """Yield a new directory beside ``final``; when the block ends well it takes the place of ``final`` at once.

    A reader of ``final`` sees the old content or the new, whole. If the block fails, ``final`` is untouched and
    what was written is removed; a full disk is a UserError that names ``what`` and the ``remedy``.
    """
    final = final.resolve()  # where a link points, often to a larger disk, and not the link itself
    staging = final.parent / f"{STAGING}{final.name}"
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        yield staging
        sync_tree(staging)
        _take_place(staging, final)
    except BaseException as error:  # Ctrl-C, too, must leave no half-written directory
        shutil.rmtree(staging, ignore_errors=True)
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(
            f"{what} could not be saved to {final}: {reason}. What was saved before is intact. {remedy}"
        ) from error


def disk_trouble(error: BaseException) -> str | None:
    """Why a write failed for want of space or permission; torch and safetensors wrap the system's error."""
    if isinstance(error, OSError):
        return _DISK_ERRNOS.get(error.errno or 0)
    if not isinstance(error, (SafetensorError, RuntimeError)):
        return None
    text = str(error)
    for code, reason in _DISK_ERRNOS.items():
        if os.strerror(code) in text or f"os error {code}" in text:
            return reason
    if "PytorchStreamWriter failed writing" in text or "unexpected pos" in text:
        return "torch could not write the file, most likely for want of space"
    return None


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """Remove what a killed run left half-written in ``directory``; put back what it was about to replace.

    ``name`` limits this to one final name, where the directory may hold the files of other runs too.
    """
    for path in directory.glob(f"{PREVIOUS}{name}"):
        final = directory / path.name.removeprefix(PREVIOUS)
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)
    for path in directory.glob(f"{STAGING}{name}"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with what is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a run killed meanwhile, finds the old text or the new, whole."""
    draft = path.with_name(f"{STAGING}{path.name}")
    try:
        draft.write_text(text, encoding="utf-8")
        _sync(draft)
        draft.replace(path)
    except BaseException:  # Ctrl-C, too, must leave no draft
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(directory: Path) -> None:
    """Wait until every file below ``directory``, and the directories themselves, are on the disk."""
    for path in [directory, *directory.rglob("*")]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(staging: Path, final: Path) -> None:
    """Rename ``staging`` to ``final``; an existing ``final`` is swapped out in one step where the system can."""
    if not final.exists():
        staging.rename(final)
    elif _exchange(staging, final):
        shutil.rmtree(staging)
    else:
        # Without an atomic exchange `final` is missing for the moment between two renames; a run that is killed in
        # that moment is mended by remove_leftovers.
        previous = final.parent / f"{PREVIOUS}{final.name}"
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
        staging.rename(final)
        shutil.rmtree(previous)
    _sync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically (renameat2 of Linux); False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
