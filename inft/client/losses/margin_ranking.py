"""Margin ranking: of two answers, the chosen one is to be more likely than the rejected one by a margin.

Axes: B rows, P pairs.
"""

import torch
from torch import Tensor

from inft.client.losses.inputs import LossInputs, LossOutput
from inft.client.losses.supervised import require_supervised_rows, row_extra, rows_in_pairs, supervised_tokens
from params.errors import UserError


def margin_ranking(inputs: LossInputs, *, margin: float = 1.0) -> LossOutput:
    """Return the mean over pairs of max(0, margin - (log p(chosen) - log p(rejected))).

    log p is the sum over a row's supervised tokens, in nats. Extras: `pair_ids` [B], the same number in both rows of a
    pair, and `chosen` [B], 1 in one of them and 0 in the other. `per_example_B` has a pair's loss in both of its rows;
    it is not separable. Metrics: accuracy (the chosen is more likely), log_ratio (mean difference).
    Errors: UserError for missing extras, rows that form no pair, rows without supervised tokens, and a margin below 0.
    """
    if not margin >= 0:
        raise UserError(f"margin is {margin}: give 0 or more, in nats.")
    first_P, second_P = rows_in_pairs(inputs)
    chosen_P, rejected_P = _ranked(row_extra(inputs, "chosen"), first_P, second_P)
    tokens = supervised_tokens(inputs)
    require_supervised_rows(tokens)
    scores_B = tokens.row_sums(tokens.logprobs_N)
    gap_P = scores_B[chosen_P] - scores_B[rejected_P]
    losses_P = (margin - gap_P).clamp(min=0)
    per_example_B = torch.empty_like(scores_B).index_put((torch.cat([chosen_P, rejected_P]),), losses_P.repeat(2))
    return LossOutput(
        loss=losses_P.mean(),
        per_example_B=per_example_B,
        metrics={"accuracy": float((gap_P > 0).double().mean()), "log_ratio": float(gap_P.detach().mean())},
        denominator=len(losses_P),
        unit="pairs",
        separable=False,
    )


def _ranked(chosen_B: Tensor, first_P: Tensor, second_P: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected row of each pair."""
    for first, second in zip(first_P.tolist(), second_P.tolist(), strict=True):
        if {float(chosen_B[first]), float(chosen_B[second])} != {0.0, 1.0}:
            raise UserError(
                f"chosen: rows {first} and {second} are a pair: give 1 for one of them and 0 for the other."
            )
    first_is_chosen_P = chosen_B[first_P] == 1
    return torch.where(first_is_chosen_P, first_P, second_P), torch.where(first_is_chosen_P, second_P, first_P)
