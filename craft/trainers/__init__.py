"""Trainers with CRAFT: the mixin for any Trainer and one trainer per file, imported when they are asked for."""

import importlib
from typing import Any

from craft.config import _TRL_VERSION

_MODULES = {
    "CRAFTTrainerMixin": "craft.trainers.mixin",
    "CRAFTPlan": "craft.trainers.plan",
    "CRAFTJointMixin": "craft.trainers.joint",
    "CRAFTSFTTrainer": "craft.trainers.sft",
    "CRAFTDPOTrainer": "craft.trainers.dpo",
    "CRAFTORPOTrainer": "craft.trainers.orpo",
    "CRAFTGRPOTrainer": "craft.trainers.grpo",
    "CRAFTPPOTrainer": "craft.trainers.ppo",
    "CRAFTRLOOTrainer": "craft.trainers.rloo",
    "CRAFTKTOTrainer": "craft.trainers.kto",
    "CRAFTRewardTrainer": "craft.trainers.reward",
}

# And the trainer of TRL that it extends.
_OF_TRL = {
    "CRAFTSFTTrainer": "trl.SFTTrainer",
    "CRAFTDPOTrainer": "trl.DPOTrainer",
    "CRAFTORPOTrainer": "trl.experimental.orpo.ORPOTrainer",
    "CRAFTGRPOTrainer": "trl.GRPOTrainer",
    "CRAFTRLOOTrainer": "trl.RLOOTrainer",
    "CRAFTKTOTrainer": "trl.KTOTrainer",
    "CRAFTRewardTrainer": "trl.RewardTrainer",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a trainer when it is asked for; ImportError naming the version of TRL for one that needs it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ImportError as error:
        if name not in _OF_TRL or (error.name or "").partition(".")[0] != "trl":
            raise
        raise ImportError(
            f"{name} needs {_OF_TRL[name]} of TRL {_TRL_VERSION} or newer: pip install 'trl>={_TRL_VERSION}'."
        ) from error
