"""Captioners of the embedded models with adapters of random weights, and parameters to evaluate them with."""

from pathlib import Path
from typing import Any

import torch
from tiny_families import tiny_family

from inft.evaluation.captioner import Captioner
from inft.training.adapters import add_adapters
from params import LoRAParams
from params.evaluation import EvalParams, resolve_eval
from params.presets import lora_targets


def adapted(name: str, *, std: float = 0.3) -> Any:
    """The embedded model with adapters that change what it says."""
    family, lora = tiny_family(name), LoRAParams(r=4, alpha=8, dropout=0.0)
    model = add_adapters(family.model(), family.spec, lora, lora_targets(name, "basic", lora), seed=1)
    torch.manual_seed(2)
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=std)
    return model.eval()


def captioner_of(name: str) -> Captioner:
    family = tiny_family(name)
    return Captioner(
        spec=family.spec, processor=family.processor, collator=family.collator(), model=adapted(name), adapted=True
    )


def eval_params(model: str = "llama32", adapter: Path | None = None, **changes: Any) -> EvalParams:
    """Parameters of an evaluation of the embedded model on drawn scenes; ``changes`` as resolve_eval takes them."""
    flags = {"data": "sample", "languages": "en,ur", "max_new_tokens": "12", **changes.pop("flags", {})}
    common = {"demo": True, "limit": 6, "batch_size": 4, "resamples": 50, **changes}
    return resolve_eval(model, adapter=str(adapter) if adapter else None, flags=flags, **common)
