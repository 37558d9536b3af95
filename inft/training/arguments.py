"""SFTParams and CraftParams in the words of transformers' TrainingArguments, which every method's arguments extend."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from inft.training.contrast import queue_size
from inft.training.hardware import has_bf16
from inft.training.plan import Steps
from params import TrainParams

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def shared_arguments(
    params: TrainParams, *, output_dir: Path, steps: Steps, evaluate: bool, anchors: int | None = None
) -> dict[str, Any]:
    """Fields of TrainingArguments and, for CRAFT, of CRAFTConfigMixin, with ``craft_alpha`` 1 when it is off.

    Nothing is reported anywhere unless ``report_to`` names it. ``anchors`` are the pairs that CRAFT contrasts, or the
    rows without pairs: its queue need not be larger.
    """
    sft, cuda = params.sft, torch.cuda.is_available()
    return {
        "output_dir": str(output_dir),
        "max_steps": steps.total,  # of sft.num_epochs too: what runs is what the plan shows
        "learning_rate": sft.lr,
        "lr_scheduler_type": sft.lr_scheduler_type,
        "weight_decay": sft.weight_decay,
        "warmup_steps": steps.warmup,
        "max_grad_norm": sft.max_grad_norm,
        "optim": sft.optim,
        "per_device_train_batch_size": sft.per_device_train_batch_size,
        "per_device_eval_batch_size": sft.per_device_eval_batch_size,
        "gradient_accumulation_steps": sft.gradient_accumulation_steps,
        "activation_checkpointing": sft.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        # Mixed precision is for CUDA: on a CPU the weights' own dtype decides.
        "bf16": cuda and params.basic.dtype == "bfloat16" and has_bf16(),
        "fp16": cuda and params.basic.dtype == "float16",
        "use_cpu": not cuda,
        "logging_steps": sft.logging_steps,
        "logging_first_step": True,  # what the loss fell from
        "logging_nan_inf_filter": False,  # it would hide what training_step stops at
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": sft.eval_steps if evaluate else None,
        "save_strategy": "steps",
        "save_steps": sft.save_steps,
        "save_total_limit": None,  # checkpoints are removed by _save_checkpoint, after the new one is whole
        "prediction_loss_only": True,
        "seed": params.basic.seed,
        "data_seed": params.data.seed,
        "dataloader_num_workers": min(params.data.num_workers, os.cpu_count() or 1),  # more would only wait
        "dataloader_pin_memory": cuda,
        "remove_unused_columns": False,
        "report_to": list(sft.report_to) or "none",
        "run_name": params.task,
        "disable_tqdm": True,
        **_craft_fields(params, anchors),
    }


def on_one_device(config: Arguments) -> Arguments:
    """The arguments for a model on one device, or spread over several by device_map; DataParallel would copy it."""
    if config.n_gpu > 1:
        config._n_gpu = 1
    return config


def _craft_fields(params: TrainParams, anchors: int | None) -> dict[str, Any]:
    """The fields of CRAFTConfigMixin; without CRAFT alpha is 1, which is the plain method."""
    craft = params.craft
    if not craft.enabled:
        return {"craft_alpha": 1.0}
    ours = ("enabled", "preset", "pairs")  # of inft, not of the trainer
    given = {name: value for name, value in asdict(craft).items() if name not in ours}
    # A pair's last token is the end of its turn, to which a caption's words come late; all of them count at once.
    given["pooling"] = craft.pooling or ("mean" if craft.pairs else "last_token")
    if anchors is not None:
        given["negative_queue_size"] = queue_size(params, anchors)
    return {f"craft_{name}": value for name, value in given.items()}
