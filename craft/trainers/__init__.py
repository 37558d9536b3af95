"""Trainers with CRAFT: the mixin for any Trainer and one trainer per file, imported when they are asked for."""

import importlib
from typing import Any

_MODULES = {
    "CRAFTTrainerMixin": "craft.trainers.mixin",
    "CRAFTPlan": "craft.trainers.plan",
    "CRAFTSFTTrainer": "craft.trainers.sft",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a trainer when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return getattr(importlib.import_module(_MODULES[name]), name)
