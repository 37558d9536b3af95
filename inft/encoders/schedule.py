"""The learning rate of a step: the schedule's factor of the peak, set in every group of every optimizer."""

from collections.abc import Iterable

from torch.optim import Optimizer

from params.encoder_schedule import make_schedule

__all__ = ["make_schedule", "set_learning_rate"]


def set_learning_rate(optimizers: Iterable[Optimizer], learning_rate: float) -> None:
    """Set what the next step of each optimizer takes; call it before the step with the step's own number."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
