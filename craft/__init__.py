"""Contrastive terms for any trainer (CRAFT): InfoNCE on top of fine-tuning."""

import importlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

# Public name -> module; nothing is imported before it is asked for.
_MODULES: Mapping[str, str] = {
    "InfoNCELoss": "craft.losses",
    "ProjectionHead": "craft.losses",
    "pool_hidden_states": "craft.losses",
    "CRAFTConfigMixin": "craft.config",
    "CRAFTSFTConfig": "craft.config",
    "CRAFTORPOConfig": "craft.config",
    "CRAFTGRPOConfig": "craft.config",
    "CRAFTPPOConfig": "craft.config",
    "CRAFTDPOConfig": "craft.config",
    "CRAFTRLOOConfig": "craft.config",
    "CRAFTKTOConfig": "craft.config",
    "CRAFTRewardConfig": "craft.config",
    "CRAFT_PRESETS": "craft.config",
    "get_preset": "craft.config",
    "auto_configure": "craft.config",
    "craft_settings": "craft.config",
    "CRAFTDatasetBundle": "craft.data",
    "CRAFTCollator": "craft.data",
    "CRAFTMixedDataLoader": "craft.data",
    "make_craft_datasets": "craft.data",
    "tokenize_pairs": "craft.pairs",
    "compute_contrastive_accuracy": "craft.metrics",
    "compute_representation_consistency": "craft.metrics",
    "update_representation_reference": "craft.metrics",
    "CRAFTSFTTrainer": "craft.trainers",
    "CRAFTORPOTrainer": "craft.trainers",
    "CRAFTGRPOTrainer": "craft.trainers",
    "CRAFTPPOTrainer": "craft.trainers",
    "CRAFTDPOTrainer": "craft.trainers",
    "CRAFTRLOOTrainer": "craft.trainers",
    "CRAFTKTOTrainer": "craft.trainers",
    "CRAFTRewardTrainer": "craft.trainers",
    "CRAFTJointMixin": "craft.trainers",
    "CRAFTTrainerMixin": "craft.trainers",
    "CRAFTGradientAccumulator": "craft.accumulator",
    "AccumulationScales": "craft.accumulator",
    "compute_batch_distribution": "craft.accumulator",
    "LastHiddenStateHook": "craft.hooks",
    "get_backbone": "craft.hooks",
    "GradCacheContrastiveLoss": "craft.gradcache",
    "GradCacheConfig": "craft.gradcache",
    "CachedEmbeddingBank": "craft.gradcache",
    "GradientBalancer": "craft.gradient_balancing",
    "LossScaleBalancer": "craft.gradient_balancing",
    "UncertaintyWeightingBalancer": "craft.gradient_balancing",
    "GradNormBalancer": "craft.gradient_balancing",
    "PCGradBalancer": "craft.gradient_balancing",
    "create_gradient_balancer": "craft.gradient_balancing",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("inft")  # the distribution that craft comes in
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
