"""From the names in rl.rewards to functions; a user's own are imported, which runs their module."""

import difflib
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from inft.rewards import COLUMNS, REWARDS
from params.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function under the name that rl.rewards gives it."""

    name: str  # "chrf", "my_rewards:brief"
    function: Callable[..., Any]
    needs_references: bool  # it has a parameter `references` without a default: rows without a caption are of no use
    takes: frozenset[str] = frozenset(COLUMNS)  # the columns that its parameters name

    @property
    def module(self) -> str:
        """The module that the function is named in."""
        return REWARDS.get(self.name, self.name).rpartition(":")[0]


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """Return the rewards of rl.rewards, in order: names of REWARDS, or ``module:function`` of the user's own.

    A module is looked for among the installed ones and in the current directory.
    Errors: UserError for a name, module or function that there is not, for a module whose import fails, and for a
    function with a required parameter that is no column of COLUMNS.
    """
    return [_reward(name) for name in names]


def _reward(name: str) -> Reward:
    if name not in REWARDS and ":" not in name:
        raise UserError(_unknown(name))
    function = _function(REWARDS.get(name, name), name)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function written in C need not have one: it is given everything
        return Reward(name=name, function=function, needs_references=False)
    _refuse_unknown_parameters(parameters, name)
    references = parameters.get("references")
    needed = references is not None and references.default is inspect.Parameter.empty
    return Reward(name=name, function=function, needs_references=needed, takes=_taken(parameters, function))


def _refuse_unknown_parameters(parameters: Mapping[str, inspect.Parameter], name: str) -> None:
    """UserError for a parameter that must be given and cannot: another name, or one that no keyword reaches."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in parameters.values():
        if parameter.kind in variadic or parameter.default is not inspect.Parameter.empty:
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UserError(
                f"rl.rewards={name}: its parameter {parameter.name!r} is positional only, and a reward function is "
                "called with keywords: take away the / after it."
            )
        if parameter.name not in COLUMNS:
            raise UserError(
                f"rl.rewards={name}: it needs {parameter.name!r}, which there is not. A reward function is given what "
                f"it names of {', '.join(COLUMNS)}: rename the parameter, or give it a default."
            )


def _taken(parameters: Mapping[str, inspect.Parameter], function: Callable[..., Any]) -> frozenset[str]:
    """The columns that a function is called with: all of them where it has ``**columns``."""
    kinds = {parameter.name: parameter.kind for parameter in parameters.values()}
    everything = inspect.Parameter.VAR_KEYWORD in kinds.values()
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name for name, kind in kinds.items() if kind in by_keyword}
    bound = function.keywords if isinstance(function, functools.partial) else {}  # what the user has set already
    return frozenset(name for name in COLUMNS if (everything or name in named) and name not in bound)


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
    except (Exception, SystemExit) as error:  # whatever the user's module does at its import
        said = f"{type(error).__name__}: {error}{line_of(error, module_name)}"
        raise UserError(f"rl.rewards={name}: importing {module_name} failed with {said}.") from error


def line_of(error: BaseException, module_name: str) -> str:
    """Where a user's module, or its package, last was before an error: " (my_rewards.py line 12)".

    "" for an error outside of it, and for a syntax error, which says so itself.
    """
    package = module_name.partition(".")[0]
    places = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    if isinstance(error, SyntaxError) or not places:
        return ""
    return f" ({os.path.basename(places[-1][0])} line {places[-1][1]})"
