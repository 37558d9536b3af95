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


def write_quarantine(file: Path | None, bad: Sequence[BadRow]) -> Path | None:
    """Write the bad rows as JSON lines, whole or not at all; without any, remove the file of an earlier run.

    Returns the file, None when there is none. Errors: UserError when it cannot be written.
    """
    if file is None:
        return None
    try:
        if not bad:
            file.unlink(missing_ok=True)
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)
        # A path or a title may hold what UTF-8 cannot encode.
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(lines)
        draft.replace(file)
    except OSError as error:
        raise UserError(f"the list of bad rows cannot be written to {file}: {error.strerror}.") from error
    return file


def refuse_too_many(
    bad: Sequence[BadRow], *, estimate: float, read: int, config: MUNIChusLoadConfig, file: Path | None
) -> None:
    """Raise UserError when ``estimate`` of ``read`` rows are bad, a larger share than ``max_bad_fraction``."""
    if not bad or estimate <= config.max_bad_fraction * read:
        return
    raise UserError(
        f"{len(bad)} bad rows, about {estimate / read:.1%} of {read}; more than data.max_bad_fraction = "
        f"{config.max_bad_fraction:.1%} stop a run before it starts.\n{first_reasons(bad)}\n"
        + (f"All are in {file}. " if file else "")
        + "Mend them or allow more with --max-bad-fraction."
    )


def first_reasons(bad: Sequence[BadRow]) -> str:
    """Return the first bad rows, one a line."""
    return "\n".join(f"  {row.where}: {row.reason}" for row in bad[:_SHOWN])
