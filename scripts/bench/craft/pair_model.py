"""The encoder and the pairs of texts that GradCache is measured on, and how they are handed to other processes.

The encoder is a BERT of 2 layers, hidden size 256 and a vocabulary of 4,096, without dropout, with mean pooling and a
linear head. Batches: "ragged" has 256 pairs of 4 to 32 tokens a side, "equal" 256 pairs of 18.
"""

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

VOCABULARY = 4096
PAIRS = 256
CHUNK = 8  # rows
TEMPERATURE = 0.05
LENGTHS = {"ragged": (4, 32), "equal": (18, 18)}
SIDES = ("anchor", "positive")

Side = dict[str, Tensor]  # input_ids and attention_mask [B, T]


def new_encoder(seed: int = 0) -> BertModel:
    """Random weights, the same at each call."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def new_head(seed: int = 0) -> nn.Linear:
    """Random weights, the same at each call."""
    torch.manual_seed(seed)
    return nn.Linear(256, 256)


def random_pairs(pairs: int, lengths: tuple[int, int], seed: int = 0) -> list[Side]:
    """Anchors and positives of random tokens, padded on the right."""
    draw = random.Random(seed)
    tokens = range(5, VOCABULARY)
    return [_padded([draw.choices(tokens, k=draw.randint(*lengths)) for _ in range(pairs)]) for _ in SIDES]


def _padded(rows: list[list[int]]) -> Side:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def hand_over(directory: Path, encoder: nn.Module, head: nn.Module) -> None:
    """Write encoder, head and batches for another process."""
    save_file(encoder.state_dict(), directory / "model.safetensors")
    save_file(head.state_dict(), directory / "head.safetensors")
    for name, lengths in LENGTHS.items():
        sides = zip(SIDES, random_pairs(PAIRS, lengths), strict=True)
        save_file({f"{side}.{key}": x for side, own in sides for key, x in own.items()}, directory / f"{name}.pairs")


def take_over(directory: Path, name: str) -> list[Side]:
    """Read a batch that hand_over wrote."""
    tensors = load_file(directory / f"{name}.pairs")
    return [{key: tensors[f"{side}.{key}"] for key in ("input_ids", "attention_mask")} for side in SIDES]
