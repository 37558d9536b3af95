"""Encoders of a few hundred weights, ragged rows for them, and their gradients, for the tests of GradCache."""

import itertools

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from craft.pooling import pool_hidden_states

VOCABULARY = 40


class Tiny(nn.Module):
    """A backbone of a few hundred weights in which tokens see each other; the mask keeps padding out."""

    def __init__(self, size=6, dropout=0.3):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size)
        self.mix = nn.Linear(size, size)
        self.drop = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask):
        x_BTH = self.drop(self.embed(input_ids)) * attention_mask.unsqueeze(-1)
        return torch.tanh(self.mix(x_BTH + x_BTH.sum(1, keepdim=True)))


def mean_pool(hidden_BTH, mask_BT):
    return pool_hidden_states(hidden_BTH, mask_BT, "mean")


def make_rows(lengths, *, left=False, seed=0, width=None):
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.tensor(lengths)
    width = width or int(lengths_B.max())
    mask_BT = (torch.arange(width) < lengths_B[:, None]).long()
    if left:
        mask_BT = mask_BT.flip(1)
    return {
        "input_ids": torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator) * mask_BT,
        "attention_mask": mask_BT,
    }


def gradients(*modules):
    parameters = itertools.chain.from_iterable(module.parameters() for module in modules)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()


def clear(*modules):
    for module in modules:
        module.zero_grad(set_to_none=True)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False, attention_dropout=0.2, **options,
    )  # fmt: skip
    return LlamaModel(config).train()
