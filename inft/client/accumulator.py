"""The gradient of the forward passes since the last step, put together as if they had been one batch."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from inft.client.errors import InvalidRequest
from inft.client.losses.inputs import Unit
from inft.client.state import check_like, whole_number
from params.errors import UserError


class Accumulator:
    """Σ gradient·denominator / Σ denominator for losses that are means, plain sums for losses that are sums.

    A single gradient is kept as it came: a step of one forward pass is that of a plain PyTorch loop, bit by bit.
    """

    def __init__(self) -> None:
        self.count = 0  # forward passes
        self.rows = 0  # of all of them
        self._denominator: int | None = None  # sum of them; None for sums
        self._unit: Unit | None = None  # what they count
        self._totals: dict[str, Tensor] = {}  # of one mean: itself; of more: gradient·denominator
        self._norm: float | None = None

    def check(self, denominator: int | None, unit: Unit = "tokens") -> None:
        """Raise InvalidRequest unless a gradient of such a loss can be added to those that are there."""
        if denominator is not None and denominator < 1:
            raise InvalidRequest(f"the loss gave the denominator {denominator}: give 1 or more, or None for a sum.")
        kind = None if denominator is None else unit
        if self.count and kind != self._unit:
            raise InvalidRequest(
                f"this loss is a {_named(kind)}, and the gradient accumulated so far is of a {_named(self._unit)}: "
                "they have no common scale. Take an optim_step in between, or use losses of one kind."
            )

    def add(
        self,
        gradients: Mapping[str, Tensor],
        denominator: int | None,
        unit: Unit = "tokens",
        *,
        rows: int,
        norm: float | None = None,
    ) -> None:
        """Add the gradient of one forward pass, of that norm if known; parameters it did not reach are left out."""
        self.check(denominator, unit)
        self._norm = None if self.count else norm
        if denominator is not None and self.count:
            assert self._denominator is not None
            if self.count == 1:
                self._totals = {name: total * self._denominator for name, total in self._totals.items()}
            gradients = {name: gradient * denominator for name, gradient in gradients.items()}
        for name, gradient in gradients.items():
            before = self._totals.get(name)
            self._totals[name] = gradient if before is None else before + gradient
        if denominator is not None:
            self._denominator, self._unit = (self._denominator or 0) + denominator, unit
        self.count += 1
        self.rows += rows

    @property
    def scale(self) -> float:
        """What the totals are to be divided by."""
        return 1.0 if self._denominator is None or self.count < 2 else float(self._denominator)

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient that a step applies."""
        if self.scale == 1:
            return dict(self._totals)
        return {name: total / self.scale for name, total in self._totals.items()}

    def norm(self) -> float:
        """Return the L2 norm of that gradient over all parameters."""
        if self._norm is None:
            self._norm = total_norm(self._totals.values()) / self.scale
        return self._norm

    def clear(self) -> None:
        """Begin anew."""
        self.count, self.rows, self._denominator, self._unit, self._totals, self._norm = 0, 0, None, None, {}, None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the totals, and the values that go with them."""
        return dict(self._totals), {
            "accumulated": self.count,
            "rows": self.rows,
            "denominator": self._denominator,
            "unit": self._unit,
        }

    def load(self, totals: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave. Errors: UserError for values that are none."""
        count, rows = whole_number(values, "accumulated"), whole_number(values, "rows")
        denominator = None if values.get("denominator") is None else whole_number(values, "denominator")
        unit = values.get("unit")
        known = unit in get_args(Unit) if denominator is not None else unit is None
        if (count == 0 and totals) or denominator == 0 or not known:
            raise UserError("the stored gradient and its count do not belong together: the state is damaged.")
        self.clear()
        self.count, self.rows, self._denominator, self._unit = count, rows, denominator, unit
        self._totals = dict(totals)


def _named(unit: Unit | None) -> str:
    return "sum" if unit is None else f"mean over {unit}"


def check_totals(totals: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise UserError for a stored gradient of no parameter, or of another shape."""
    for name, total in totals.items():
        if name not in parameters:
            raise UserError(f"the stored gradient of {name} has no parameter here: it is of another adapter.")
        check_like(f"gradient of {name}", total, parameters[name])


def total_norm(tensors: Any) -> float:
    """Return the L2 norm over all tensors together; 0 for none."""
    return float(torch.nn.utils.get_total_norm(list(tensors)))
