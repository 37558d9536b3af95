"""Objectives of reinforcement learning, each a sum over the supervised tokens of the batch, never a mean.

lp is the token's log-probability now, q its log-probability when it was sampled (extras `old_logprobs` [B, T]),
r = e^(lp - q), A its advantage (extras `advantages`, [B, T], or [B] for all tokens of a row), sg stops the gradient.
Sums make the gradient independent of how a batch is cut in pieces; scale with the learning rate or the advantages.
In all, `per_example_B` is the sum over the row's tokens; q, A and w are constants. Metrics: tokens; where there is a
ratio, its mean, the share of tokens whose gradient the clip takes, and kl (mean of q - lp).

Axes: B rows, T positions, N supervised tokens of all rows.
"""

import torch
from torch import Tensor

from inft.client.losses.inputs import LossInputs, LossOutput
from inft.client.losses.supervised import SupervisedTokens, supervised_tokens, token_extra
from params.errors import UserError

MOST_LOG_RATIO = 700.0  # in metrics: e to the power of more is infinite, which JSON has no word for


def cross_entropy(inputs: LossInputs) -> LossOutput:
    """Return -Σ w·lp; w is extras `weights`, [B, T] or [B], and 1 where the batch has none.

    Errors: UserError for labels outside the vocabulary, and weights of another shape or not finite.
    """
    tokens = supervised_tokens(inputs)
    if "weights" not in inputs.extras:
        return _summed(tokens, -tokens.logprobs_N)
    return _summed(tokens, -token_extra(inputs, tokens, "weights", per_row=True) * tokens.logprobs_N)


def reinforce(inputs: LossInputs) -> LossOutput:
    """Return -Σ A·lp (Williams 1992): right for tokens that the current weights sampled.

    Errors: UserError for missing advantages and for extras of another shape or not finite.
    """
    tokens = supervised_tokens(inputs)
    return _summed(tokens, -_advantages(inputs, tokens) * tokens.logprobs_N)


def importance_sampling(inputs: LossInputs) -> LossOutput:
    """Return -Σ r·A: tokens that older weights sampled, made unbiased by the ratio.

    Errors: UserError for missing advantages or old_logprobs and for extras of another shape or not finite.
    """
    tokens = supervised_tokens(inputs)
    advantages_N, log_ratios_N = _advantages(inputs, tokens), _log_ratios(inputs, tokens)
    values_N = -log_ratios_N.exp() * advantages_N
    return _summed(tokens, values_N, log_ratios_N, clipped_N=torch.zeros_like(values_N, dtype=torch.bool))


def ppo(inputs: LossInputs, *, clip_low: float = 0.8, clip_high: float = 1.2) -> LossOutput:
    """Return -Σ min(r·A, clip(r, clip_low, clip_high)·A) (Schulman et al. 2017, eq. 7).

    Errors: UserError for missing advantages or old_logprobs, extras of another shape or not finite, and bounds that do
    not hold 0 ≤ clip_low ≤ clip_high.
    """
    _require_bounds(clip_low, clip_high)
    tokens = supervised_tokens(inputs)
    advantages_N, log_ratios_N = _advantages(inputs, tokens), _log_ratios(inputs, tokens)
    ratios_N = log_ratios_N.exp()
    bounded_N = ratios_N.clamp(clip_low, clip_high) * advantages_N
    free_N = ratios_N * advantages_N
    return _summed(tokens, -torch.minimum(free_N, bounded_N), log_ratios_N, clipped_N=bounded_N < free_N)


def cispo(inputs: LossInputs, *, clip_low: float = 0.0, clip_high: float = 4.0) -> LossOutput:
    """Return -Σ sg(clip(r, clip_low, clip_high))·lp·A (MiniMax 2025, "MiniMax-M1", eq. 4): no token loses its gradient.

    Errors: UserError for missing advantages or old_logprobs, extras of another shape or not finite, and bounds that do
    not hold 0 ≤ clip_low ≤ clip_high.
    """
    _require_bounds(clip_low, clip_high)
    tokens = supervised_tokens(inputs)
    advantages_N, log_ratios_N = _advantages(inputs, tokens), _log_ratios(inputs, tokens).detach()
    ratios_N = log_ratios_N.exp()
    bounded_N = ratios_N.clamp(clip_low, clip_high)
    values_N = -bounded_N * tokens.logprobs_N * advantages_N
    return _summed(tokens, values_N, log_ratios_N, clipped_N=bounded_N != ratios_N)


def _advantages(inputs: LossInputs, tokens: SupervisedTokens) -> Tensor:
    return token_extra(inputs, tokens, "advantages", per_row=True)


def _log_ratios(inputs: LossInputs, tokens: SupervisedTokens) -> Tensor:
    return tokens.logprobs_N - token_extra(inputs, tokens, "old_logprobs")


def _summed(
    tokens: SupervisedTokens, values_N: Tensor, log_ratios_N: Tensor | None = None, *, clipped_N: Tensor | None = None
) -> LossOutput:
    per_example_B = tokens.row_sums(values_N)
    metrics = {"tokens": float(tokens.count)}
    if log_ratios_N is not None and clipped_N is not None:
        log_ratios_N = log_ratios_N.detach()
        metrics |= {
            "ratio": float(log_ratios_N.double().clamp(max=MOST_LOG_RATIO).exp().mean()),
            "clipped": float(clipped_N.double().mean()),
            "kl": float(-log_ratios_N.mean()),
        }
    return LossOutput(loss=per_example_B.sum(), per_example_B=per_example_B, metrics=metrics)


def _require_bounds(low: float, high: float) -> None:
    if not 0 <= low <= high:
        raise UserError(f"clip_low is {low} and clip_high {high}: give 0 <= clip_low <= clip_high.")
