"""How a run learns: one file for each method, found by name in METHODS."""

from importlib import import_module
from typing import TYPE_CHECKING

from params import UserError

if TYPE_CHECKING:
    from inft.training.methods.method import Method

METHODS = {
    "sft": "inft.training.methods.sft:METHOD",
    "dpo": "inft.training.methods.dpo:METHOD",
    "orpo": "inft.training.methods.orpo:METHOD",
    "grpo": "inft.training.methods.grpo:METHOD",
    "ppo": "inft.training.methods.ppo:METHOD",
}


def load_method(name: str) -> "Method":
    """Return the METHOD of a name in METHODS; UserError for one that the installed libraries lack."""
    module, attribute = METHODS[name].split(":")
    try:
        method: Method = getattr(import_module(module), attribute)
    except ImportError as error:  # craft's trainers name the release that has what they need
        raise UserError(f"--method {name}: {error}") from error
    return method
