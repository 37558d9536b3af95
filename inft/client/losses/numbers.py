"""Numbers as users send them, nested lists, arrays or tensors, checked row by row before they become tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from params.errors import UserError

MOST_AXES = 4  # of an extra: [B, T, V] is the deepest that a built-in loss takes
INT64 = 2**63
SHOWN = 60  # characters of a wrong value in a message


def as_list(value: Any) -> Any:
    """Return arrays and tensors, and those within a list of rows, as lists; everything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_list(item) if hasattr(item, "tolist") or isinstance(item, tuple) else item for item in value]
    return value


def shown(value: Any) -> str:
    """Return a value for a message: its beginning, where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 3 * SHOWN:
        return f"a whole number of {value.bit_length()} bits"  # Python refuses to write very long ones out
    if isinstance(value, (list, Mapping)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:SHOWN]) if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}…"


def token_tensor(name: str, value: Any, *, like: Tensor | None = None, allow_bool: bool = False) -> Tensor:
    """Return rows of whole numbers as an int64 tensor [B, T], all as long as the first, or of the shape of `like`.

    A number that no int64 holds becomes the largest or smallest: it is outside every range that is asked for later.
    Errors: UserError with the field, row and position for anything else, and without any row or token.
    """
    rows = as_list(value)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise UserError(f"{name}: expected a list of rows, each a list of whole numbers, such as [[5, 7], [6, 2]].")
    if like is not None and len(rows) != len(like):
        raise UserError(f"{name} has {len(rows)} rows and input_ids {len(like)}: give as many.")
    wanted = len(rows[0]) if like is None else like.shape[1]
    kinds: set[type] = {int, bool} if allow_bool else {int}
    for number, row in enumerate(rows):
        if len(row) != wanted or not row:
            other = "row 0" if like is None else "that row of input_ids"
            raise UserError(f"{name}: row {number} has {len(row)} values and {other} {wanted}: pad the rows equally.")
        if not set(map(type, row)) <= kinds:
            rows[number] = [_whole(name, item, number, position, kinds) for position, item in enumerate(row)]
    try:
        return torch.from_numpy(np.array(rows, dtype=np.int64))
    except OverflowError:
        limits = np.iinfo(np.int64)
        return torch.tensor([[min(max(item, limits.min), limits.max) for item in row] for row in rows])


def _whole(name: str, item: Any, row: int, position: int, kinds: set[type]) -> int:
    plain = item.item() if isinstance(item, np.generic) else item
    if type(plain) not in kinds:
        raise UserError(f"{name}: row {row}, position {position} is {shown(item)}: give a whole number.")
    return int(plain)


def number_tensor(name: str, value: Any, *, rows: int) -> Tensor:
    """Return an extra of the batch as a tensor with `rows` entries: int64 where all are whole numbers, else float32.

    A tensor keeps its dtype. Errors: UserError with the field and the row for other types than
    numbers, for entries that are ragged or not finite, and for another number of rows.
    """
    if not isinstance(value, Tensor):
        value = _tensor(name, as_list(value))
    if value.ndim == 0 or len(value) != rows:
        given = "one number" if value.ndim == 0 else f"{len(value)} entries"
        raise UserError(f"{name}: {given} for {rows} rows: give one entry for each row.")
    if value.is_complex():
        raise UserError(f"{name} is of {value.dtype}: give real numbers.")
    finite_B = value.isfinite().reshape(rows, -1).all(1)
    if not bool(finite_B.all()):
        raise UserError(f"{name}: row {int((~finite_B).nonzero()[0])} is not finite in {value.dtype}: give numbers.")
    return value.detach().cpu()


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: expected a list with one entry for each row, numbers or lists of numbers.")
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # ragged or too deep, which the search below finds
        array = np.array(None)
    # numpy makes floats of whole numbers above 64 bits, which would make one of two ids.
    exact = array.dtype.kind in "bi" or (array.dtype.kind == "f" and bool((np.abs(array) < INT64).all()))
    if not exact or array.ndim > MOST_AXES:
        _require_numbers(name, value)
    return torch.from_numpy(array).to(torch.float32 if array.dtype.kind == "f" else torch.int64)


def _require_numbers(name: str, rows: list[Any]) -> None:
    """Raise a UserError for the first row that is nested too deep or ragged, or holds what is no number."""
    shape = _shape(rows[0])
    for number, row in enumerate(rows):
        own = _shape(row)
        if len(own) >= MOST_AXES:
            raise UserError(f"{name}: row {number} is {MOST_AXES} or more lists deep: give at most {MOST_AXES - 1}.")
        if own != shape or -1 in own:
            given, first = _words(own), _words(shape)
            raise UserError(f"{name}: row {number} is {given} and row 0 {first}: pad the rows equally, with numbers.")
        for item in _flat(row):
            fits = isinstance(item, float) or (isinstance(item, int) and -INT64 <= item < INT64)
            if not fits:
                raise UserError(f"{name}: row {number} holds {shown(item)}: give numbers of at most 64 bits.")


def _shape(row: Any, most: int = MOST_AXES) -> tuple[int, ...]:
    """The lengths of nested lists, to a depth of `most`; () for a number, and -1 in it where lists are ragged."""
    if not isinstance(row, list) or not most:
        return ()
    inner = {_shape(item, most - 1) for item in row}
    return (len(row), *(inner.pop() if len(inner) == 1 else ((-1,) if inner else ())))


def _words(shape: tuple[int, ...]) -> str:
    if -1 in shape:
        return "ragged"
    return f"{' x '.join(map(str, shape))} values" if shape else "one value"


def _flat(row: Any) -> Iterator[Any]:
    if not isinstance(row, list):
        yield row
        return
    for part in row:
        yield from _flat(part)
