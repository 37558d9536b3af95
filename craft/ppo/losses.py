"""The mathematics of PPO on tokens, as pure functions.

Axes: B completions, T their tokens, right-padded; ``mask_BT`` is True on real tokens, of which each row has at least
one. Whatever stands on the others enters nothing, and results are 0 there.
"""

from typing import Literal

import torch
from torch import Tensor

from craft.distributed import sum_over_ranks

EPSILON = 1e-8  # added to a variance before its root is taken


def token_kl(
    logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, estimator: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """Return an estimate of KL(policy || reference) from each sampled token [B, T] (Schulman 2020, approximating KL).

    k1 is log(p/q), without bias; k3 is q/p − 1 − log(q/p), without bias, never negative and of lower variance.
    """
    logratio_BT = torch.where(mask_BT, reference_BT - logprobs_BT, 0.0)
    return -logratio_BT if estimator == "k1" else torch.expm1(logratio_BT) - logratio_BT


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Return each token's reward [B, T]: minus its KL penalty, plus the completion's score at its last token."""
    last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)
    rewards_BT = -kl_coef * kl_BT
    return rewards_BT.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BT))


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and the returns that values are fitted to, both [B, T].

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t, and A + V (Schulman 2016, eq. 16). After its last token a
    completion is over: nothing is bootstrapped there.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    following_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        following_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * following_B, 0.0)
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = following_B
    return advantages_BT, advantages_BT + values_BT


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return real tokens' values with variance 1 and mean 0, or with their own mean without ``shift_mean``.

    Mean and (unbiased) variance are those over the real tokens of all processes; any shape.
    """
    mean, variance = moments(x, mask)
    white = (x - mean) * torch.rsqrt(variance + EPSILON)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of real tokens' values over all processes."""
    count = sum_over_ranks(mask.sum().to(x.dtype))
    mean = sum_over_ranks(torch.where(mask, x, 0.0).sum()) / count
    squares = sum_over_ranks(torch.where(mask, x - mean, 0.0).square().sum())
    return mean, squares / (count - 1).clamp(min=1)


def policy_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate loss of each token, and whether clipping set it; both [B, T].

    −min(ρA, clip(ρ, 1−ε, 1+ε) A) with ρ the ratio of the probabilities (Schulman 2017, eq. 7).
    """
    ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0).exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - cliprange, 1 + cliprange)
    loss_BT = torch.where(mask_BT, torch.maximum(plain_BT, clipped_BT), 0.0)
    return loss_BT, mask_BT & (clipped_BT > plain_BT)


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped squared error of each token's value, and whether clipping set it; both [B, T].

    ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²): a step that leaves the range around the old value by more
    than ε gains nothing.
    """
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-cliprange_value, cliprange_value)
    plain_BT, clipped_BT = (values_BT - returns_BT).square(), (near_BT - returns_BT).square()
    loss_BT = torch.where(mask_BT, 0.5 * torch.maximum(plain_BT, clipped_BT), 0.0)
    return loss_BT, mask_BT & (clipped_BT > plain_BT)
