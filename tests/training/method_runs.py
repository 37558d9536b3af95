"""What a run of each method left in its log and its directory."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from inft.training.runlog import read_events
from params import TrainParams

QUIET = Console(quiet=True)
PREFERENCES = ("dpo", "orpo")
REWARDED = ("grpo", "ppo")
METHODS = (*PREFERENCES, *REWARDED)


def events(params: TrainParams, kind: str) -> list[dict[str, Any]]:
    log = Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl"
    return [event for event in read_events(log) if event["event"] == kind]


def figures(params: TrainParams) -> dict[int, dict[str, Any]]:
    """Step -> what was logged of it, without clocks."""
    clocks = ("time", "run", "tokens_per_second", "step_time")
    return {e["step"]: {k: v for k, v in e.items() if k not in clocks} for e in events(params, "log")}


def adapter(params: TrainParams) -> dict[str, torch.Tensor]:
    return load_file(Path(params.best_model_dir) / "adapter_model.safetensors")
