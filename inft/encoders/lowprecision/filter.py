"""Which linear layers low precision converts, decided by their names and sizes alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from params.errors import UserError


class LinearShape(NamedTuple):
    """A linear layer: its name in the model, and how many numbers go in and come out."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What keeps a layer as it is."""

    section: str  # of the parameters, for messages
    names: Sequence[str] = ()  # a layer is kept when its name contains one of them
    skip_first_last: bool = False  # of all linear layers, in the model's order
    multiple: int = 1  # of which both sides must be
    takes_bias: bool = True  # whether a converted layer can have one
    is_small: Callable[[int, int], bool] | None = None  # of (inputs, outputs): too small to gain speed

    def reason(self, layer: LinearShape) -> str | None:
        """Why the layer is kept, without regard to its place; None when it is converted."""
        if any(part in layer.name for part in self.names):
            return "filter_fqns"
        if layer.inputs % self.multiple or layer.outputs % self.multiple:
            return f"{layer.inputs} x {layer.outputs} is not in multiples of {self.multiple}"
        if layer.bias and not self.takes_bias:
            return "it has a bias"
        if self.is_small is not None and self.is_small(layer.inputs, layer.outputs):
            return "auto_filter_small_kn"
        return None


def kept_layers(layers: Sequence[LinearShape], rule: Filter) -> Mapping[str, str]:
    """Names of the layers that stay as they are, with the reason; the others are converted.

    Errors: UserError when an entry of filter_fqns is in no layer's name, or no layer is left to convert.
    """
    idle = [part for part in rule.names if not any(part in layer.name for layer in layers)]
    if idle:
        raise UserError(
            f"{rule.section}.filter_fqns: no linear layer has {' or '.join(map(repr, idle))} in its name. They are "
            f"named {', '.join(_patterns(layers))}."
        )
    ends = {layers[0].name, layers[-1].name} if rule.skip_first_last and layers else set()
    reasons = {
        layer.name: rule.reason(layer) or ("skip_first_last_linear" if layer.name in ends else None) for layer in layers
    }
    kept = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(kept) == len(layers):
        raise UserError(_nothing_left(kept, rule))
    return kept


def _nothing_left(kept: Mapping[str, str], rule: Filter) -> str:
    counts = {reason: list(kept.values()).count(reason) for reason in kept.values()}
    told = "; ".join(f"{count} by {reason}" for reason, count in counts.items())
    remedies = {
        "auto_filter_small_kn": f"set {rule.section}.auto_filter_small_kn: false",
        "filter_fqns": f"shorten {rule.section}.filter_fqns",
        "skip_first_last_linear": f"set {rule.section}.skip_first_last_linear: false",
        "it has a bias": "use a model without biases",
    }
    chosen = [remedies[reason] for reason in remedies if reason in counts]
    if len(chosen) < len(counts):
        chosen.append(f"choose model.hidden_size and model.intermediate_size in multiples of {rule.multiple}")
    return (
        f"{rule.section} has no linear layer left to convert ({told or 'the model has none'}): {', or '.join(chosen)}."
    )


def _patterns(layers: Sequence[LinearShape]) -> list[str]:
    """The names with their numbers as stars, each once."""
    starred = (".".join("*" if part.isdigit() else part for part in layer.name.split(".")) for layer in layers)
    return list(dict.fromkeys(starred))
