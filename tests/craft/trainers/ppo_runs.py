"""PPO runs on a tiny model: what their tests share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_runs import tiny_llama

from craft.ppo.config import PPOConfig
from craft.trainers.ppo import PPOTrainer

TARGET = 70  # a byte's token
WORDS = ("one", "two two", "three", "four four four", "five", "six", "seven", "eight")


def share_of_target(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The share of a completion's tokens that are the target; the end token counts among them."""
    return [sum(token == TARGET for token in ids) / len(ids) for ids in completion_ids]


def letters(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward that differs between almost all completions."""
    return [sum(token % 7 for token in ids) / 10 for ids in completion_ids]


def prompt_rows(count: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": f"{WORDS[n % 8]} {n}", "number": n} for n in range(count)])


def settings(output_dir: Path, **config: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **config,
    }


def make_ppo(
    output_dir: Path,
    tokenizer: Any,
    *,
    cls: type = PPOTrainer,
    args_class: type = PPOConfig,
    model: Any = None,
    rows: Any = None,
    reward_funcs: Any = letters,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trainer; keywords are those of its config."""
    return cls(
        model=tiny_llama() if model is None else model,
        reward_funcs=reward_funcs,
        args=args_class(**settings(output_dir, **config)),
        train_dataset=prompt_rows() if rows is None else rows,
        processing_class=tokenizer,
        **(trainer or {}),
    )


def training_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]
