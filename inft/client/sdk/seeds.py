"""Seeds that a program did not give: drawn from Python's random, so that its own seed decides them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

SEEDS = 2**32  # whole numbers below it


def drawn_seed() -> int:
    """Return a seed from Python's random."""
    return random.randrange(SEEDS)


@contextmanager
def same_random() -> Iterator[None]:
    """Leave Python's random as it was: some libraries draw from it when they are first imported.

    Without this, a run would depend on whether another one had imported them before it.
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
