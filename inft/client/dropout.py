"""LoRA's dropout with a generator of its own, so that an operation run again draws the same masks.

torch's global generator is left alone: what else the process draws neither changes a mask nor is changed by one.
"""

import hashlib

import torch
from torch import Tensor, nn


class Masks:
    """Where the dropouts of one adapter draw from: a generator while it has a seed, nothing otherwise."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.generator: torch.Generator | None = None

    def start(self, seed: int) -> None:
        """Drop from now on, in masks that follow from `seed` and the order of the layers' calls."""
        self.generator = torch.Generator(self._device).manual_seed(seed)

    def stop(self) -> None:
        """Drop nothing from now on."""
        self.generator = None


class SeededDropout(nn.Module):
    """Dropout [..., features] that draws from `masks`; the identity while these have no seed, in any mode."""

    def __init__(self, share: float, masks: Masks) -> None:
        super().__init__()
        self.share = share
        self._masks = masks

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share of its numbers set to 0, the others divided by 1 - share."""
        generator = self._masks.generator
        if generator is None:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.share, generator=generator)
        return x * kept.div_(1 - self.share)


def seed_of(*parts: int | str) -> int:
    """Return a seed below 2^63 that follows from the parts alone, and is another one for others."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
