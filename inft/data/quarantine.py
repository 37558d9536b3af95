"""Bad rows: written to a file with their reasons, and too many of them stop the run."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from inft.data.rows import BadRow
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

_SHOWN = 3  # reasons that an error message quotes


def write_quarantine(file: Path, bad: Sequence[BadRow]) -> None:
    """List the bad rows as JSON lines, whole or not at all; without any, remove the list of an earlier run.

    Errors: UserError when the file cannot be written and, with bad rows, when it holds something else.
    """
    if bad:
        refuse_foreign(file)
    try:
        if bad:
            _replace(file, bad)
        elif _is_ours(file):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(file, error) from error


def _replace(file: Path, bad: Sequence[BadRow]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)
    # A path or a title may hold what UTF-8 cannot encode.
    with draft.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.writelines(lines)
    draft.replace(file)


def refuse_foreign(file: Path) -> None:
    """Raise UserError when a file exists that write_quarantine did not write."""
    try:
        ours = _is_ours(file)
    except OSError as error:
        raise _not_written(file, error) from error
    if not ours:
        raise UserError(
            f"the bad rows would be listed in {file}, but what it holds was not written by inft: move it, or choose "
            "another --output-dir."
        )


def _is_ours(file: Path) -> bool:
    """Whether nothing would be lost with the file: it does not exist, is empty or lists bad rows."""
    try:
        with file.open("rb") as lines:
            first = lines.readline()
    except FileNotFoundError:
        return True
    if not first:
        return True
    try:
        values = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"where", "reason"} <= values.keys()


def _not_written(file: Path, error: OSError) -> UserError:
    return UserError(f"the list of bad rows cannot be written to {file}: {error.strerror}.")


def refuse_too_many(
    bad: Sequence[BadRow], *, estimate: float, read: int, config: MUNIChusLoadConfig, file: Path | None
) -> None:
    """Raise UserError when ``estimate`` of ``read`` rows are bad, a larger share than ``max_bad_fraction``.

    They are written to ``file`` first.
    """
    if not bad or estimate <= config.max_bad_fraction * read:
        return
    if file is not None:
        write_quarantine(file, bad)
    raise UserError(
        f"{len(bad)} bad rows, about {estimate / read:.1%} of {read}; more than data.max_bad_fraction = "
        f"{config.max_bad_fraction:.1%} stop a run before it starts.\n{first_reasons(bad)}\n"
        + (f"All are in {file}. " if file else "")
        + "Mend them or allow more with --max-bad-fraction."
    )


def first_reasons(bad: Sequence[BadRow]) -> str:
    """Return the first bad rows, one a line."""
    return "\n".join(f"  {row.where}: {row.reason}" for row in bad[:_SHOWN])
