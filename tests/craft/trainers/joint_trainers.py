"""Trainers of preferences and rewards on a tiny model, with CRAFT and without, for the tests of joint mode."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tiny_runs import pair_rows, tiny_llama
from transformers import AutoModelForSequenceClassification, LlamaConfig
from trl.experimental.orpo import ORPOTrainer

import craft

PLAIN: dict[str, type] = {
    "dpo": trl.DPOTrainer,
    "orpo": ORPOTrainer,
    "kto": trl.KTOTrainer,
    "reward": trl.RewardTrainer,
    "grpo": trl.GRPOTrainer,
    "rloo": trl.RLOOTrainer,
}
NAMES = {"dpo": "DPO", "orpo": "ORPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
GENERATING = ("grpo", "rloo")
WORDS = (
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "two",
    "three",
    "left",
    "above",
    "tiny",
    "huge",
    "cat",
    "dog",
)

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}
OWN: dict[str, dict[str, Any]] = {
    "dpo": {"activation_checkpointing": False},
    "orpo": {"max_length": 64, "disable_dropout": True},
    "kto": {"activation_checkpointing": False},
    "reward": {"activation_checkpointing": False},
    "grpo": {"num_generations": 2, "max_completion_length": 6, "activation_checkpointing": False},
    # Its reference is read from a path otherwise, which a model made here has not.
    "rloo": {"num_generations": 2, "max_completion_length": 6, "activation_checkpointing": False, "beta": 0.0},
}


def phrase(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(1, 5)))


def preference_rows(count: int, *, seed: int = 0) -> Dataset:
    """Prompts with a chosen and another answer of different lengths."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        chosen = f"{phrase(draw)} {number}"
        rows.append({"prompt": f"{phrase(draw)}?", "chosen": chosen, "rejected": f"{phrase(draw)}."})
    return Dataset.from_list(rows)


def method_rows(method: str, count: int = 24) -> Dataset:
    """Rows in the form that a method takes."""
    rows = preference_rows(count)
    if method in GENERATING:
        return rows.select_columns(["prompt"])
    if method == "kto":
        labelled = [
            {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
            for n, row in enumerate(rows)
        ]
        return Dataset.from_list(labelled)
    return rows


def vowels(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that differs between completions."""
    return [sum(character in "aeiou" for character in text) + len(text) / 100 for text in completions]


def make_joint(
    method: str,
    output_dir: Path,
    tokenizer: Any,
    *,
    strategy: str | None = "self_align",  # None: the plain trainer of TRL
    model: Any = None,
    rows: Dataset | None = None,
    pairs: Dataset | None = None,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trainer of ``method``; keywords are those of its config."""
    plain = strategy is None
    args_class = getattr(craft, f"CRAFT{NAMES[method]}Config")
    cls = PLAIN[method] if plain else getattr(craft, f"CRAFT{NAMES[method]}Trainer")
    if model is None:
        model = tiny_llama() if method != "reward" else tiny_reward_model()
    given: dict[str, Any] = {"reward_funcs": vowels} if method in GENERATING else {}
    if strategy == "paired_dataset":
        given["contrastive_dataset"] = pair_rows(10) if pairs is None else pairs
    return cls(
        model=model,
        args=args_class(output_dir=str(output_dir), **{**SETTINGS, **OWN[method], **config}),
        train_dataset=method_rows(method) if rows is None else rows,
        processing_class=tokenizer,
        **{**given, **(trainer or {})},
        **({"ref_model": tiny_llama()} if method in ("dpo", "kto") and "ref_model" not in (trainer or {}) else {}),
    )


def tiny_reward_model() -> Any:
    config: LlamaConfig = tiny_llama().config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)
