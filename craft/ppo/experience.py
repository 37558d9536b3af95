"""What of a rollout is learned from: its micro-batches get their advantages and returns."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from craft.distributed import sum_over_ranks, world_size
from craft.ppo.config import PPOConfig
from craft.ppo.losses import gae, moments, token_rewards, whiten

# What a micro-batch [B, C] holds besides the model's inputs.
OWN = ("completion_mask", "old_logprobs", "old_values", "advantages", "returns", "tokens_per_batch")

Batch = dict[str, Any]


def model_inputs(batch: Mapping[str, Any]) -> Batch:
    """Return a micro-batch without what is PPO's own."""
    return {name: value for name, value in batch.items() if name not in OWN}


def add_advantages(
    batches: Sequence[Batch], scores: Sequence[Tensor], kl: Sequence[Tensor], args: PPOConfig
) -> dict[str, float]:
    """Give each micro-batch of a rollout its advantages, its returns and the divisor of its loss.

    ``scores`` [B] of completions and ``kl`` [B, C] of tokens are per micro-batch. Returns the figures of the rollout
    over all processes: the mean advantage before whitening, and the explained variance of the old values, which is
    left out where the returns do not vary. ``tokens_per_batch`` is the mean number of completion tokens of a
    micro-batch over the rollout and all processes: sums that are divided by it, averaged over micro-batches and
    processes, give the mean over the rollout's tokens, however these are spread.
    """
    masks = [batch["completion_mask"] for batch in batches]
    rewards = [token_rewards(s, k, mask, args.kl_coef) for s, k, mask in zip(scores, kl, masks, strict=True)]
    if args.whiten_rewards:
        rewards = _whiten(rewards, masks, shift_mean=False)
    for batch, rewards_BC, mask_BC in zip(batches, rewards, masks, strict=True):
        batch["advantages"], batch["returns"] = gae(rewards_BC, batch["old_values"], mask_BC, args.gamma, args.lam)
    figures = _figures(batches)
    if args.whiten_advantages:
        white = _whiten([batch["advantages"] for batch in batches], masks, shift_mean=True)
        for batch, advantages_BC in zip(batches, white, strict=True):
            batch["advantages"] = advantages_BC
    tokens = sum_over_ranks(torch.stack([mask.sum() for mask in masks]).sum().float())
    for batch in batches:
        batch["tokens_per_batch"] = tokens / (len(batches) * world_size())
    return figures


def _whiten(parts: Sequence[Tensor], masks: Sequence[Tensor], *, shift_mean: bool) -> list[Tensor]:
    """Micro-batches of different widths, whitened together."""
    flat = whiten(_flat(parts), _flat(masks), shift_mean=shift_mean)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def _figures(batches: Sequence[Batch]) -> dict[str, float]:
    mask = _flat([batch["completion_mask"] for batch in batches])
    returns = _flat([batch["returns"] for batch in batches])
    values = _flat([batch["old_values"] for batch in batches])
    mean, _ = moments(_flat([batch["advantages"] for batch in batches]), mask)
    (_, variance), (_, left) = moments(returns, mask), moments(returns - values, mask)
    figures = {"advantages": float(mean)}
    if float(variance) > 0:
        figures["explained_variance"] = 1 - float(left) / float(variance)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
