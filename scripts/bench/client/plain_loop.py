"""What a user would write without a training client: transformers, PEFT and torch, and nothing around them."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from inft.models.loading import EMBEDDED

Rows = Mapping[str, list[list[int]]]
TARGETS = ["q_proj", "v_proj", "k_proj", "o_proj"]
RATE = 1e-4
LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": TARGETS}  # the guide's
CONFIG = {"model_ref": "embedded/text", "lora_config": LORA, "optimizer": {"learning_rate": RATE}, "seed": 1}


def rows_of(rows: int, tokens: int, *, seed: int = 0) -> dict[str, list[list[int]]]:
    """Token rows as a user has them, in lists."""
    drawn = torch.randint(5, 1000, (rows, tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": drawn, "attention_mask": [[1] * tokens] * rows, "labels": drawn}


def lora_model(source: str = str(EMBEDDED / "text"), *, dropout: float = 0.05) -> Any:
    """A frozen causal language model with the guide's adapter."""
    base = AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


class PlainLoop:
    """One model, one optimizer, one step at a time."""

    def __init__(self, source: str = str(EMBEDDED / "text")) -> None:
        self.model = lora_model(source)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)

    def step(self, rows: Rows) -> float:
        """Take a step; return its loss."""
        loss = self.model(**{name: torch.tensor(values) for name, values in rows.items()}, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
