"""What a CRAFT trainer finds out and checks of the trainer that it is mixed into."""

import warnings
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from craft.config import CRAFTConfigMixin
from craft.data import CRAFTDatasetBundle, make_craft_datasets
from craft.hooks import hidden_size_of, unwrap
from craft.losses import InfoNCELoss


def bundle_of(
    trainer: Any, bundle: CRAFTDatasetBundle | None, contrastive_dataset: Any, strategy: str | None
) -> CRAFTDatasetBundle:
    """The data sets of a trainer from its keywords; ValueError where they contradict each other."""
    rows = getattr(trainer, "train_dataset", None)
    if bundle is None:
        strategy = strategy or ("self_align" if contrastive_dataset is None else "paired_dataset")
        return make_craft_datasets(rows, contrastive_dataset=contrastive_dataset, strategy=strategy)
    if contrastive_dataset is not None or strategy is not None:
        raise ValueError("pass either craft_bundle, or contrastive_dataset and craft_strategy, not both.")
    if not isinstance(bundle, CRAFTDatasetBundle):
        raise TypeError(
            f"craft_bundle is a {type(bundle).__name__}: make it with make_craft_datasets(rows, contrastive_dataset=…)."
        )
    own = bundle.sft_dataset
    if isinstance(own, Sized) and isinstance(rows, Sized) and len(rows) > len(own):
        raise ValueError(
            f"train_dataset has {len(rows):,} rows and the bundle's SFT data set {len(own):,}: give both the same one."
        )
    return bundle


def refuse_other_parallelism(trainer: Trainer) -> None:
    """ValueError where gradients are not CRAFT's to average."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "CRAFT does not run in nn.DataParallel, whose replicas hide the hidden states: launch one process per GPU "
            "with torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "CRAFT keeps each task's gradient whole until the optimizer step, which DeepSpeed ZeRO and FSDP do not "
            "allow: they reduce and shard gradients in the backward pass. Use DDP (torchrun without a DeepSpeed or "
            "FSDP config), or craft_alpha=1."
        )


def refuse_offloading(trainer: Any) -> None:
    """ValueError where one graph is run backward twice, but its activations are offloaded for one pass only."""
    twice = trainer.craft_bundle.strategy == "self_align" and trainer._craft_balance.separates
    if twice and getattr(trainer.args, "activation_offloading", False):
        raise ValueError(
            "activation_offloading=True keeps activations for one backward pass, and self_align needs one for each "
            "loss when their gradients are told apart. Turn it off, or leave out craft_gradient_balancing='gradnorm' "
            "or 'pcgrad', craft_gradient_clip_per_task and the metric gradient_norm."
        )


def warn_of_first_tokens(trainer: Any) -> None:
    """Warn where every row's first token would stand for it, although a causal model has seen nothing else by then."""
    causal = isinstance(unwrap(trainer.model), PreTrainedModel) and unwrap(trainer.model).can_generate()
    if trainer.craft_args.craft_pooling == "cls" and causal:
        warnings.warn(
            "craft_pooling='cls' takes the first token, which in a causal model has seen no other: texts that begin "
            "alike cannot be told apart. Use 'last_token' or 'mean'.",
            stacklevel=3,
        )


def output_device(model: nn.Module) -> torch.device:
    """Where a model's last hidden state is; the CPU for a model without parameters."""
    own = unwrap(model)
    head = own.get_output_embeddings() if isinstance(own, PreTrainedModel) else None
    parameter = next((head if head is not None else own).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def new_head(args: CRAFTConfigMixin, model: nn.Module, device: torch.device, *, seed: int) -> InfoNCELoss:
    """The projection head and its temperature: the same on every rank, and no draw from the run's random state."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return InfoNCELoss(
            temperature=args.craft_temperature,
            pooling=args.craft_pooling,
            hidden_size=hidden_size_of(model),
            projection_dim=args.craft_projection_dim,
            learnable_temperature=args.craft_learnable_temperature,
            dropout=args.craft_projection_dropout,
            symmetric=args.craft_symmetric,
        ).to(device)


@contextmanager
def accumulation_of(trainer: Any, steps: int) -> Iterator[None]:
    """Let a loss that averages a term over the accumulation steps, such as the one of experts, count its own alone."""
    before = getattr(trainer, "current_gradient_accumulation_steps", None)
    trainer.current_gradient_accumulation_steps = steps
    try:
        yield
    finally:
        trainer.current_gradient_accumulation_steps = before
