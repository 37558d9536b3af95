"""Model families: one file each, found by name in MODELS."""

from importlib import import_module
from typing import TYPE_CHECKING

from params.errors import UserError

if TYPE_CHECKING:
    from inft.models.spec import ModelSpec

MODELS = {
    "llama32": "inft.models.llama32:SPEC",
    "aya": "inft.models.aya:SPEC",
    "text": "inft.models.text:SPEC",
}


def load_spec(name: str) -> "ModelSpec":
    """Return the SPEC of a family by its name in MODELS; UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}. Known models: {', '.join(MODELS)}.")
    module, attribute = MODELS[name].split(":")
    spec: ModelSpec = getattr(import_module(module), attribute)
    return spec
