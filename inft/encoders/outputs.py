"""Where results go: checked before the work, written whole."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inft.training.storage import disk_trouble, write_text
from params.errors import UserError


def check_output(output: Path, *, overwrite: bool) -> None:
    """UserError where a file cannot be written, or is there already and may not be replaced."""
    if output.is_dir():
        raise UserError(f"{output} is a directory: name a file in it, such as {output / 'name'}{output.suffix}.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: give --overwrite to replace it, or another -o.")
    above = next(place for place in output.absolute().parents if place.exists())
    if not above.is_dir():
        raise UserError(f"{output} cannot be written: {above} is a file, not a directory. Choose another -o.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{output} cannot be written: writing in {above} is not permitted. Choose another -o.")


def write_json(output: Path, value: Any) -> None:
    """Write JSON, whole or not at all; numbers that JSON does not have (nan, inf) are null.

    Errors: UserError for want of space or permission.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(_plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(f"{output} could not be written: {reason}. Free space there or choose another -o.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
