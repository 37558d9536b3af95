"""The model that is trained, its adapter, and what is left of them at the end."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_arguments import Arguments, ModelArguments
from peft import LoraConfig, PeftModel

from inft.models import load_spec
from inft.models.loading import find_source, load_model, load_processor
from inft.training.hardware import has_bf16
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.storage import staged
from params import BasicParams, QLoRAParams
from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_model(own: ModelArguments) -> None:
    """UserError when there is no such model, or flags of it contradict each other; loads nothing."""
    if own.load_in_4bit and not own.use_lora:
        raise UserError("--load_in_4bit freezes the weights: it needs adapters (leave --use_lora at true).")
    find_source(load_spec("text"), own.model_name_or_path)


def load_model_and_tokenizer(arguments: Arguments) -> tuple["PreTrainedModel", Any]:
    """Return the model on this process's own device, in 4 bit if asked for, and its tokenizer."""
    own, spec = arguments.model, load_spec("text")
    dtype = own.dtype
    if dtype == "auto":
        dtype = "bfloat16" if own.use_lora and has_bf16() else "float32"
    qlora = QLoRAParams(load_in_4bit=own.load_in_4bit, bnb_4bit_compute_dtype=dtype)
    tokenizer = load_processor(spec, own.model_name_or_path)
    model = load_model(
        spec,
        own.model_name_or_path,
        basic=BasicParams(dtype=dtype, attn_impl=own.attn_implementation),
        quantization_config=quantization_config(qlora, spec),
    )
    return (after_quantised_load(model) if own.load_in_4bit else model), tokenizer


def lora_config(own: ModelArguments) -> LoraConfig | None:
    """Return the adapters' configuration; None where all weights are trained."""
    if not own.use_lora:
        return None
    targets = [word for words in own.lora_target_modules for word in words.split(",") if word]
    return LoraConfig(
        r=own.lora_r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def save_result(trainer: Any) -> str:
    """Write the adapter, or the whole model, with the tokenizer; return where it is and of which step.

    Call it in the first process. What CRAFT adds (projection head, temperature) stays in the checkpoints.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = isinstance(model, PeftModel)
    final = Path(trainer.args.output_dir) / ("adapter" if is_adapter else "model")
    options = {"save_embedding_layers": False} if is_adapter else {}
    with staged(
        final, what="the trained weights", remedy="Free space there, then resume from the last checkpoint."
    ) as new:
        model.save_pretrained(str(new), **options)
        trainer.processing_class.save_pretrained(str(new))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if best is None:
        return f"{final}, of step {trainer.state.global_step:,}"
    return f"{final}, of {Path(best).name} with the lowest held-out loss, {trainer.state.best_metric:.4f}"
