"""Models of one size and drawn documents for the benchmarks of encoders."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from inft.encoders.data.flat import FlatBatch, flatten
from inft.encoders.data.packing import Packer, Piece
from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM

VOCABULARY, HIDDEN, LAYERS, HEADS = 30_528, 384, 6, 6
CONTEXT = 256  # tokens of the longest document
ROWS = 16  # documents of a micro-batch
MASKED = 0.15  # share of the tokens that are predicted
SPECIAL = 5  # first token that is no special one

# Tokens of a document: median and spread of a log-normal distribution, cut to 8 … CONTEXT.
LENGTHS = {"short": (48, 0.8), "medium": (128, 0.5)}


def neobert() -> NeoBERTForMaskedLM:
    torch.manual_seed(0)
    config = NeoBERTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=CONTEXT,
    )
    return NeoBERTForMaskedLM(config)


def modernbert() -> ModernBertForMaskedLM:
    """The same layers, width and vocabulary, with transformers' defaults for all else."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=8 * HIDDEN // 3,
        max_position_embeddings=CONTEXT,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    return ModernBertForMaskedLM(config)


def draw(count: int, lengths: str | int) -> list[Piece]:
    """Masked documents of a distribution's lengths, or all of one length."""
    generator = np.random.default_rng(0)
    if isinstance(lengths, int):
        sizes = np.full(count, lengths)
    else:
        median, spread = LENGTHS[lengths]
        sizes = np.clip(generator.lognormal(np.log(median), spread, count).astype(int), 8, CONTEXT)
    pieces = []
    for key, size in enumerate(sizes):
        tokens = generator.integers(SPECIAL, VOCABULARY, size).astype(np.int32)
        chosen = generator.random(size) < MASKED
        labels = np.where(chosen, tokens, -100).astype(np.int32)
        inputs = np.where(chosen, SPECIAL - 1, tokens).astype(np.int32)
        pieces.append(Piece(input_ids_T=inputs, labels_T=labels, key=key, piece=0, language=None))
    return pieces


def rows_of(pieces: Sequence[Piece]) -> list[Sequence[Piece]]:
    return [pieces[start : start + ROWS] for start in range(0, len(pieces), ROWS)]


def packed(pieces: Sequence[Piece]) -> list[FlatBatch]:
    """All documents in as few batches of ROWS sequences of CONTEXT tokens as the packer needs."""
    packer = Packer(sequences=ROWS, capacity=CONTEXT)
    for piece in pieces:
        packer.add(piece)
    batches = []
    while packer.pool:
        batches.append(flatten([piece for sequence in packer.pack() for piece in sequence]))
    return batches


def padded(pieces: Sequence[Piece], width: int | None = None) -> dict[str, Tensor]:
    """Input ids, attention mask and labels, padded to a width or to the longest document."""
    width = width or max(map(len, pieces))

    def rows(values: list[np.ndarray], fill: int) -> Tensor:
        tensors = [torch.from_numpy(value).long() for value in values]
        return torch.stack([F.pad(tensor, (0, width - len(tensor)), value=fill) for tensor in tensors])

    return {
        "input_ids": rows([piece.input_ids_T for piece in pieces], 0),
        "attention_mask": rows([np.ones(len(piece)) for piece in pieces], 0),
        "labels": rows([piece.labels_T for piece in pieces], -100),
    }
