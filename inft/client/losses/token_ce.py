"""Cross-entropy of the supervised tokens: plain supervised fine-tuning.

Axes: B rows, N supervised tokens of all rows.
"""

from inft.client.losses.inputs import LossInputs, LossOutput
from inft.client.losses.supervised import supervised_tokens


def token_ce(inputs: LossInputs) -> LossOutput:
    """Return the mean of -log p(label) over all supervised tokens of the batch, as transformers' models do.

    `per_example_B` is the mean over the row's own tokens, 0 for a row without any, so that no row's value depends
    on the lengths of others; its mean is the loss where all rows have equally many. Metric: tokens.
    Errors: UserError for labels outside the vocabulary and without any supervised token.
    """
    tokens = supervised_tokens(inputs)
    sums_B = tokens.row_sums(-tokens.logprobs_N)
    return LossOutput(
        loss=sums_B.sum() / tokens.count,
        per_example_B=sums_B / tokens.where_BT.sum(1).clamp(min=1),
        metrics={"tokens": float(tokens.count)},
        denominator=tokens.count,
    )
