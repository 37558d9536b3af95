"""Supervised fine-tuning: optimiser, schedule, evaluation, checkpoints and where they land."""

from dataclasses import dataclass
from typing import Literal

from params.bounds import Count, CountOrZero, NonNegative, Positive, Share

Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio"]
# Of held-out rows. The figures of captions need eval_captions; the reward is that of grpo and ppo.
BestMetric = Literal["loss", "chrf", "bleu4", "cider", "exact", "reward"]


@dataclass(frozen=True, kw_only=True)
class SFTParams:
    """Hyperparameters of the training loop and the output directories of each (model, mode)."""

    num_epochs: Positive = 1.0  # passes over the training rows, where max_steps is none
    max_steps: Count | None = None  # optimizer steps; none: as many as the epochs make
    lr: Positive = 1.5e-4  # peak, per optimizer step
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: NonNegative = 1e-6
    warmup_ratio: Share = 0.03  # share of the optimizer steps; converted to warmup_steps
    max_grad_norm: NonNegative = 0.3  # global L2 norm; 0: no clipping
    optim: str = "adamw_torch"  # a name of transformers' OptimizerNames
    per_device_train_batch_size: Count = 1  # rows a device sees per forward
    per_device_eval_batch_size: Count = 1  # rows a device sees per evaluation forward
    gradient_accumulation_steps: Count = 16  # micro-batches per optimizer step
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    logging_steps: Count = 50  # optimizer steps between log events
    save_steps: Count = 500  # optimizer steps between checkpoints
    eval_steps: Count = 500  # optimizer steps between evaluations on the held-out split
    eval_captions: CountOrZero = 0  # held-out rows captioned at each evaluation, spread over the languages; 0: none
    save_total_limit: Count = 2  # checkpoints kept
    best_metric: BestMetric = "loss"  # chooses the best adapter, stops early; reward: with grpo and ppo, their default
    load_best_model_at_end: bool = True  # the best directory holds the best by best_metric; False: the last step
    early_stopping_patience: CountOrZero = 3  # evaluations without improvement before stopping; 0 turns it off
    early_stopping_threshold: NonNegative = 0.01  # smallest gain that counts as one: nats of the loss, points of others
    over_length: Literal["shorten", "drop", "error"] = "shorten"  # a row above max_length: shorten its news text
    report_to: tuple[Tracker, ...] = ()  # experiment trackers; none by default
    llama_32_output_dir: str = "outputs/llama32_basic"
    llama32_best_model_dir: str = "outputs/llama32_basic/best"
    llama32_adv_output_dir: str = "outputs/llama32_advanced"
    llama32_adv_best_model_dir: str = "outputs/llama32_advanced/best"
    aya_output_dir: str = "outputs/aya_basic"
    aya_best_model_dir: str = "outputs/aya_basic/best"
    aya_adv_output_dir: str = "outputs/aya_advanced"
    aya_adv_best_model_dir: str = "outputs/aya_advanced/best"
    text_output_dir: str = "outputs/text_basic"
    text_best_model_dir: str = "outputs/text_basic/best"
    text_adv_output_dir: str = "outputs/text_advanced"
    text_adv_best_model_dir: str = "outputs/text_advanced/best"
