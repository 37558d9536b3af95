"""InfoNCE between the two rows of each pair, with the other pairs of the batch as negatives.

Axes: B rows, P pairs, T positions, H hidden size.
"""

import torch
import torch.nn.functional as F

from craft.infonce import info_nce
from craft.pooling import PoolingStrategy, pool_hidden_states
from inft.client.losses.inputs import LossInputs, LossOutput
from inft.client.losses.supervised import rows_in_pairs
from params.errors import UserError


def contrastive(
    inputs: LossInputs, *, temperature: float = 0.05, pooling: PoolingStrategy = "last_token"
) -> LossOutput:
    """Return the mean InfoNCE loss of the pairs: of the two rows with one number in extras `pair_ids`, the first is the
    anchor and the second its positive; the positives of the other pairs are its negatives (craft.infonce.info_nce).

    A row's embedding is its hidden states pooled over the attention mask and set to length 1. `per_example_B` has a
    pair's loss in both of its rows; it is not separable, since every row is in every loss. Metric: accuracy.
    Errors: UserError without hidden states, for rows that form no pair, fewer than two pairs, an unknown pooling, a row
    whose mask is all 0, and a temperature that is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}: give a number above 0.")
    if inputs.hidden_BTH is None:
        raise UserError("contrastive needs hidden states: run the model with output_hidden_states.")
    first_P, second_P = rows_in_pairs(inputs)
    if len(first_P) < 2:
        raise UserError(f"contrastive has {len(first_P)} pair and so no negatives: give two pairs or more in a batch.")
    try:
        pooled_BH = pool_hidden_states(inputs.hidden_BTH, inputs.attention_mask_BT, pooling)
    except ValueError as error:
        raise UserError(str(error)) from error
    unit_BH = F.normalize(pooled_BH.to(torch.promote_types(pooled_BH.dtype, torch.float32)), dim=-1)
    found = info_nce(unit_BH[first_P], unit_BH[second_P], temperature=temperature)
    losses_P = found.losses_B
    both = torch.cat([first_P, second_P])
    return LossOutput(
        loss=losses_P.mean(),
        per_example_B=losses_P.new_empty(inputs.rows).index_put((both,), losses_P.repeat(2)),
        metrics={"accuracy": float(found.correct_B.double().mean())},
        denominator=len(losses_P),
        unit="pairs",
        separable=False,
    )
