"""Tiny models, tokenised rows of many lengths, and trainers on them whose gradients can be looked at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import Spy, pair_rows, prompt_rows, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """tiny_llama(dtype=…, dropout=…, seed=…): 35,000 random weights."""
    return tiny_llama


@pytest.fixture
def rows() -> Callable[..., Dataset]:
    """prompt_rows(count, seed=…)."""
    return prompt_rows


@pytest.fixture
def pairs() -> Callable[..., Dataset]:
    """pair_rows(count, seed=…)."""
    return pair_rows


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
