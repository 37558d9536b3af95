"""One micro-batch as a flat stream of tokens.

Axes: T tokens of all documents in a row, N documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inft.encoders.data.masking import IGNORED
from inft.encoders.data.packing import MIN_TOKENS, Piece


@dataclass(frozen=True, kw_only=True)
class FlatBatch:
    """Documents that follow each other without padding; no document sees another.

    With static shapes padding stands at the end as further documents of at most ``max_seqlen`` tokens, and cu_seqlens
    repeats its last value: documents without a token. ``cu_seqlens[len(keys)]`` is always ``tokens``.
    """

    input_ids_T: Tensor  # int64
    labels_T: Tensor  # int64, -100 where nothing is predicted
    position_ids_T: Tensor  # int64, from 0 in every document
    cu_seqlens: Tensor  # int32 [N + 1]: 0 … T
    max_seqlen: int  # tokens of the longest document; with static shapes max_seq_length
    tokens: int  # real ones
    masked: int  # predicted ones
    languages: tuple[str | None, ...]  # of the real documents
    keys: tuple[int, ...]  # of the real documents; pieces of one share it

    @property
    def weight(self) -> int:
        """What the loss is a sum over: the predicted tokens."""
        return self.masked

    def to(self, device: torch.device | str) -> "FlatBatch":
        """The batch on a device; from page-locked memory the copy runs alongside."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()})

    def pin_memory(self) -> "FlatBatch":
        """The batch in page-locked memory; needs CUDA."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        names = ("input_ids_T", "labels_T", "position_ids_T", "cu_seqlens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class StaticShape:
    """What every batch of a compiled run is padded to."""

    tokens: int
    documents: int  # N
    max_length: int  # tokens of the longest document, and of padding
    pad_token_id: int


def static_shape(*, sequences: int, capacity: int, packed: bool, pad_token_id: int) -> StaticShape:
    """The shape that holds every batch of ``sequences`` documents or packed sequences, with its padding."""
    real = sequences * (max(1, capacity // MIN_TOKENS) if packed else 1)
    return StaticShape(
        tokens=sequences * capacity, documents=real + sequences, max_length=capacity, pad_token_id=pad_token_id
    )


def flatten(pieces: Sequence[Piece], shape: StaticShape | None = None) -> FlatBatch:
    """Put documents into one stream in their order, padded to a static shape where one is given."""
    lengths = [len(piece) for piece in pieces]
    tokens = sum(lengths)
    if shape is not None:
        lengths = [*lengths, *_padding(shape, tokens)]
    ends = np.cumsum([0, *lengths])
    total = int(ends[-1])
    input_ids = np.full(total, 0 if shape is None else shape.pad_token_id, np.int64)
    labels = np.full(total, IGNORED, np.int64)
    if pieces:
        input_ids[:tokens] = np.concatenate([piece.input_ids_T for piece in pieces])
        labels[:tokens] = np.concatenate([piece.labels_T for piece in pieces])
    positions = np.arange(total) - np.repeat(ends[:-1], lengths)
    if shape is not None:
        ends = np.concatenate([ends, np.full(shape.documents + 1 - len(ends), total)])
    return FlatBatch(
        input_ids_T=torch.from_numpy(input_ids),
        labels_T=torch.from_numpy(labels),
        position_ids_T=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_seqlen=max(lengths, default=0) if shape is None else shape.max_length,
        tokens=tokens,
        masked=int((labels != IGNORED).sum()),
        languages=tuple(piece.language for piece in pieces),
        keys=tuple(piece.key for piece in pieces),
    )


def rounded_up(batch: FlatBatch, multiple: int, pad_token_id: int) -> FlatBatch:
    """The batch with padding at its end up to a multiple of tokens, as low precision needs.

    The padding is documents of its own, none longer than those of the batch: learned positions may end there.
    """
    total = len(batch.input_ids_T)
    padding = -total % multiple
    if not padding:
        return batch
    ends = [*range(batch.max_seqlen, padding, batch.max_seqlen), padding]
    more = torch.tensor([total + end for end in ends], dtype=batch.cu_seqlens.dtype)
    return replace(
        batch,
        input_ids_T=F.pad(batch.input_ids_T, (0, padding), value=pad_token_id),
        labels_T=F.pad(batch.labels_T, (0, padding), value=IGNORED),
        position_ids_T=torch.cat([batch.position_ids_T, torch.arange(padding) % batch.max_seqlen]),
        cu_seqlens=torch.cat([batch.cu_seqlens, more]),
    )


def _padding(shape: StaticShape, tokens: int) -> list[int]:
    """The lengths of the documents that fill a batch up."""
    full, rest = divmod(shape.tokens - tokens, shape.max_length)
    return [shape.max_length] * full + [rest] * (rest > 0)
