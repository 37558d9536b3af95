"""What PPOTrainer is given, made ready: the policy, its processor; and the set-ups that PPO does not run in."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, Trainer

from craft.hooks import unwrap
from craft.ppo.config import PPOConfig


def load_policy(model: Any, args: PPOConfig, peft_config: Any = None) -> Any:
    """Return the model to train: loaded where it is a path or name, with a new adapter where a config is given.

    Errors: ValueError for model_init_kwargs with a model that is made already, and for an adapter upon an adapter.
    """
    if isinstance(model, str):
        options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
        architectures = AutoConfig.from_pretrained(model, revision=options.get("revision")).architectures
        model = getattr(transformers, architectures[0]).from_pretrained(model, **options)
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model given as a path; this one is made already. Leave them out.")
    if peft_config is None:
        return model
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model has an adapter already and peft_config asks for another one: leave out peft_config to train on "
            "with the adapter, or merge it first (model.merge_and_unload())."
        )
    from peft import get_peft_model  # needed with a peft_config only

    return get_peft_model(model, peft_config)


def load_processing_class(processing_class: Any, model: Any) -> Any:
    """Return the processor or tokenizer, that of the model by default; its tokenizer gets a padding token.

    Errors: ValueError for a tokenizer with neither a padding token nor one that ends a text.
    """
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(unwrap(model).config._name_or_path)
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither a pad_token nor an eos_token: set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return processing_class


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def prompt_limit(model: Any, max_completion_length: int) -> int | None:
    """Return how many tokens the model's context leaves for a prompt; None where the config does not tell.

    Errors: ValueError when it leaves none.
    """
    config = unwrap(model).config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_completion_length >= context:
        raise ValueError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt in the model's context of "
            f"{context} tokens. Lower it."
        )
    return None if context is None else context - max_completion_length


def refuse_other_parallelism(trainer: Trainer) -> None:
    """ValueError where the value head's gradients, or the order of the rows, are not PPO's to arrange."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "PPO does not run in nn.DataParallel, whose replicas hide the hidden states: launch one process per GPU "
            "with torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "PPO keeps the value head beside the model, which DeepSpeed and FSDP do not shard along. Use DDP (torchrun "
            "without a DeepSpeed or FSDP config)."
        )
    loader = trainer.args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loader, name, None):
            raise ValueError(f"accelerator_config's {name}=True spreads a rollout's rows in another way: leave it out.")


def add_value_head(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Add the value head's group to the optimizer of a PPOTrainer, unless it has it.

    Errors: ValueError for a scheduler that was made without the group.
    """
    head = list(trainer.value_head.parameters())
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if id(head[0]) in known:
        return
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "the learning-rate scheduler was made for an optimizer without PPO's value head. Pass "
            "optimizers=(optimizer, None): the trainer then makes a scheduler of args.lr_scheduler_type."
        )
    rate = trainer.args.value_head_learning_rate or trainer.args.learning_rate
    optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
