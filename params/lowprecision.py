"""The three low-precision sections of encoder pretraining; at most one of them may be enabled.

Each converts linear layers of the blocks: products in 8 or 4 bits, weights and optimizer stay in float32.
"""

from dataclasses import dataclass
from typing import Literal

from params.bounds import Count, CountOrZero

TorchAORecipe = Literal[
    "float8_tensorwise",
    "float8_rowwise",
    "float8_rowwise_with_gw_hp",
    "mxfp8_emulated",
    "mxfp8_cublas",
    "mxfp8_cublas_rceil",
    "mxfp4_emulated",
    "mxfp4_cutlass",
    "mxfp4_qat",
    "nvfp4_qat",
]
TransformerEngineRecipe = Literal["fp8_delayed", "fp8_current", "mxfp8", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class TorchAOParams:
    """Linear layers through torchao."""

    enable: bool = False  # convert the model's linear layers
    recipe: TorchAORecipe = "float8_rowwise"  # float8 needs Ada or Hopper; cublas, cutlass and nvfp4_qat Blackwell
    filter_fqns: tuple[str, ...] = ("decoder",)  # layers with one of these in their names stay as they are
    skip_first_last_linear: bool = True  # the first and the last linear layer of the model stay as they are
    auto_filter_small_kn: bool = False  # layers that torchao holds too small to gain speed stay as they are
    require_compile: bool = True  # refuse to run without trainer.torch_compile, which the speed depends on
    emulate: bool = False  # float8 recipes on any hardware: their rounding without their speed
    enable_fsdp_float8_all_gather: bool = False  # accepted, does nothing: of FSDP, which encoders do not train under
    precompute_float8_dynamic_scale_for_fsdp: bool = False  # accepted, does nothing: of FSDP as well


@dataclass(frozen=True, kw_only=True)
class TransformerEngineParams:
    """Linear layers through NVIDIA Transformer Engine."""

    enable: bool = False  # convert the model's linear layers
    recipe: TransformerEngineRecipe = "fp8_current"  # fp8 needs Ada or Hopper, mxfp8 and nvfp4 need Blackwell
    filter_fqns: tuple[str, ...] = ("decoder",)  # layers with one of these in their names stay as they are
    skip_first_last_linear: bool = True  # the first and the last linear layer of the model stay as they are
    required_dim_multiple: Count = 16  # layers with a side that is no multiple of it stay as they are
    require_compile: bool = True  # refuse to run without trainer.torch_compile
    fp8_format: Literal["HYBRID", "E4M3"] | None = None  # HYBRID: gradients in E5M2; none: E4M3 for mxfp8, else HYBRID
    margin: CountOrZero = 0  # fp8_delayed: the scale is divided by 2 to this power
    amax_history_len: Count = 1024  # fp8_delayed: steps whose largest values are remembered
    amax_compute_algo: Literal["max", "most_recent"] = "max"  # fp8_delayed: which of them makes the scale
    disable_rht: bool = False  # nvfp4: no random Hadamard transform
    disable_stochastic_rounding: bool = False  # nvfp4: gradients are rounded to nearest
    disable_2d_quantization: bool = False  # nvfp4: weights are scaled by rows of 16 instead of squares of 16


@dataclass(frozen=True, kw_only=True)
class Quartet2Params:
    """Linear layers through Quartet-II NVFP4."""

    enable: bool = False  # convert the model's linear layers; needs Blackwell of compute capability 12.0
    recipe: Literal["quartet_ii"] = "quartet_ii"  # the one there is
    filter_fqns: tuple[str, ...] = ("decoder",)  # layers with one of these in their names stay as they are
    skip_first_last_linear: bool = True  # the first and the last linear layer of the model stay as they are
    required_dim_multiple: Count = 128  # layers with a side that is no multiple of it stay as they are
    four_over_six: bool = True  # each block of 16 is scaled to 4 or to 6, whichever errs less
    require_compile: bool = True  # refuse to run without trainer.torch_compile
