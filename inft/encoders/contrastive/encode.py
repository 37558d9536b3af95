"""From token arrays to unit vectors: NeoBERT reads texts as one flat stream, any other encoder reads padded rows.

Axes: T tokens of all texts, B texts, S tokens of the longest text, H hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from craft.hooks import last_hidden_state, unwrap
from craft.pooling import PoolingStrategy, check_strategy, pool_hidden_states

FLAT_MODELS = ("neobert",)  # model types that take a flat stream with cu_seqlens


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A model with its pooling; calling it maps token arrays to embeddings [B, H] of unit length, in float32."""

    model: nn.Module  # may be wrapped in DistributedDataParallel or compiled
    pooling: PoolingStrategy
    pad_token_id: int
    normalize: bool = True

    def __call__(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Return the embeddings of some texts; gradients are averaged over processes where the model does that."""
        pooled_BH = self._pooled(texts)
        pooled_BH = pooled_BH.to(torch.promote_types(pooled_BH.dtype, torch.float32))
        return F.normalize(pooled_BH, dim=-1) if self.normalize else pooled_BH

    def _pooled(self, texts: Sequence[np.ndarray]) -> Tensor:
        device = next(self.model.parameters()).device
        if self.flat:
            flat = flat_inputs(texts, device)
            hidden_TH = last_hidden_state(self.model(**flat))
            return pool_flat(hidden_TH, flat["cu_seqlens"], self.pooling)
        padded = padded_inputs(texts, self.pad_token_id, device)
        hidden_BSH = last_hidden_state(self.model(**padded))
        return pool_hidden_states(hidden_BSH, padded["attention_mask"], self.pooling)

    def without_synchronisation(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Return the same embeddings, but leave the gradients to this process: for all passes of a step but one."""
        with self._no_sync():
            return self(texts)

    @property
    def flat(self) -> bool:
        """Whether the model takes a flat stream."""
        return getattr(unwrap(self.model).config, "model_type", None) in FLAT_MODELS

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()


def flat_inputs(texts: Sequence[np.ndarray], device: torch.device) -> dict[str, Any]:
    """Return the texts one after the other: input_ids [T], position_ids [T], cu_seqlens int32 [B + 1], max_seqlen."""
    lengths = [len(text) for text in texts]
    ids_T = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    positions_T = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": ids_T.to(device),
        "position_ids": positions_T.to(device),
        "cu_seqlens": bounds.to(device),
        "max_seqlen": max(lengths),
    }


def padded_inputs(texts: Sequence[np.ndarray], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids and attention_mask [B, S], padded on the right."""
    lengths_B = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    mask_BS = np.arange(lengths_B.max()) < lengths_B[:, None]
    ids_BS = np.full(mask_BS.shape, pad_token_id, dtype=np.int64)
    ids_BS[mask_BS] = np.concatenate(texts)
    mask = torch.from_numpy(mask_BS.astype(np.int64)).to(device)
    return {"input_ids": torch.from_numpy(ids_BS).to(device), "attention_mask": mask}


def pool_flat(hidden_TH: Tensor, cu_seqlens: Tensor, strategy: PoolingStrategy) -> Tensor:
    """Pool a flat stream [T, H] into [B, H] as `craft.pooling.pool_hidden_states` does rows; no text may be empty.

    Sums are made text by text in float32 (float64 stays), so that a text's vector does not depend on its neighbours.
    """
    check_strategy(strategy)
    starts_B, ends_B = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if strategy == "cls":
        return hidden_TH[starts_B]
    if strategy == "last_token":
        return hidden_TH[ends_B - 1]
    values_TH = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
    lengths_B = ends_B - starts_B
    total_B = lengths_B
    if strategy == "weighted_mean":
        first_T = starts_B.repeat_interleave(lengths_B)
        ranks_T = torch.arange(1, len(values_TH) + 1, device=first_T.device) - first_T
        values_TH = values_TH * ranks_T.unsqueeze(1).to(values_TH.dtype)
        total_B = lengths_B * (lengths_B + 1) // 2
    sum_BH = torch.segment_reduce(values_TH, "sum", lengths=lengths_B, axis=0)
    return (sum_BH / total_B.unsqueeze(1).to(sum_BH.dtype)).to(hidden_TH.dtype)


class Dropout:
    """The dropout layers of a model, which SimCSE gives another probability in some steps.

    What is in use stays so until it is changed: backward encodes again, in GradCache and in gradient checkpointing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]

    def use(self, probability: float | None) -> None:
        """Give every layer this probability; None: its own."""
        for layer, own in self.layers:
            layer.p = own if probability is None else probability


def longest_text(config: Any) -> int | None:
    """How many tokens the model's positions reach; None where they have no end."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return None
    # RoBERTa's family counts positions from the padding token's id on.
    offset = config.pad_token_id + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0
    return int(longest) - offset


_POSITIONS_AFTER_PADDING: Mapping[str, None] = dict.fromkeys(
    ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer", "mpnet")
)
