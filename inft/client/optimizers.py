"""torch's optimizers on an adapter's weights, and their state as named tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from inft.client.state import check_like
from params.client import OptimizerConfig
from params.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of adam and adamw, beside the number of steps
Parameters = Mapping[str, nn.Parameter]


def make_optimizer(config: OptimizerConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """Return the optimizer that the configuration names."""
    weights = list(parameters.values())
    if config.name == "sgd":
        return torch.optim.SGD(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(weights, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


@contextmanager
def learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> Iterator[None]:
    """Within it the optimizer steps with another learning rate."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = rate
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = old


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """Return the optimizer's state as FIELD.KEY, of the parameters that have one."""
    return {
        f"{field}.{key}": value
        for key, parameter in parameters.items()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def read_optimizer(
    tensors: Mapping[str, Tensor], parameters: Parameters, config: OptimizerConfig
) -> dict[str, dict[str, Tensor]]:
    """Return stored tensors as the state of each parameter by its key.

    Errors: UserError for tensors of another optimizer or adapter, and for a parameter that has only part of its state.
    """
    fields = () if config.name == "sgd" else ("step", *MOMENTS)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        field, _, key = name.partition(".")
        if field not in fields or key not in parameters:
            raise UserError(f"the stored optimizer has {name}, which {config.name} has not here: it is of another one.")
        check_like(name, tensor, torch.zeros((), dtype=torch.float32) if field == "step" else parameters[key])
        states.setdefault(key, {})[field] = tensor
    for key, state in states.items():
        if set(state) != set(fields):
            raise UserError(f"the stored optimizer has only {', '.join(sorted(state))} of {key}: it is damaged.")
    return states


def load_optimizer(
    optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Tensor]], parameters: Parameters
) -> None:
    """Give the optimizer the state of `read_optimizer`; parameters that it does not name begin anew."""
    optimizer.state.clear()
    for key, state in states.items():
        parameter = parameters[key]
        optimizer.state[parameter] = {
            # torch keeps the number of steps on the CPU.
            field: tensor.to("cpu" if field == "step" else parameter.device, copy=True)
            for field, tensor in state.items()
        }
