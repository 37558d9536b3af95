"""Which layers a client adapts: names and globs, matched without regular expressions.

A pattern comes from a stranger, and a regular expression could be one that never ends: `(.*)*Z`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inft.models.modules import linear_modules, part_of, shape_of
from inft.training.adapters import named_layers, nearest_names
from params.client import LoRAConfig
from params.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from inft.models.spec import ModelSpec

MOST_TARGETS = 64  # of one client
MOST_CHARACTERS = 200  # of a target
MOST_TOLD = 3  # targets without a match that a message is about
# Their rows are images and tiles, or one image's patches for several rows: no gradient of one example can be told.
NOT_BY_EXAMPLE = ("vision", "projector", "cross-attention")


def target_layers(model: "nn.Module", spec: "ModelSpec", lora: LoRAConfig, *, private: bool = False) -> list[str]:
    """Return the full names of the layers that a client adapts, in the model's order.

    A target with a `*`, which stands for any characters, dots too, is matched with the whole name. Any other stands
    for the layers whose last components equal it, those of the vision tower left out, and for the layer of that name.
    Errors: UserError for a target that matches no layer, with the nearest names, or the head, for too many or too long
    targets, and for a rank that no layer can use; for a `private` client also for layers outside the language model.
    """
    _check_size(lora.target_modules)
    modules = linear_modules(model)
    names = list(modules)
    matches = {target: _matches(target, names, spec) for target in lora.target_modules}
    dead = [target for target, found in matches.items() if not found]
    if dead:
        raise UserError("\n".join(_no_match(target, names, spec) for target in dead[:MOST_TOLD]))
    chosen: set[str] = set().union(*matches.values())
    found = [name for name in names if name in chosen]
    _check_parts(found, spec, private=private)
    _check_rank(lora.rank, {name: min(shape_of(modules[name])) for name in found})
    return found


def glob_matches(pattern: str, name: str) -> bool:
    """Whether the whole name is the pattern with some characters, or none, in place of each `*`.

    What stands between two stars is taken at its first place: a later one would leave less for the rest.
    """
    first, *middle = pattern.split("*")
    if not middle:
        return name == pattern
    last, place = middle.pop(), len(first)
    end = len(name) - len(last)
    if not (name.startswith(first) and name.endswith(last) and place <= end):
        return False
    for part in middle:
        place = name.find(part, place, end)
        if place < 0:
            return False
        place += len(part)
    return True


def _check_size(targets: Sequence[str]) -> None:
    if not targets:
        raise UserError("lora_config.target_modules is empty: name the layers to adapt, such as q_proj and v_proj.")
    if len(targets) > MOST_TARGETS:
        raise UserError(
            f"lora_config.target_modules has {len(targets)} entries, more than {MOST_TARGETS}: let one with * stand "
            "for several."
        )
    longest = max(targets, key=len)
    if len(longest) > MOST_CHARACTERS:
        raise UserError(
            f"lora_config.target_modules: {longest[:20]!r}… has {len(longest)} characters, more than "
            f"{MOST_CHARACTERS}: shorten it with *."
        )


def _matches(target: str, names: Sequence[str], spec: "ModelSpec") -> list[str]:
    if "*" in target:
        return [name for name in names if glob_matches(target, name)]
    return named_layers(target, names, spec)


def _no_match(target: str, names: Sequence[str], spec: "ModelSpec") -> str:
    message = f"lora_config.target_modules: {target!r} matches no linear layer of {spec.title}."
    near = nearest_names(target, names)
    if any(name.endswith(f".{target}") for name in names):
        message += f" It names layers of the vision tower only: write *vision*.{target} if they are meant."
    elif near:
        message += f" Nearest names: {', '.join(near)}."
    return (
        f"{message} Give the last parts of a name, or a whole name in which * stands for any characters; regular "
        "expressions are not read."
    )


def _check_parts(names: Sequence[str], spec: "ModelSpec", *, private: bool) -> None:
    parts = {name: part_of(name, spec) for name in names}
    head = [name for name, part in parts.items() if part == "head"]
    if head:
        raise UserError(
            f"lora_config.target_modules match the head {head[0]}, which is not adapted: name the other layers, such "
            "as q_proj and down_proj."
        )
    barred = [name for name, part in parts.items() if part in NOT_BY_EXAMPLE] if private else []
    if barred:
        raise UserError(
            f"lora_config.target_modules match {barred[0]}, of {parts[barred[0]]!r}: with differential privacy only "
            "the language model's own layers can be adapted, since elsewhere the gradients of two rows cannot be told "
            "apart. Name them by patterns, such as *language_model*.self_attn.q_proj."
        )


def _check_rank(rank: int, sides: dict[str, int]) -> None:
    """Refuse a rank above the smaller side of every layer, by name: that is the most that a change can have."""
    widest = max(sides, key=lambda name: sides[name])
    if rank > sides[widest]:
        raise UserError(
            f"lora_config.rank is {rank}, and the widest layer it is for, {widest}, can use {sides[widest]} at most: "
            "lower it."
        )
