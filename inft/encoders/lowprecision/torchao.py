"""Linear layers through torchao: float8 by its own conversion, MX formats and fake-quantised ones by its kernels.

Scales of MX formats are shared by 32 numbers (OCP Microscaling 1.0), of NVFP4 by 16. Emulated recipes round as the
hardware would and multiply in the input's dtype. Which calls exist changes between releases: made for torchao 0.18.
Axes: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inft.encoders.lowprecision.layers import replace_linears
from params.errors import UserError
from params.lowprecision import TorchAOParams

try:
    from torchao.float8 import Float8LinearConfig, _auto_filter_for_recipe, convert_to_float8_training
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.mx_formats.config import (
        MXFP8Dim0CastKernelChoice,
        MXFP8Dim1CastKernelChoice,
        ScaleCalculationMode,
    )
    from torchao.prototype.qat import (
        MXFakeQuantizeConfig,
        MXFakeQuantizedLinear,
        NVFP4FakeQuantizeConfig,
        NVFP4FakeQuantizedLinear,
    )
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
except ImportError as error:
    raise UserError(
        f"this torchao lacks what low precision is made of ({error}): install the release that inft is made for, "
        "pip install 'inft[lowprecision]'."
    ) from error

MX_BLOCK = 32  # numbers that share a scale

_FLOAT8, _FLOAT4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
_FLOOR, _RCEIL = ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL
_EMULATED, _HARDWARE = KernelPreference.EMULATED, KernelPreference.AUTO
_MX = {  # recipe -> numbers, how scales are rounded, who multiplies
    "mxfp8_emulated": (_FLOAT8, _FLOOR, _EMULATED),
    "mxfp8_cublas": (_FLOAT8, _FLOOR, _HARDWARE),
    "mxfp8_cublas_rceil": (_FLOAT8, _RCEIL, _HARDWARE),
    "mxfp4_emulated": (_FLOAT4, _FLOOR, _EMULATED),
    "mxfp4_cutlass": (_FLOAT4, _FLOOR, _HARDWARE),
}
_OF_FSDP = ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")


def convert_torchao(model: nn.Module, names: Sequence[str], params: TorchAOParams) -> tuple[str, ...]:
    """Replace the linear layers of these names in place; return notes for the user."""
    if params.recipe.startswith("float8"):
        _convert_float8(model, names, params)
    else:
        replace_linears(model, names, lambda linear: _without_float8(linear, params.recipe))
    return tuple(_notes(params))


def _notes(params: TorchAOParams) -> Iterator[str]:
    """One note on the settings of FSDP, which configurations written for other trainers have."""
    if idle := [f"torchao.{name}" for name in _OF_FSDP if getattr(params, name)]:
        yield (
            f"{' and '.join(idle)}: nothing is done without FSDP, which encoders do not train under; weights are whole "
            "in every process here. You may drop what does nothing."
        )


def _convert_float8(model: nn.Module, names: Sequence[str], params: TorchAOParams) -> None:
    config = Float8LinearConfig.from_recipe_name(params.recipe.removeprefix("float8_"))
    config = replace(config, emulate=params.emulate)
    chosen = frozenset(names)

    def is_chosen(module: nn.Module, name: str) -> bool:
        return name in chosen

    try:
        from accelerate.utils.ao import convert_model_to_fp8_ao
    except ImportError:  # accelerate below 1.3
        convert_to_float8_training(model, module_filter_fn=is_chosen, config=config)
    else:
        convert_model_to_fp8_ao(model, config=config, module_filter_func=is_chosen)
    if params.emulate:  # torchao's layer looks at CUDA's autocast alone
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: _as_autocast(*inputs))


def small_rule(recipe: str) -> Callable[[int, int], bool]:
    """torchao's own rule: whether a layer of (inputs, outputs) is too small for the recipe to be faster on an H100."""
    worth = _auto_filter_for_recipe(recipe.removeprefix("float8_"), filter_fqns=[])

    def is_small(inputs: int, outputs: int) -> bool:
        return not worth(nn.Linear(inputs, outputs, bias=False, device="meta"), "")

    return is_small


def _without_float8(linear: nn.Linear, recipe: str) -> nn.Module:
    sizes: dict[str, Any] = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": "meta",  # no weights are drawn: the layer's own take their place
    }
    if recipe == "nvfp4_qat":
        made: nn.Linear = NVFP4QATLinear(
            **sizes, activation_config=NVFP4FakeQuantizeConfig(), weight_config=NVFP4FakeQuantizeConfig()
        )
    elif recipe == "mxfp4_qat":
        made = MXQATLinear(**sizes, activation_config=MXFakeQuantizeConfig(), weight_config=MXFakeQuantizeConfig())
    else:
        made = MXLinear(recipe, **sizes)
    made.weight, made.bias = linear.weight, linear.bias
    return made


class MXLinear(nn.Linear):
    """A linear layer whose three products take MX numbers; T is a multiple of 32 in training."""

    def __init__(self, recipe: str, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.numbers, self.scaling, self.kernel = _MX[recipe]

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O] in autocast's dtype, as a plain layer would."""
        x_TI, weight_OI = _as_autocast(x_TI, self.weight)
        # Casts by torch's own operations: inductor makes one kernel of them, and they need no extension.
        output_TO = mx_mm.apply(
            x_TI,
            weight_OI,
            *(self.numbers,) * 3,
            MX_BLOCK,
            self.kernel,
            MXFP8Dim0CastKernelChoice.TORCH,
            MXFP8Dim1CastKernelChoice.TORCH,
            self.scaling,
            False,
        )
        return output_TO if self.bias is None else output_TO + self.bias.to(output_TO.dtype)


class MXQATLinear(MXFakeQuantizedLinear):
    """MXFP4 in the forward pass, its rounding undone in the backward pass, under any autocast."""

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O] in autocast's dtype."""
        return _fake_quantised(super().forward, x_TI, self.weight)


class NVFP4QATLinear(NVFP4FakeQuantizedLinear):
    """NVFP4 in the forward pass, its rounding undone in the backward pass, under any autocast."""

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O] in autocast's dtype."""
        return _fake_quantised(super().forward, x_TI, self.weight)


def _fake_quantised(forward: Callable[[Tensor], Tensor], x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """torchao's layer wants input and weight of one dtype and returns that; autocast would mix them."""
    with torch.autocast(x_TI.device.type, enabled=False):
        output_TO = forward(x_TI.to(weight_OI.dtype))
    return _as_autocast(output_TO)[0]


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
