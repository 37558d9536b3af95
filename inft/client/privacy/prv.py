"""Opacus' PRV accountant, asked for ε after each step: what does not depend on the exact number of steps is kept.

Opacus lays a grid for the number of steps and integrates the mechanism on it anew in each call. A grid for more steps
is finer and wider, so it serves fewer as well, and one grid serves until the steps have doubled. Imports Opacus.
"""

import functools
import math
from collections.abc import Sequence

from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import (
    DiscretePRV,
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    discretize,
)

from inft.client.privacy.rdp import rdp_epsilon

# A grid of this size takes about 1 GB and some seconds.
MOST_GRID_POINTS = 4_000_000
FEWEST_STEPS = 64  # that a grid is laid for
GRID_ERROR = 0.01  # of ε, within the bound that PRV gives; Opacus' default
KEPT_GRIDS = 4

Run = tuple[float, float, int]  # noise multiplier, sample rate, steps


class GridTooLarge(ValueError):
    """The grid would have more points than fit."""

    def __init__(self, points: float) -> None:
        self.points = points
        super().__init__(f"a grid of {points:.1e} points")


def prv_epsilon(runs: Sequence[Run], delta: float) -> float:
    """Return Opacus' upper bound of ε. Errors: GridTooLarge; RuntimeError or ValueError where it cannot be computed."""
    accountant = _KeptGrid()
    accountant.history = list(runs)
    return float(accountant.get_epsilon(delta, eps_error=GRID_ERROR, delta_error=delta / 1000))


class _KeptGrid(PRVAccountant):
    def _get_dprv(self, eps_error: float, delta_error: float) -> DiscretePRV:
        runs = tuple((noise, rate, _rounded_up(steps)) for noise, rate, steps in self.history)
        domain = _domain(runs, eps_error, delta_error)
        if domain.size > MOST_GRID_POINTS:
            domain = _domain(tuple(self.history), eps_error, delta_error)
        if domain.size > MOST_GRID_POINTS:
            raise GridTooLarge(domain.size)
        bounds = float(domain.t_min), float(domain.t_max), domain.size
        discrete = [_discrete(noise, rate, *bounds) for noise, rate, _ in self.history]
        return compose_heterogeneous(discrete, [steps for _, _, steps in self.history])


def _rounded_up(steps: int) -> int:
    return max(FEWEST_STEPS, 1 << (steps - 1).bit_length())


@functools.lru_cache(maxsize=64)
def _domain(runs: tuple[Run, ...], eps_error: float, delta_error: float) -> Domain:
    """The grid of Gopi et al. 2021, remark 5.6, as Opacus lays it: its width from RDP, its mesh from the steps."""
    steps = sum(count for _, _, count in runs)
    singles = [[(noise, rate, 1)] for noise, rate, _ in runs]
    width = max(
        rdp_epsilon(runs, delta_error / 4), *(rdp_epsilon(run, delta_error / (8 * steps)) for run in singles), eps_error
    )
    mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
    return Domain.create_aligned(-width - 3, width + 3, mesh)


@functools.lru_cache(maxsize=KEPT_GRIDS)
def _discrete(noise: float, rate: float, start: float, stop: float, size: int) -> DiscretePRV:
    """One step's privacy loss on the grid; not to be changed by who gets it."""
    mechanism = PoissonSubsampledGaussianPRV(rate, noise)
    return discretize(TruncatedPrivacyRandomVariable(mechanism, start, stop), Domain(start, stop, size))
