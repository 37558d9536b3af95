"""A model's linear layers: their sizes, and others put in their places."""

from collections.abc import Callable, Sequence

from torch import nn

from inft.encoders.lowprecision.filter import LinearShape


def linear_shapes(model: nn.Module) -> list[LinearShape]:
    """All linear layers in the model's order."""
    return [
        LinearShape(name, module.in_features, module.out_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def replace_linears(model: nn.Module, names: Sequence[str], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(layer) in the place of each of these layers, in the same mode of training or evaluation."""
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), own, make(layer).train(layer.training))
