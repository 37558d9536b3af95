"""LoRA adapters: targets resolved to exact layers, and how much of each part they cover."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inft.models.modules import OTHER, linear_modules, part_of, shape_of
from inft.models.spec import ModelSpec
from params.errors import UserError
from params.lora import LoRAParams

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa"}  # our word -> peft's init_lora_weights


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many linear layers of a part carry an adapter."""

    part: str
    total: int  # linear layers
    adapted: int
    trainable_parameters: int  # of the adapters


def add_adapters(
    model: "PreTrainedModel", spec: ModelSpec, lora: LoRAParams, targets: Sequence[str], *, seed: int
) -> "PeftModel":
    """Return the model with LoRA on exactly the layers that the targets match; the same seed gives the same adapters.

    Errors: UserError for a target that matches nothing or the head, and for PiSSA on 4-bit weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if lora.init == "pissa" and getattr(model, "is_loaded_in_4bit", False):
        raise UserError("lora.init=pissa decomposes the weights, which 4-bit ones do not allow: use --no-quantize.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=INIT[lora.init],
        target_modules=exact_pattern(resolve_targets(model, spec, targets)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def resolve_targets(model: "nn.Module", spec: ModelSpec, targets: Sequence[str]) -> list[str]:
    """Return the full names of the linear layers that some target matches, in the model's order.

    A target of letters, digits, underscores and dots is a plain name: it stands for the layers whose last components
    equal it, those of the vision tower left out. Any other target is a regular expression for the whole name.
    Errors: one UserError that lists every target without a match, with the nearest names, or the head's match.
    """
    names = list(linear_modules(model))
    matches = {target: _matches(target, names, spec) for target in targets}
    dead = [target for target, found in matches.items() if not found]
    if not targets:
        raise UserError("no LoRA target is given: set lora.target_modules.")
    if dead:
        raise UserError("\n".join(_no_match(target, names, spec) for target in dead))
    chosen = set().union(*matches.values())
    head = sorted(name for name in chosen if part_of(name, spec) == "head")
    if head:
        raise UserError(
            f"a LoRA target matches the head {head[0]}, which is not adapted. Leave it out: (?!{head[0]}).*"
        )
    return [name for name in names if name in chosen]


def coverage(
    model: "nn.Module", spec: ModelSpec, targets: Sequence[str], *, lora: LoRAParams | None = None
) -> list[Coverage]:
    """Return the coverage of each part that has linear layers, in reading order.

    Of a model with adapters, what they hold; of one without (also on the meta device), what `lora` would add there.
    """
    modules = linear_modules(model)
    planned = lora or LoRAParams()
    adapted = _adapter_sizes(model)
    if not adapted:
        adapted = {name: _planned_parameters(modules[name], planned) for name in resolve_targets(model, spec, targets)}
    rows = []
    for part in (*spec.parts, OTHER):
        names = [name for name in modules if part_of(name, spec) == part]
        sizes = [adapted[name] for name in names if name in adapted]
        if names:
            rows.append(Coverage(part=part, total=len(names), adapted=len(sizes), trainable_parameters=sum(sizes)))
    return rows


def exact_pattern(names: Iterable[str]) -> str:
    """Return a regular expression that fully matches these names and no others, layer numbers gathered."""
    gathered: dict[tuple[str, str], list[str]] = {}
    for name in names:
        before, number, after = re.fullmatch(r"(?:(.*?)\.(\d+))?(.*)", name).groups()  # type: ignore[union-attr]
        gathered.setdefault((before or "", after), []).append(number or "")
    alternatives = []
    for (before, after), numbers in gathered.items():
        layer = rf"{re.escape(before)}\.(?:{'|'.join(numbers)})" if before else ""
        alternatives.append(layer + re.escape(after))
    return "|".join(alternatives)


def named_layers(target: str, names: Sequence[str], spec: ModelSpec) -> list[str]:
    """Return the layers whose last components equal a plain name, the vision tower's by whole names only."""
    named = [name for name in names if name == target or name.endswith(f".{target}")]
    return [name for name in named if name == target or part_of(name, spec) != "vision"]


def nearest_names(target: str, names: Sequence[str]) -> list[str]:
    """Return the last components of layers that are most like a target that matches none; at most three."""
    tails = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2)}
    return difflib.get_close_matches(target.strip(".*"), sorted(tails), n=3, cutoff=0.4)


def _matches(target: str, names: Sequence[str], spec: ModelSpec) -> list[str]:
    if re.fullmatch(r"[\w.]+", target):
        return named_layers(target, names, spec)
    try:
        return [name for name in names if re.fullmatch(target, name)]
    except re.error as error:
        raise UserError(f"the LoRA target {target!r} is no regular expression: {error}.") from error


def _no_match(target: str, names: Sequence[str], spec: ModelSpec) -> str:
    near = nearest_names(target, names)
    message = f"the LoRA target {target!r} matches no linear layer of {spec.title}."
    if any(name.endswith(f".{target}") for name in names):
        message += f" It names layers of the vision tower only: write .*vision.*\\.{target} if they are meant."
    elif near:
        message += f" Nearest names: {', '.join(near)}."
    projector = [name.removeprefix("model.") for name in names if part_of(name, spec) == "projector"]
    if projector:
        message += f" The projector is {', '.join(projector)}."
    return f"{message} All of them: inft list-modules {spec.name}."


def _adapter_sizes(model: "nn.Module") -> dict[str, int]:
    """Trainable adapter parameters by the layer that carries them; told by name, as importing peft takes seconds."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = re.fullmatch(r"base_model\.model\.(.+?)\.lora_\w+\..+", name)
        if layer and parameter.requires_grad:
            sizes[layer[1]] = sizes.get(layer[1], 0) + parameter.numel()
    return sizes


def _planned_parameters(module: "nn.Module", lora: LoRAParams) -> int:
    inputs, outputs = shape_of(module)
    return lora.r * (inputs + outputs) + (outputs if lora.use_dora else 0)
