"""A tiny model, tokenised rows and pairs of many lengths, and a callback that keeps gradients."""

import random
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback


def tiny_llama(*, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config).to(dtype)


def prompt_rows(count: int, *, seed: int = 0) -> Dataset:
    """Tokenised prompts with answers: input_ids and labels of 6 to 30 tokens."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = draw.choices(range(70, 90), k=draw.randrange(3, 16))
        answer = [*draw.choices(range(100, 140), k=draw.randrange(2, 14)), 0]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def pair_rows(count: int, *, seed: int = 1) -> Dataset:
    """Tokenised pairs of 4 to 24 tokens a side."""
    draw = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "input_ids": draw.choices(range(70, 90), k=draw.randrange(4, 25)),
                "input_ids_tgt": draw.choices(range(100, 140), k=draw.randrange(4, 25)),
            }
            for _ in range(count)
        ]
    )


class Spy(TrainerCallback):
    """Keeps each optimizer step's micro-batches, and the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = [*self.trainer.model.named_parameters(), *self.trainer.craft_loss.named_parameters(prefix="head")]
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def watch(self, trainer: Any) -> "Spy":
        self.trainer = trainer
        fetch = trainer.get_batch_samples

        def watched(*args: Any) -> Any:
            batches, items = fetch(*args)
            self.batches.append([dict(batch) for batch in batches])
            return batches, items

        trainer.get_batch_samples = watched
        trainer.add_callback(self)
        return self
