"""4-bit base weights (NF4 through bitsandbytes), on CUDA and on the CPU."""

from typing import TYPE_CHECKING, Any

from inft.models.spec import ModelSpec
from params.lora import QLoRAParams

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def quantization_config(qlora: QLoRAParams, spec: ModelSpec) -> Any:
    """Return the BitsAndBytesConfig of the parameters, or None when the weights stay as they are.

    The vision tower and the projector stay in 16 bit unless `quantize_vision`; the head always does. Names to keep
    out must be full prefixes: bitsandbytes ignores any other silently.
    """
    if not qlora.load_in_4bit:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    keep = ("lm_head",) if qlora.quantize_vision else spec.keep_16bit
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=qlora.bnb_4bit_use_double_quant,
        bnb_4bit_quant_type=qlora.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=getattr(torch, qlora.bnb_4bit_compute_dtype),
        llm_int8_skip_modules=list(keep),
    )


def quantised_modules(model: "nn.Module") -> list[str]:
    """Return the full names of the layers whose weights are in 4 bit."""
    import bitsandbytes as bnb

    return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


def after_quantised_load(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a quantised model ready for adapters: everything frozen, and safe to evaluate between training steps.

    What is not in 4 bit keeps its 16 bits. (peft's prepare_model_for_kbit_training would make vision tower,
    embeddings and head float32: 3.8 GB more for Llama 3.2 Vision, and norms compute in float32 as they are.)
    On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation and the next training step
    crashes on them, so the repacking is switched off on every layer.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)
