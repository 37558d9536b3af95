"""Opacus' RDP accounting, with what one step spends at each order kept: an ε after each step is then a sum.

Imports Opacus.
"""

import functools
from collections.abc import Iterable

import numpy as np
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

# RDP orders: Opacus' own, and large ones that make small ε tight.
ORDERS = [*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024]


def rdp_epsilon(runs: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Return ε at `delta` of runs of (noise multiplier, sample rate, steps), at the best of ORDERS."""
    spent = sum(steps * _of_one_step(noise, rate) for noise, rate, steps in runs)
    return float(get_privacy_spent(orders=ORDERS, rdp=spent, delta=delta)[0])


@functools.lru_cache(maxsize=256)
def _of_one_step(noise: float, rate: float) -> np.ndarray:
    found = np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS))
    found.flags.writeable = False
    return found
