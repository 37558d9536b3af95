"""Tiny models, tokenised rows of many lengths, and trainers on them whose gradients can be looked at."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from craft.config import CRAFTSFTConfig
from craft.trainers import CRAFTSFTTrainer


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's machine: it writes to ./outputs, and has a GPU. Without one TRL's own default, bf16, is refused until
    use_cpu=True, which would have to be written into every block; here the CPU takes it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


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


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """tiny_llama(dtype=…, dropout=…, seed=…): 35,000 random weights."""
    return tiny_llama


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


@pytest.fixture
def rows() -> Callable[..., Dataset]:
    """prompt_rows(count, seed=…)."""
    return prompt_rows


@pytest.fixture
def pairs() -> Callable[..., Dataset]:
    """pair_rows(count, seed=…)."""
    return pair_rows


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


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., CRAFTSFTTrainer]:
    """A CRAFTSFTTrainer of the tiny model; keywords are those of the config, except the trainer's own."""

    def make(
        train_dataset: Dataset,
        contrastive_dataset: Dataset | None = None,
        *,
        model: Any = None,
        cls: type = CRAFTSFTTrainer,
        trainer: dict[str, Any] | None = None,
        **config: Any,
    ) -> CRAFTSFTTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "bf16": False,
            "activation_checkpointing": False,
            "gradient_checkpointing": False,
        }
        args = CRAFTSFTConfig(**{**settings, **config})
        return cls(
            model=tiny_llama() if model is None else model,
            args=args,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            contrastive_dataset=contrastive_dataset,
            **(trainer or {}),
        )

    return make
