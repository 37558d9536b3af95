"""What CRAFT adds to a trainer's optimizer: parameter groups of the head, the temperature and the balancer."""

from typing import Any

import torch

UNCERTAINTY_LEARNING_RATE = 0.025  # of the log-variances, as GradNorm's weights have it (Chen 2018)


def add_parameters(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Add the groups to ``optimizer``, unless it has them.

    Errors: ValueError when there is no head yet to train, and for a scheduler that was made without the groups.
    """
    if trainer.craft_loss.projector is None:
        raise ValueError(
            f"the hidden size of {type(trainer.model).__name__} is not in its config, so the projection head cannot be "
            "made before the first batch. Give the model a config with hidden_size."
        )
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in known for parameter in trainer.craft_parameters()):
        return
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "the learning-rate scheduler was made for an optimizer without CRAFT's projection head. Pass "
            "optimizers=(optimizer, None): the trainer then makes a scheduler of args.lr_scheduler_type."
        )
    rate, decay = trainer.args.learning_rate, trainer.args.weight_decay
    head = list(trainer.craft_loss.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in head if weight.dim() > 1], "lr": rate, "weight_decay": decay},
        {"params": [bias for bias in head if bias.dim() <= 1], "lr": rate, "weight_decay": 0.0},  # and temperature
        {"params": trainer._craft_balance.parameters(), "lr": UNCERTAINTY_LEARNING_RATE, "weight_decay": 0.0},
    ]
    for group in groups:
        if group["params"]:
            optimizer.add_param_group(group)
