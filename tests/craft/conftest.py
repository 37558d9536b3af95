"""A byte tokenizer with a chat template, and a Llama of 35,000 random weights that reads its tokens."""

from collections.abc import Callable

import pytest
import torch
from tiny_policies import llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(make_byte_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8 and each special token; <|end|> ends texts and turns."""
    return make_byte_tokenizer(TEMPLATE)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return llama()
