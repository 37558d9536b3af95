"""A tiny Llama with untrained weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of 35,000 weights, the same each time."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
