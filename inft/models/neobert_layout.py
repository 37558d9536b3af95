"""The one flat token stream that NeoBERT runs on, made from a padded batch or given as it is.

Axes: B rows, S columns, T tokens of the stream, N documents, H hidden size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from params.errors import UserError


class Documents(NamedTuple):
    """Where the documents of a stream lie."""

    cu_seqlens: Tensor  # int32 [N + 1] from 0 to T
    max_seqlen: int  # at least the longest document's tokens
    position_ids_T: Tensor  # each document counts from 0


class Stream(NamedTuple):
    """A batch as a flat stream, and the way back."""

    input_ids_T: Tensor
    documents: Documents
    shape: torch.Size  # of the input_ids that were given
    real_T: Tensor | None  # place of each token in the flattened rows; none: every place holds one

    def restore(self, hidden_TH: Tensor) -> Tensor:
        """Return [*shape, H]; zeros where there is padding."""
        if self.real_T is not None:
            empty = hidden_TH.new_zeros(self.shape.numel(), hidden_TH.shape[-1])
            hidden_TH = empty.index_copy(0, self.real_T, hidden_TH)
        return hidden_TH.view(*self.shape, hidden_TH.shape[-1])


def flat_stream(
    input_ids_T: Tensor, position_ids_T: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> Stream:
    """Take a stream as it is; position_ids and max_seqlen are found where they are not given.

    Errors: ValueError without cu_seqlens.
    """
    if cu_seqlens is None:
        raise ValueError("A flat stream input_ids [T] needs cu_seqlens [N + 1]; one text alone is input_ids [1, S].")
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    if position_ids_T is None:
        starts_T = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(input_ids_T))
        position_ids_T = torch.arange(len(input_ids_T), device=input_ids_T.device) - starts_T
    documents = Documents(cu_seqlens.to(torch.int32), max_seqlen, position_ids_T)
    return Stream(input_ids_T, documents, input_ids_T.shape, None)


def padded_stream(
    input_ids_BS: Tensor, attention_mask_BS: Tensor | None, position_ids_BS: Tensor | None, *, limit: int
) -> Stream:
    """Leave the padding out: each row's real tokens are a document, wherever they stand in the row.

    Positions count real tokens from 0 where they are not given. `limit` is the longest document that the model takes.
    Errors: ValueError for a mask of another shape; UserError for a row beyond the limit.
    """
    rows, columns = input_ids_BS.shape
    if attention_mask_BS is None:
        attention_mask_BS = torch.ones_like(input_ids_BS)
    if attention_mask_BS.shape != input_ids_BS.shape:
        raise ValueError(
            f"attention_mask must be {tuple(input_ids_BS.shape)} as input_ids, 1 for real tokens and 0 for padding: "
            f"it is {tuple(attention_mask_BS.shape)}."
        )
    mask_BS = attention_mask_BS.bool()
    lengths_B = mask_BS.sum(1)
    longest = int(lengths_B.max()) if rows else 0
    if longest > limit:
        raise UserError(
            f"A text has {longest} tokens and max_position_embeddings is {limit}. Truncate texts to {limit} tokens, "
            "or train the model on longer ones."
        )
    real_T = mask_BS.flatten().nonzero().squeeze(1)
    if position_ids_BS is None:
        position_ids_BS = mask_BS.cumsum(1) - 1
    flat = input_ids_BS.flatten(), position_ids_BS.expand(rows, columns).flatten()
    whole = len(real_T) == rows * columns
    input_ids_T, position_ids_T = flat if whole else (x[real_T] for x in flat)
    cu_seqlens = F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    documents = Documents(cu_seqlens, longest, position_ids_T)
    return Stream(input_ids_T, documents, input_ids_BS.shape, None if whole else real_T)
