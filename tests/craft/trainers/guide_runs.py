"""What the tests of the guide's code and of its sentences share."""

import math
from typing import Any

from craft.config import CRAFTSFTConfig

LOG_KEYS = {
    "loss/craft_sft",
    "loss/craft_contrast",
    "loss/craft_total",
    "metrics/craft_contrastive_accuracy",
    "metrics/craft_representation_consistency",
}


def config(**changes: Any) -> CRAFTSFTConfig:
    settings = {"output_dir": "./outputs", "max_steps": 3, "logging_steps": 3, "disable_tqdm": True, "use_cpu": True}
    return CRAFTSFTConfig(**{**settings, **changes})


def finite_logs(trainer: Any) -> list[dict[str, float]]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    return logs
