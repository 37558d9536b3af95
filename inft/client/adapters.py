"""LoRA adapters of many clients on one model: PEFT's layers, found, made and switched one adapter at a time.

Axes: I and O the inputs and outputs of a layer, R the rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inft.client.dropout import Masks, SeededDropout
from inft.training.adapters import exact_pattern
from inft.training.quiet import quietly
from params.client import LoRAConfig

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PREFIX = "base_model.model."  # of the names in PEFT's files


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """One client's adapter in the model."""

    name: str
    layers: Sequence[Any]  # of PEFT, those that carry it
    parameters: dict[str, nn.Parameter]  # by the names of adapter_model.safetensors
    masks: Masks
    settings: "LoraConfig"  # as adapter_config.json has it

    def activate(self) -> None:
        """Let the layers add this adapter, and it alone, and let its weights have gradients."""
        for layer in self.layers:
            # layer.set_adapter does the same by walking through every other client's adapter too.
            layer._active_adapter = [self.name]
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def deactivate(self) -> None:
        """Let the layers be those of the plain base."""
        for layer in self.layers:
            layer._active_adapter = []
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)


def adapter_settings(lora: LoRAConfig, names: Sequence[str]) -> "LoraConfig":
    """Return PEFT's configuration of an adapter on exactly the layers `names`."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=exact_pattern(names),
    )


def inject(
    model: Any, wrapped: "PeftModel | None", name: str, names: Sequence[str], settings: "LoraConfig"
) -> "PeftModel":
    """Put an adapter into the layers `names`; `wrapped` is what the first call returned."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    # PEFT draws first weights from torch's global generator: they are replaced, and the generator is put back.
    with quietly(), torch.random.fork_rng(devices=[]):
        if wrapped is None:
            return get_peft_model(model, settings, adapter_name=name)
        layers = [model.get_submodule(path) for path in names]
        if not all(isinstance(layer, LoraLayer) for layer in layers):
            wrapped.add_adapter(name, settings)
            return wrapped
        # What add_adapter does with layers that are PEFT's already, without its search through every adapter's parts,
        # which takes seconds where there are dozens.
        wrapped.peft_config[name] = settings
        for path, layer in zip(names, layers, strict=True):
            layer.update_layer(name, settings.r, lora_alpha=settings.lora_alpha, config=settings, target_name=path)
    return wrapped


def injected(model: nn.Module, name: str, names: Sequence[str], settings: "LoraConfig", *, seed: int) -> Adapter:
    """Return an adapter that `inject` put into the layers `names`, inactive, with weights that follow from the seed."""
    layers = [model.get_submodule(path) for path in names]
    masks = Masks(next(model.parameters()).device)
    parameters: dict[str, nn.Parameter] = {}
    for path, layer in zip(names, layers, strict=True):
        for part in ("lora_A", "lora_B"):
            linear = getattr(layer, part)[name]
            linear.float()
            parameters[f"{PREFIX}{path}.{part}.weight"] = linear.weight
        if settings.lora_dropout > 0:
            layer.lora_dropout[name] = SeededDropout(settings.lora_dropout, masks)
    _set_first_weights(parameters, seed)
    adapter = Adapter(name=name, layers=layers, parameters=parameters, masks=masks, settings=settings)
    adapter.deactivate()
    return adapter


def discard(model: nn.Module, wrapped: "PeftModel | None", name: str, names: Sequence[str]) -> None:
    """Take out of the layers `names` whatever of an adapter a creation that failed has put there."""
    from peft.tuners.lora import LoraLayer

    for path in names:
        layer = model.get_submodule(path)
        if isinstance(layer, LoraLayer):
            layer._active_adapter = []  # else PEFT makes another client's adapter the active one
            layer.delete_adapter(name)
            if wrapped is None:  # it was the first, and the model is to be no PEFT's yet
                model.set_submodule(path, layer.get_base_layer())
    if wrapped is not None:
        wrapped.peft_config.pop(name, None)


@torch.no_grad()
def _set_first_weights(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """A uniform within ±1/√I, B zero, as PEFT does (Hu et al. 2021, section 4.1); drawn on the CPU for all devices."""
    draw = torch.Generator().manual_seed(seed)
    for key, weight in parameters.items():
        if "lora_B" in key:
            weight.zero_()
            continue
        bound = 1 / math.sqrt(weight.shape[1])
        weight.copy_(torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=draw))
