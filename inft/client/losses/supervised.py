"""What losses share: log-probabilities of the supervised tokens, checked extras, and rows in pairs.

Unsupervised positions are left out by indexing, not by a product with 0, unless their logits are finite: they may
hold anything, NaN included.

Axes: B rows, T positions, M those of all rows, V vocabulary, N supervised tokens of all rows in order, P pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inft.client.losses.inputs import IGNORED, LossInputs
from params.errors import UserError

FEW_LEFT_OUT = 0.125  # share of positions up to which computing them takes less time than copying the others


@dataclass(frozen=True, kw_only=True)
class SupervisedTokens:
    """The supervised tokens of a batch."""

    where_BT: Tensor  # bool
    logprobs_N: Tensor  # of the labels under the model; float32, or float64 for float64 logits

    @property
    def count(self) -> int:
        """N, the number of supervised tokens."""
        return len(self.logprobs_N)

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return the sum [B] of each row's values; 0 for a row without supervised tokens."""
        grid_BT = values_N.new_zeros(self.where_BT.shape)
        # Each place is written once, so that the sum has one order: index_add on CUDA has not.
        return grid_BT.masked_scatter(self.where_BT, values_N).sum(1)


def supervised_tokens(inputs: LossInputs) -> SupervisedTokens:
    """Return the log-probabilities of the labels at the supervised positions.

    Errors: UserError for a label outside the vocabulary, with row and position, and without any supervised token.
    """
    labels_BT, vocabulary = inputs.labels_BT, inputs.logits_BTV.shape[-1]
    where_BT = labels_BT != IGNORED
    outside_BT = where_BT & ((labels_BT < 0) | (labels_BT >= vocabulary))
    if bool(outside_BT.any()):
        row, position = outside_BT.nonzero()[0].tolist()
        raise UserError(
            f"labels: row {row}, position {position} is {int(labels_BT[row, position])}, outside the vocabulary of "
            f"{vocabulary} tokens: give an id from 0 to {vocabulary - 1}, or {IGNORED} where nothing is supervised."
        )
    if not bool(where_BT.any()):
        raise UserError(
            f"labels: no token of the batch is supervised: label what is to be learned with its id, not {IGNORED}. The "
            "first token of a row does not count, since nothing stands before it to predict it."
        )
    logprobs_N = _label_logprobs(inputs.logits_BTV.flatten(0, 1), labels_BT.flatten().long(), where_BT.flatten())
    return SupervisedTokens(where_BT=where_BT, logprobs_N=logprobs_N)


def _label_logprobs(logits_MV: Tensor, labels_M: Tensor, where_M: Tensor) -> Tensor:
    """Return log p(label) [N] at the positions `where_M`, of M = B·T.

    Where few are left out, reckoning all spares a copy of the logits and of their gradient, with the same result; but
    a position left out gets the gradient 0·logit then, which is right for finite logits only.
    """
    precise = torch.promote_types(logits_MV.dtype, torch.float32)
    left_out = (~where_M).nonzero().squeeze(1)
    few = len(left_out) <= FEW_LEFT_OUT * len(where_M)
    if few and bool(logits_MV.detach().index_select(0, left_out).isfinite().all()):
        losses_M = F.cross_entropy(logits_MV.to(precise), labels_M, ignore_index=IGNORED, reduction="none")
        return -losses_M[where_M]
    logits_NV = logits_MV.index_select(0, where_M.nonzero().squeeze(1)).to(precise)
    return -F.cross_entropy(logits_NV, labels_M[where_M], reduction="none")


def require_supervised_rows(tokens: SupervisedTokens) -> None:
    """Raise a UserError that names the first row without a supervised token, if there is one."""
    empty_B = ~tokens.where_BT.any(1)
    if bool(empty_B.any()):
        row = int(empty_B.nonzero()[0])
        raise UserError(f"labels: row {row} has no supervised token, and this loss needs one in each: drop the row.")


def token_extra(inputs: LossInputs, tokens: SupervisedTokens, name: str, *, per_row: bool = False) -> Tensor:
    """Return extras[name] at the supervised tokens [N], without a gradient, in the dtype of the log-probabilities.

    It is [B, T], aligned as the labels; with `per_row` it may be [B] also, one value for all tokens of a row.
    Errors: UserError when it is missing, has another shape, or is not finite at a supervised token.
    """
    values = _extra(inputs, name)
    grid = inputs.labels_BT.shape
    if per_row and values.shape == grid[:1]:
        values = values.unsqueeze(1).expand(grid)
    if values.shape != grid:
        wanted = f"{list(grid[:1])} or {list(grid)}" if per_row else f"{list(grid)}"
        raise UserError(f"{name} has the shape {list(values.shape)}: give {wanted} for this batch's rows and tokens.")
    values = values.detach().to(tokens.logprobs_N)
    wrong_BT = tokens.where_BT & ~values.isfinite()
    if bool(wrong_BT.any()):
        row, position = wrong_BT.nonzero()[0].tolist()
        raise UserError(f"{name}: row {row}, position {position} is {float(values[row, position])}: give a number.")
    return values[tokens.where_BT]


def row_extra(inputs: LossInputs, name: str) -> Tensor:
    """Return extras[name] as a vector [B] without a gradient.

    Errors: UserError when it is missing, has another shape, or is not finite in a row.
    """
    values_B = _extra(inputs, name).detach()
    if values_B.shape != (inputs.rows,):
        raise UserError(f"{name} has the shape {list(values_B.shape)}: give one value for each of {inputs.rows} rows.")
    require_finite_rows(values_B, name)
    return values_B


def require_finite_rows(values: Tensor, name: str) -> None:
    """Raise a UserError that names the first row [B, ...] with a value that is not finite, if there is one."""
    wrong_B = ~values.isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.isfinite()
    if bool(wrong_B.any()):
        raise UserError(f"{name}: row {int(wrong_B.nonzero()[0])} is not finite: give numbers.")


def rows_in_pairs(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return the first and the second row [P] of each pair; rows with the same number in extras `pair_ids` are one.

    Pairs come in the order of their first rows. Errors: UserError for an id that does not stand in exactly two rows.
    """
    ids = row_extra(inputs, "pair_ids").tolist()
    rows: dict[float, list[int]] = {}
    for row, pair in enumerate(ids):
        rows.setdefault(pair, []).append(row)
    for pair, members in rows.items():
        if len(members) != 2:
            where = "row" if len(members) == 1 else "rows"
            listed = ", ".join(map(str, members))
            raise UserError(f"pair_ids: {pair} stands in {where} {listed}: a pair has exactly two rows of the batch.")
    pairs_P2 = torch.tensor(list(rows.values()), device=inputs.labels_BT.device).reshape(-1, 2)
    return pairs_P2[:, 0], pairs_P2[:, 1]


def _extra(inputs: LossInputs, name: str) -> Tensor:
    if name not in inputs.extras:
        given = ", ".join(sorted(inputs.extras)) or "none"
        raise UserError(f"the batch has no {name!r}, which this loss needs (beside labels, it has {given}): add it.")
    return inputs.extras[name]
