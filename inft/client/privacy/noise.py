"""Randomness that privacy rests on: Gaussian noise on the clipped sum, and Poisson sampling of rows.

Without a seed every bit comes from the operating system's cryptographic generator. torch's own will not do: its CPU
generator keeps 32 bits of a seed, which can be searched through. A seeded run can be repeated by whoever knows
the seed, so it is marked as not private. Noise is drawn in float64 on the CPU and rounded to the gradient's type; the
attack on the low bits of floating-point noise (Mironov 2012) is not defended against.
"""

import math
import secrets
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from params.errors import UserError


class NoiseSource:
    """Uniform and normal numbers, from the operating system (private) or from a seed (repeatable, not private)."""

    def __init__(self, seed: int | None = None) -> None:
        self._seeded = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def private(self) -> bool:
        """Whether nobody can draw the same numbers again; False for a seeded source."""
        return self._seeded is None

    def uniform(self, count: int) -> Tensor:
        """Return `count` float64 numbers, strictly between 0 and 1, on a grid of 2⁻⁵²."""
        if self._seeded is not None:
            bits = torch.randint(0, 2**52, (count,), dtype=torch.int64, generator=self._seeded)
        elif count == 0:
            return torch.empty(0, dtype=torch.float64)
        else:
            bits = torch.frombuffer(bytearray(secrets.token_bytes(8 * count)), dtype=torch.int64) & (2**52 - 1)
        # One bit fewer than a float64 holds, so that no half step rounds up to 1.
        return (bits.to(torch.float64) + 0.5) * 2.0**-52

    def normal(self, count: int) -> Tensor:
        """Return `count` float64 numbers of N(0, 1), by Box and Muller's transform."""
        pairs = (count + 1) // 2
        uniform = self.uniform(2 * pairs)
        radius, angle = (-2 * uniform[:pairs].log()).sqrt(), 2 * math.pi * uniform[pairs:]
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]

    def state(self) -> Tensor | None:
        """Return the state of a seeded source as bytes (uint8) for a checkpoint; None for a private one."""
        return None if self._seeded is None else self._seeded.get_state()

    def load_state(self, state: Tensor | None) -> None:
        """Go on where `state` was taken. Errors: UserError where one is seeded and the other is not."""
        if (state is None) != self.private:
            kinds = ("private", "seeded") if self.private else ("seeded", "private")
            raise UserError(f"this run's noise is {kinds[0]}, the checkpoint's is {kinds[1]}: give the same dp seed.")
        if self._seeded is not None and state is not None:
            self._seeded.set_state(state)


@torch.no_grad()
def add_noise(
    parameters: Iterable[nn.Parameter],
    *,
    noise_multiplier: float,
    clip_norm: float,
    expected_batch_size: float,
    source: NoiseSource,
) -> None:
    """Turn `.grad`, the clipped sum over one logical batch, into the private mean: (sum + N(0, σ²C²)) / E[batch size].

    To be called once a step, after all micro-batches; a parameter without a gradient counts as a sum of 0, so that an
    empty batch takes a step of noise alone. The divisor is n·q and never the batch's own size, which is private.
    Errors: UserError for a clipping norm or an expected batch size that is not above 0.
    """
    if not expected_batch_size > 0:
        raise UserError(f"the expected batch size is {expected_batch_size}: rows times sample_rate must be above 0.")
    if not clip_norm > 0 or not noise_multiplier >= 0:
        raise UserError(
            f"max_grad_norm is {clip_norm} and noise_multiplier {noise_multiplier}: the first must be above 0, "
            "the second 0 or more."
        )
    for parameter in parameters:
        total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        noise = (source.normal(parameter.numel()) * (noise_multiplier * clip_norm)).view(parameter.shape)
        exact = total.to("cpu", torch.float64) + noise
        parameter.grad = (exact / expected_batch_size).to(parameter.device, parameter.dtype)


def poisson_batches(rows: int, sample_rate: float, source: NoiseSource) -> Iterator[list[int]]:
    """Yield batches of row numbers without end: each row is in each batch with probability `sample_rate`, on its own.

    Batches differ in size and can be empty; an empty one is a step like any other (noise alone, counted).
    Errors: UserError for no rows, or for a sample rate outside (0, 1], when the first batch is asked for.
    """
    if rows < 1:
        raise UserError("there are no rows to sample from: give at least one.")
    if not 0 < sample_rate <= 1:
        raise UserError(f"sample_rate is {sample_rate}: give a probability above 0 and at most 1.")
    while True:
        yield (source.uniform(rows) < sample_rate).nonzero().flatten().tolist()
