"""Random numbers that are a function of what they are for, and permutations made of them.

There is no generator whose state could be lost: a number depends on its key alone (seed, epoch, document, position),
so that it is the same in every process, order and library version.
"""

from collections.abc import Sequence

import numpy as np

Numbers = np.ndarray  # uint64, any shape
Part = int | np.ndarray  # of a key; arrays are broadcast

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 6


def hashed(*key: Part) -> Numbers:
    """Return the 64-bit hash of a key, elementwise over its arrays; a part may be negative."""
    state: Numbers = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + _unsigned(part))
    return state


def uniform(*key: Part) -> np.ndarray:
    """Return float64 numbers in [0, 1) for a key, elementwise over its arrays."""
    return (hashed(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(count: int, *key: int) -> np.ndarray:
    """Return the numbers 0 … count-1 in an order that depends on the key alone, as int64."""
    return np.argsort(hashed(*key, np.arange(count)), kind="stable")


def permuted(places: Sequence[int] | np.ndarray, count: int, *key: int) -> np.ndarray:
    """Return what stands at some places of a permutation of 0 … count-1, as int64, without making the rest of it.

    A Feistel network over the next even number of bits; what falls outside goes through it again (Black and Rogaway
    2002), so that the whole is a bijection for every key.
    """
    values = np.asarray(places, np.uint64).copy()
    half = max(1, ((max(count - 1, 1)).bit_length() + 1) // 2)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half, key)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _feistel(values: Numbers, half: int, key: tuple[int, ...]) -> Numbers:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (hashed(*key, number, right) & mask)
    return (left << shift) | right


def _unsigned(part: Part) -> Numbers:
    if isinstance(part, np.ndarray):
        return part.astype(np.uint64)
    return np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64)


def _mix(x: Numbers) -> Numbers:
    """The output function of splitmix64 (Steele et al. 2014); arrays wrap without a warning."""
    x = x + np.uint64(_GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))
