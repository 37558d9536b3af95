"""Numbers as users send them, nested lists, arrays or tensors, checked row by row before they become tensors."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from params.errors import UserError

INT64 = 2**63


def as_list(value: Any) -> Any:
    """Return arrays and tensors, and those within a list of rows, as lists; everything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_list(item) if hasattr(item, "tolist") or isinstance(item, tuple) else item for item in value]
    return value


def token_rows(
    name: str, value: Any, *, like: Sequence[Sequence[int]] | None = None, allow_bool: bool = False
) -> list[list[int]]:
    """Return rows of whole numbers, all as long as the first, or as the row of `like` (of input_ids) at their place.

    Errors: UserError with the field, row and position for anything else, and without any row or token.
    """
    rows = as_list(value)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise UserError(f"{name}: expected a list of rows, each a list of whole numbers, such as [[5, 7], [6, 2]].")
    if like is not None and len(rows) != len(like):
        raise UserError(f"{name} has {len(rows)} rows and input_ids {len(like)}: give as many.")
    kinds = (int, bool) if allow_bool else (int,)
    for number, row in enumerate(rows):
        wanted = len(rows[0] if like is None else like[number])
        if len(row) != wanted or not row:
            other = "row 0" if like is None else "that row of input_ids"
            raise UserError(f"{name}: row {number} has {len(row)} values and {other} {wanted}: pad the rows equally.")
        for position, item in enumerate(row):
            if type(item) not in kinds:
                raise UserError(f"{name}: row {number}, position {position} is {item!r}: give a whole number.")
    return [[int(item) for item in row] for row in rows]


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
    finite_B = value.isfinite().reshape(rows, -1).all(1)
    if not bool(finite_B.all()):
        raise UserError(f"{name}: row {int((~finite_B).nonzero()[0])} is not finite: give numbers.")
    return value.detach().cpu()


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: expected a list with one entry for each row, numbers or lists of numbers.")
    shape = _shape(value[0])
    for number, row in enumerate(value):
        if _shape(row) != shape:
            given, first = _words(_shape(row)), _words(shape)
            raise UserError(f"{name}: row {number} is {given} and row 0 {first}: pad the rows equally, with numbers.")
        if None in _flat(row):
            raise UserError(f"{name}: row {number} holds what is no number of 64 bits: give numbers.")
    numbers = list(chain.from_iterable(_flat(row) for row in value))
    whole = all(isinstance(item, int) for item in numbers)
    return torch.tensor(numbers, dtype=torch.int64 if whole else torch.float32).reshape(len(value), *shape)


def _shape(row: Any) -> tuple[int, ...]:
    """The lengths of nested lists; () for a number, and (-1,) somewhere in it where the lists within are ragged."""
    if not isinstance(row, list):
        return ()
    inner = {_shape(item) for item in row}
    return (len(row), *(inner.pop() if len(inner) == 1 else ((-1,) if inner else ())))


def _words(shape: tuple[int, ...]) -> str:
    if -1 in shape:
        return "ragged"
    return f"{' x '.join(map(str, shape))} values" if shape else "one value"


def _flat(row: Any) -> list[Any]:
    """The numbers of nested lists in order; None in the place of what is no number, or a whole one above 64 bits."""
    if isinstance(row, list):
        return [item for part in row for item in _flat(part)]
    if isinstance(row, bool):
        return [int(row)]
    fits = isinstance(row, float) or (isinstance(row, int) and -INT64 <= row < INT64)
    return [row if fits else None]
