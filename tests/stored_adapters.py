"""Adapters of the embedded models, with random weights, stored as inft stores them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny_families import tiny_family

from inft.models.loading import load_model
from inft.models.weights import weights_fingerprint
from inft.training.adapters import add_adapters
from inft.training.best import BestRecord, config_sha256, store_best
from params.presets import lora_targets
from params.resolve import resolve_train

STEP = 7


def store_adapter(
    directory: Path,
    name: str,
    *,
    model_name: str = "",
    dtype: str = "float32",
    quantised: bool = False,
    std: float = 0.05,
    **lora: Any,
) -> PeftModel:
    """Store an adapter of rank 4 on every layer that the advanced mode adapts; returns the model with it."""
    overrides = [f"basic.dtype={dtype}", f"qlora.load_in_4bit={quantised}"]
    params = resolve_train(name, training_mode="advanced", demo=True, overrides=overrides)
    params = replace(params, model_name=model_name, lora=replace(params.lora, **{"r": 4, "alpha": 8, **lora}))
    family = tiny_family(name)
    base = load_model(family.spec, model_name, basic=params.basic)
    targets = lora_targets(name, "advanced", params.lora)
    model = add_adapters(base, family.spec, params.lora, targets, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=std, generator=draw)
    record = BestRecord(
        step=STEP,
        metric="eval_loss",
        value=0.5,
        why="lowest loss of a test",
        model=name,
        base_model=model_name,
        base_config_sha256=config_sha256(base.config),
        params=asdict(params),
        base_weights_sha256=weights_fingerprint(base.name_or_path),
    )
    store_best(model, family.processor, directory, record, initial=None)
    return model.eval()
