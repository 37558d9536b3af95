"""Low precision in a pretraining run: check it, and convert the model's linear layers.

The order of a run: check_low_precision before anything is loaded, convert_linears before the model is compiled or
wrapped. Batches are padded to token_multiple. A converted model has the state dictionary of the plain one, in names,
shapes and dtypes, so that checkpoints know nothing of the precision.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import nn

from inft.encoders.lowprecision.filter import Filter, kept_layers
from inft.encoders.lowprecision.layers import linear_shapes
from inft.encoders.lowprecision.needs import missing, needs_of, this_machine
from params.encoder import EncoderParams
from params.encoder_lowprecision import LowPrecision, enabled_sections, low_precision_problems
from params.errors import UserError
from params.lowprecision import TorchAOParams, TransformerEngineParams

_ANYWHERE = {  # what runs on any hardware in the place of a family of torchao's recipes, with the same or such rounding
    "float8": "torchao.emulate: true",
    "mxfp8": "torchao.recipe: mxfp8_emulated",
    "mxfp4": "torchao.recipe: mxfp4_emulated",
    "nvfp4": "torchao.recipe: mxfp4_qat",
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of the linear layers, by their names."""

    converted: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)  # name -> why it stays as it is
    notes: tuple[str, ...] = ()  # settings that do nothing here, and what a resumed run will show

    def describe(self) -> str:
        """One line for the console."""
        reasons = {reason: [name for name, why in self.kept.items() if why == reason] for reason in self.kept.values()}
        told = "; ".join(
            f"{reason}: {', '.join(names) if len(names) <= 2 else f'{len(names)} layers'}"
            for reason, names in reasons.items()
        )
        total = len(self.converted) + len(self.kept)
        return f"{len(self.converted)} of {total} linear layers converted{f' ({told})' if told else ''}"


def check_low_precision(params: EncoderParams) -> None:
    """Raise one UserError that names everything that keeps the enabled section from running here.

    Settings that exclude each other, packages that are not installed, a GPU without the recipe's numbers.
    """
    problems = low_precision_problems(params)
    enabled = enabled_sections(params)
    if len(enabled) == 1:
        problems += _here(params, enabled[0])
    if problems:
        raise UserError("\n".join(problems))


def _here(params: EncoderParams, name: str) -> Iterator[str]:
    """What this machine stands against."""
    section, machine = getattr(params, name), this_machine()
    if machine.gpu is None and _inductor_fails(params):
        yield (
            f"torchao.recipe: {section.recipe} cannot be compiled by inductor for a CPU: set "
            "trainer.torch_compile_backend: aot_eager."
        )
    if lacking := missing(needs_of(name, section), machine):
        yield f"{name}.recipe: {section.recipe} needs {', and '.join(lacking)}. {_remedy(name, section)}"


def _inductor_fails(params: EncoderParams) -> bool:
    """Whether compiled code would hold scales of MX numbers, a dtype that inductor's C++ of torch 2.13 lacks."""
    trainer, recipe = params.trainer, params.torchao.recipe
    compiled = trainer.torch_compile and trainer.torch_compile_backend == "inductor"
    return compiled and params.torchao.enable and recipe in ("mxfp8_emulated", "mxfp4_emulated")


def _remedy(name: str, section: LowPrecision) -> str:
    anywhere = _ANYWHERE.get(section.recipe.partition("_")[0]) if name == "torchao" else None
    slow = f", or {anywhere} to try such rounding out, slowly" if anywhere else ""
    return f"Set {name}.enable: false to train in bf16{slow}."


def convert_linears(model: nn.Module, params: EncoderParams) -> Converted:
    """Replace the linear layers of a plain model in place, as the enabled section says; nothing without one.

    Weights stay the same parameters, except under transformer_engine and quartet2, which is why optimizers are made
    afterwards.
    Errors: UserError for all that check_low_precision finds, and when filter_fqns names no layer, no layer is left, or
    the installed package lacks the recipe.
    """
    check_low_precision(params)
    for name in enabled_sections(params):
        section: LowPrecision = getattr(params, name)
        layers = linear_shapes(model)
        kept = kept_layers(layers, _filter(name, section))
        names = [layer.name for layer in layers if layer.name not in kept]
        notes = _convert(model, names, section)
        return Converted(converted=tuple(names), kept=kept, notes=notes)
    return Converted()


def _filter(name: str, section: LowPrecision) -> Filter:
    multiple = _block(section)
    if not isinstance(section, TorchAOParams):
        multiple = math.lcm(multiple, section.required_dim_multiple)
    small = None
    if isinstance(section, TorchAOParams) and section.auto_filter_small_kn:
        from inft.encoders.lowprecision.torchao import small_rule

        small = small_rule(section.recipe)
    return Filter(
        section=name,
        names=section.filter_fqns,
        skip_first_last=section.skip_first_last_linear,
        multiple=multiple,
        takes_bias=name != "quartet2",
        is_small=small,
    )


def _block(section: LowPrecision) -> int:
    """Numbers that share a scale, or that the kernels take at once: both sides of a layer are multiples of it."""
    if section.recipe == "quartet_ii":
        return 128
    return 32 if section.recipe.startswith("mxfp") else 16


def _convert(model: nn.Module, names: list[str], section: LowPrecision) -> tuple[str, ...]:
    if isinstance(section, TorchAOParams):
        from inft.encoders.lowprecision.torchao import convert_torchao

        return convert_torchao(model, names, section)
    if isinstance(section, TransformerEngineParams):
        from inft.encoders.lowprecision.transformer_engine import convert_transformer_engine

        return convert_transformer_engine(model, names, section)
    from inft.encoders.lowprecision.quartet2 import convert_quartet2

    return convert_quartet2(model, names, section)


def token_multiple(params: EncoderParams) -> int:
    """What the tokens of every batch, padding included, must be a multiple of; 1 without low precision.

    They are a side of the products that make the weights' gradients.
    """
    for name in enabled_sections(params):
        section = getattr(params, name)
        if name == "quartet2" or section.recipe == "nvfp4":
            return 128
        return 1 if section.recipe.endswith("_qat") else _block(section)
    return 1


def low_precision_context(params: EncoderParams) -> AbstractContextManager[None]:
    """Return Transformer Engine's autocast where that section is enabled, and a context that does nothing elsewhere.

    convert_linears has already put it around the encoder's forward pass in training; this is for code that runs
    converted layers by themselves.
    """
    if not params.transformer_engine.enable:
        return nullcontext()
    from inft.encoders.lowprecision.transformer_engine import autocast

    return autocast(params.transformer_engine)
