"""Squared error of logits against given targets: a score for each row, or a teacher's logits.

Axes: B rows, T positions, V vocabulary, N supervised tokens of all rows.
"""

from torch import Tensor

from inft.client.losses.inputs import LossInputs, LossOutput
from inft.client.losses.supervised import (
    SupervisedTokens,
    require_finite_rows,
    require_supervised_rows,
    row_extra,
    supervised_tokens,
)
from params.errors import UserError


def mse(inputs: LossInputs) -> LossOutput:
    """Return the mean over rows of the squared error against extras `targets`, which is of one of two shapes.

    [B]: a row's score is the mean, over its supervised positions, of the logit of the label there (not its
    log-probability); a row that supervises the one token "Yes" is so scored by that token's logit.
    [B, T, V], aligned as the labels: a row's error is the mean over its supervised positions and the vocabulary.
    Errors: UserError for missing targets, another shape, targets that are not finite, and rows without supervision.
    """
    tokens = supervised_tokens(inputs)
    require_supervised_rows(tokens)
    targets = inputs.extras.get("targets")
    if targets is not None and targets.ndim == 3:
        per_example_B = _against_logits(inputs, tokens, targets)
    else:
        per_example_B = _against_scores(inputs, tokens)
    return LossOutput(loss=per_example_B.mean(), per_example_B=per_example_B, denominator=inputs.rows, unit="rows")


def _against_scores(inputs: LossInputs, tokens: SupervisedTokens) -> Tensor:
    targets_B = row_extra(inputs, "targets").to(tokens.logprobs_N)
    labels_N1 = inputs.labels_BT[tokens.where_BT].long().unsqueeze(1)
    logits_N = inputs.logits_BTV[tokens.where_BT].gather(1, labels_N1).squeeze(1)
    scores_B = tokens.row_sums(logits_N.to(tokens.logprobs_N.dtype)) / tokens.where_BT.sum(1)
    return (scores_B - targets_B).square()


def _against_logits(inputs: LossInputs, tokens: SupervisedTokens, targets_BTV: Tensor) -> Tensor:
    if targets_BTV.shape != inputs.logits_BTV.shape:
        given, wanted = list(targets_BTV.shape), list(inputs.logits_BTV.shape)
        raise UserError(f"targets have the shape {given}: give one value for each row {wanted[:1]}, or {wanted}.")
    targets_NV = targets_BTV.detach()[tokens.where_BT].to(tokens.logprobs_N)
    if not bool(targets_NV.isfinite().all()):
        blank_BTV = targets_BTV.masked_fill(~tokens.where_BT.unsqueeze(-1), 0)
        require_finite_rows(blank_BTV, "targets")
    errors_NV = inputs.logits_BTV[tokens.where_BT].to(tokens.logprobs_N.dtype) - targets_NV
    return tokens.row_sums(errors_NV.square().mean(1)) / tokens.where_BT.sum(1)
