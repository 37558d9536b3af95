"""What a model reads before its first token: prompts as tokens, padded on the left, with their images."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inft.client.errors import InvalidRequest
from inft.client.losses.inputs import IGNORED
from inft.client.losses.texts import tokenise_texts
from inft.client.vision import TOKENIZER, Images, chat_prompts

if TYPE_CHECKING:
    from inft.client.bases import Base


def prompt_inputs(base: "Base", prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
    """Return what a model reads before its first token: prompts, padded on the left, and their images."""
    if base.spec.takes_images:
        return chat_prompts(base, prompts, images)
    with TOKENIZER:
        contexts = _contexts(base, prompts)
    longest = max(map(len, contexts))
    padding = padding_of(base)
    return {
        "input_ids": torch.tensor([[padding] * (longest - len(ids)) + ids for ids in contexts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in contexts]),
    }


def _contexts(base: "Base", prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of raw prompts, as training rows begin: those that stand before a completion."""
    rows, _, labels = tokenise_texts(
        list(prompts), ["a"] * len(prompts), tokenizer=base.tokenizer, max_length=sys.maxsize
    )
    contexts = [
        row[: next(place for place, label in enumerate(answer) if label != IGNORED)]
        for row, answer in zip(rows, labels, strict=True)
    ]
    for number, ids in enumerate(contexts):
        if max(ids) >= base.vocab_size:
            raise InvalidRequest(
                f"prompts: row {number} has the token {max(ids)}, outside the model's vocabulary of "
                f"{base.vocab_size}: leave that text out.",
                row=number,
            )
    return contexts


def padding_of(base: "Base") -> int:
    """Return the token that stands at padding."""
    padding = base.tokenizer.pad_token_id
    return int(base.tokenizer.eos_token_id if padding is None else padding)
