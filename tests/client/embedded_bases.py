"""Bases of a training client: the embedded models, and one that counts positions from the start of its row."""

from functools import lru_cache

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from inft.client.bases import Base, Bases
from params.client import EngineParams


@lru_cache
def embedded_base(family: str) -> Base:
    """The embedded model of a family; one for all tests of a file, which leave it as it is."""
    return Bases(EngineParams(device="cpu")).get(f"embedded/{family}")


@lru_cache
def absolute_base() -> Base:
    """A random GPT-2 under the embedded text tokenizer: its positions are absolute, so a shift changes its logits.

    The embedded models turn by distances between tokens, and would not tell.
    """
    text = embedded_base("text")
    config = GPT2Config(vocab_size=text.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = text.tokenizer.eos_token_id
    return Base(name="absolute", spec=text.spec, model=model, processor=text.processor, fingerprint="")
