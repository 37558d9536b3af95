"""From the names in rl.rewards to functions; a user's own are imported, which runs their module."""

import difflib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from inft.rewards import REWARDS
from params.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function under the name that rl.rewards gives it."""

    name: str  # "chrf", "my_rewards:brief"
    function: Callable[..., Any]
    needs_references: bool  # it has a parameter `references` without a default: rows without a caption are of no use


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """Return the rewards of rl.rewards, in order: names of REWARDS, or ``module:function`` of the user's own.

    A module is looked for among the installed ones and in the current directory.
    Errors: UserError for a name, module or function that there is not, and for a module whose import fails.
    """
    return [_reward(name) for name in names]


def _reward(name: str) -> Reward:
    if name not in REWARDS and ":" not in name:
        raise UserError(_unknown(name))
    function = _function(REWARDS.get(name, name), name)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function written in C need not have one
        return Reward(name=name, function=function, needs_references=False)
    references = parameters.get("references")
    needed = references is not None and references.default is inspect.Parameter.empty
    return Reward(name=name, function=function, needs_references=needed)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REWARDS)}."
    own = f" A function of your own is named as {_as_module(name) or 'module'}:function."
    return f"rl.rewards: unknown reward {name!r}; {hint}{own * (not near)}"


def _as_module(path: str) -> str:
    """The module that a file's path names, "" for what is no such path."""
    is_path = path.endswith(".py") or "/" in path or os.sep in path
    return os.path.basename(path).removesuffix(".py") if is_path else ""


def _function(place: str, name: str) -> Callable[..., Any]:
    module_name, _, attribute = place.rpartition(":")
    if file_module := _as_module(module_name):
        raise UserError(
            f"rl.rewards={name}: {module_name} is a file, and a module is wanted: name it {file_module}:{attribute} "
            f"and run inft in the directory of {file_module}.py, or install the module."
        )
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"rl.rewards={name}: expected module:function, such as my_rewards:brief.")
    module = _module(module_name, name)
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, own, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(own)) or 'no function'}."
        raise UserError(f"rl.rewards={name}: the module {module_name} has no function {attribute!r}; {hint}")
    function: Any = getattr(module, attribute)
    if not callable(function):
        raise UserError(f"rl.rewards={name}: {attribute} is {type(function).__name__}, not a function.")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"rl.rewards={name} is an async function: write it with def, and wait in it.")
    found: Callable[..., Any] = function
    return found


def _module(module_name: str, name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:  # last, so that a file here stands for no installed module
        sys.path.append(here)
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"rl.rewards={name}: there is no module {error.name}, neither installed nor in {here}."
            ) from error
        raise UserError(f"rl.rewards={name}: importing {module_name} needs {error.name}: install it.") from error
    except Exception as error:  # whatever the user's module does at its import
        said = f"{type(error).__name__}: {error}{line_of(error)}"
        raise UserError(f"rl.rewards={name}: importing {module_name} failed with {said}.") from error


def line_of(error: BaseException) -> str:
    """Where the user's code raised an error: " (my_rewards.py line 12)"; "" for a syntax error, which says so."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return ""
    return f" ({os.path.basename(frames[-1].filename)} line {frames[-1].lineno})"
