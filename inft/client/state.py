"""All that a client's training has changed: tensors by name, and plain values that JSON takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from params.errors import UserError

ADAPTER, OPTIMIZER, GRADIENT = "adapter.", "optimizer.", "gradient."  # prefixes of the tensors' names


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """The state of one client between two operations; training goes on from it bit by bit."""

    tensors: Mapping[str, Tensor]  # on the CPU: adapter.KEY, optimizer.FIELD.KEY, gradient.KEY
    values: Mapping[str, Any]  # step, passes, accumulated, rows, denominator, unit, private


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU with the prefix before each name."""
    return {f"{prefix}{name}": tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def whole_number(values: Mapping[str, Any], name: str) -> int:
    """Return a count that was read from a file. Errors: UserError for what is no whole number of 0 or more."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"the stored {name} is {value!r:.40}, not a whole number of 0 or more: the state is damaged.")
    return value


def check_like(name: str, stored: Tensor, wanted: Tensor) -> None:
    """Raise UserError unless a stored tensor has the shape and dtype of the one it is to become."""
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
        raise UserError(
            f"the stored {name} is {stored.dtype} of shape {list(stored.shape)}, and {wanted.dtype} of shape "
            f"{list(wanted.shape)} is needed: it is of another adapter."
        )


def finite_or_none(value: float) -> float | None:
    """Return the number, or None for an infinite one, which JSON has no word for."""
    return value if math.isfinite(value) else None
