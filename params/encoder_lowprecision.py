"""Low-precision settings that cannot hold, found from the parameters alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from params.encoder import EncoderParams
from params.lowprecision import Quartet2Params, TorchAOParams, TransformerEngineParams
from params.yamlfile import Given

LowPrecision = TorchAOParams | TransformerEngineParams | Quartet2Params

SECTIONS = ("torchao", "transformer_engine", "quartet2")
HEAD = "decoder"  # name of the model's last linear layer

_FLOAT8 = ("float8_tensorwise", "float8_rowwise", "float8_rowwise_with_gw_hp")
_IN_BF16_ONLY = ("float8_rowwise", "float8_rowwise_with_gw_hp", "mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp4_cutlass")

# Fields that some recipes read only.
READ_BY: Mapping[str, Mapping[str, Sequence[str]]] = {
    "torchao": {
        "auto_filter_small_kn": ("float8_tensorwise", "float8_rowwise"),  # torchao measured no others
        "emulate": _FLOAT8,
    },
    "transformer_engine": {
        "fp8_format": ("fp8_delayed", "fp8_current", "mxfp8"),
        **dict.fromkeys(("margin", "amax_history_len", "amax_compute_algo"), ("fp8_delayed",)),
        **dict.fromkeys(("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization"), ("nvfp4",)),
    },
    "quartet2": {},
}


def enabled_sections(params: EncoderParams) -> list[str]:
    """Names of the low-precision sections that are enabled."""
    return [name for name in SECTIONS if getattr(params, name).enable]


def low_precision_problems(params: EncoderParams) -> list[str]:
    """One message, with its remedy, for each setting that cannot hold; empty without an enabled section."""
    enabled = enabled_sections(params)
    if not enabled:
        return []
    if len(enabled) > 1:
        named = " and ".join(f"{name}.enable" for name in enabled)
        return [f"{named} exclude each other: enable one of them."]
    [name] = enabled
    section: LowPrecision = getattr(params, name)
    return [*_run(params, name, section), *_layers(params, name, section), *_unread(name, section)]


def unread_low_precision(params: EncoderParams, told: Mapping[str, Given]) -> list[str]:
    """One message for each section that is off although somebody gave fields of it.

    `told` are the fields that were given, by dotted name. Whoever gives `enable` beside the fields, or above them (on a
    command line over a file), has turned the section off on purpose. In another task no section is read at all, which
    is told elsewhere.
    """
    if params.task != "pretraining":
        return []
    problems = []
    for name in SECTIONS:
        switch = f"{name}.enable"
        idle = [key for key in told if key.startswith(f"{name}.") and _layer(told, key) > _layer(told, switch)]
        if idle and not getattr(params, name).enable:
            has, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            problems.append(f"{', '.join(idle)} {has} no effect unless {switch} is true: set that, or drop {them}.")
    return problems


def _layer(told: Mapping[str, Given], key: str) -> int:
    """Where a field was given: 0 nowhere, 1 in a file, 2 on a command line."""
    return 0 if key not in told else 1 + told[key].origin.startswith("--")


def _run(params: EncoderParams, name: str, section: LowPrecision) -> Iterator[str]:
    trainer = params.trainer
    if params.task != "pretraining":
        yield f"{name}.enable is for pretraining only: set {name}.enable: false."
    if section.require_compile and not trainer.torch_compile:
        yield (
            f"{name}.require_compile: low precision is slower than bf16 unless it is compiled. Set "
            f"trainer.torch_compile: true, or {name}.require_compile: false to run without."
        )
    emulated = isinstance(section, TorchAOParams) and section.emulate
    bf16_only = name == "quartet2" or (section.recipe in _IN_BF16_ONLY and not emulated)
    if bf16_only and trainer.mixed_precision != "bf16":
        yield f"{name}.recipe: {section.recipe} computes in bf16: set trainer.mixed_precision: bf16."
    if name == "transformer_engine" and trainer.gradient_checkpointing:
        yield (
            "trainer.gradient_checkpointing recomputes layers outside of Transformer Engine's autocast, in another "
            "precision: turn it off, or use torchao."
        )


def _layers(params: EncoderParams, name: str, section: LowPrecision) -> Iterator[str]:
    if "" in section.filter_fqns:
        yield f"{name}.filter_fqns has an empty entry, which every layer's name contains: drop it."
    head_kept = section.skip_first_last_linear or any(part in HEAD for part in section.filter_fqns)
    if not head_kept and params.trainer.masked_logits_only_loss:
        yield (
            f"{name} would convert the head, whose inputs are the masked positions: as many as chance wants, and low "
            f"precision takes multiples. Add {HEAD} to {name}.filter_fqns, or set "
            "trainer.masked_logits_only_loss: false."
        )


def _unread(name: str, section: LowPrecision) -> Iterator[str]:
    """Fields with another value than their default that the recipe does not read."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(section)}
    for field, recipes in READ_BY[name].items():
        if getattr(section, field) != defaults[field] and section.recipe not in recipes:
            yield (
                f"{name}.{field} has no effect with {name}.recipe: {section.recipe}, only with {', '.join(recipes)}: "
                "drop it."
            )
