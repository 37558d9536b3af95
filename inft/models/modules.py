"""A model's linear layers by part, from its configuration alone: shapes on the meta device, no weights."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inft.models.loading import find_source, read_config
from inft.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

OTHER = "other"  # the part of linear layers that no pattern of the family matches


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """Linear layers of one part whose names differ in numbers only."""

    part: str
    pattern: str  # the name with every number written N: "model.language_model.layers.N.mlp.up_proj"
    count: int
    shapes: tuple[tuple[int, int], ...]  # (inputs, outputs), each once


def meta_model(spec: ModelSpec, name: str) -> "PreTrainedModel":
    """Return a model without weights: of a released hub id (no hub needed), a path, another hub id, or "" embedded."""
    import torch
    import transformers

    released = spec.released.get(name)
    config = released() if released else read_config(spec, find_source(spec, name))
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, spec.auto_class).from_config(config)
    return model


def linear_modules(model: "nn.Module") -> dict[str, "nn.Module"]:
    """Return each linear layer by its name in the base model, whether or not adapters are wrapped around it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not re.search(r"\.lora_\w+\.", name):
            found[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = module
    return found


def list_linear_modules(model: "nn.Module") -> list[str]:
    """Return the full names of a model's linear layers: what LoRA targets can match."""
    return list(linear_modules(model))


def part_of(name: str, spec: ModelSpec) -> str:
    """Return the part of the family that a linear layer belongs to."""
    return next((part for part, pattern in spec.parts.items() if re.fullmatch(pattern, name)), OTHER)


def shape_of(module: "nn.Module") -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer, also of one whose weight is packed in 4 bit."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def linear_groups(model: "nn.Module", spec: ModelSpec) -> list[LinearGroup]:
    """Return the linear layers grouped by part and pattern, parts in the family's reading order, `other` last."""
    order = [*spec.parts, OTHER]
    groups: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for name, module in linear_modules(model).items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)
        groups.setdefault((order.index(part_of(name, spec)), pattern), []).append(shape_of(module))
    return [
        LinearGroup(part=order[rank], pattern=pattern, count=len(shapes), shapes=tuple(dict.fromkeys(shapes)))
        for (rank, pattern), shapes in sorted(groups.items(), key=lambda item: item[0][0])
    ]
