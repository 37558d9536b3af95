"""Means over a logging window, exact over micro-batches of different size and over processes."""

from collections.abc import Mapping

import torch

from craft.distributed import sum_over_ranks


class Meter:
    """Sums of weighted values by name; what was never added has no mean, so that no mean is NaN."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, torch.Tensor] = {}  # name -> (weighted sum, weight), float64

    def add(self, name: str, total: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """Add ``total``, the sum of values that weigh ``weight`` together."""
        pair = torch.stack(
            [torch.as_tensor(value).detach().to(self.device, torch.float64) for value in (total, weight)]
        )
        pair = torch.where(pair.isfinite().all(), pair, 0.0)  # one overflow must not be all that a window shows
        before = self._sums.get(name)
        self._sums[name] = pair if before is None else before + pair

    def totals(self, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        """Sum and weight of each name over all ranks; every rank must ask for the same names."""
        zero = torch.zeros(2, dtype=torch.float64, device=self.device)
        stacked = sum_over_ranks(torch.stack([self._sums.get(name, zero) for name in names]))
        return {name: (total, weight) for name, (total, weight) in zip(names, stacked.tolist(), strict=True)}

    def flush(self, names: tuple[str, ...]) -> dict[str, float]:
        """The means over all ranks of the names that were added to since the last flush."""
        means = {name: total / weight for name, (total, weight) in self.totals(names).items() if weight > 0}
        self._sums.clear()
        return means

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.clear()

    def load(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Begin with these sums, as totals() gave them."""
        self._sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=self.device) for name, pair in totals.items()
        }
