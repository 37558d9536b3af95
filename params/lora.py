"""Adapters and 4-bit quantisation: LoRAParams and QLoRAParams."""

from dataclasses import dataclass
from typing import Literal

from params.bounds import Count, PartialShare


@dataclass(frozen=True, kw_only=True)
class QLoRAParams:
    """How frozen weights are quantised (NF4 through bitsandbytes; Dettmers et al. 2023)."""

    load_in_4bit: bool = True  # False trains LoRA on unquantised weights
    bnb_4bit_use_double_quant: bool = True  # quantise the quantisation constants too
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # 4-bit data type
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantize_vision: bool = False  # also put the vision tower and projector in 4 bit (costs quality)


@dataclass(frozen=True, kw_only=True)
class LoRAParams:
    """Rank, scale and places of the adapters (Hu et al. 2021).

    A target is a regular expression that must match a module's whole dotted name; a plain name such as
    ``q_proj`` stands for every module whose last components equal it.
    """

    r: Count = 64  # rank
    alpha: Count = 32  # scale is alpha / r (alpha / sqrt(r) with rsLoRA)
    dropout: PartialShare = 0.10  # on the adapter's input, 0 to 1
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: tuple[str, ...] = ()  # empty: the preset of (model, mode)
    advanced_target_modules: tuple[str, ...] = ()  # used by Llama and text in advanced mode; empty: the preset
    aya_advanced_target_modules: tuple[str, ...] = ()  # used by Aya in advanced mode; empty: the preset
    use_rslora: bool = False  # scale by alpha / sqrt(r) (Kalajdzievski 2023)
    use_dora: bool = False  # weight-decomposed adapters (Liu et al. 2024)
    init: Literal["default", "gaussian", "pissa"] = "default"  # pissa: principal components (Meng et al. 2024)
