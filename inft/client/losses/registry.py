"""Losses by name: the built-in ones as plain data, those a user registers, and a user's own ``pkg.mod:fn``."""

import difflib
import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.losses.inputs import LossInputs, LossOutput

Loss = Callable[["LossInputs"], "LossOutput"]

BUILT_IN = {
    "token_ce": "inft.client.losses.token_ce:token_ce",
    "margin_ranking": "inft.client.losses.margin_ranking:margin_ranking",
    "contrastive": "inft.client.losses.contrastive:contrastive",
    "mse": "inft.client.losses.mse:mse",
    "cross_entropy": "inft.client.losses.policy:cross_entropy",
    "importance_sampling": "inft.client.losses.policy:importance_sampling",
    "ppo": "inft.client.losses.policy:ppo",
    "cispo": "inft.client.losses.policy:cispo",
    "reinforce": "inft.client.losses.policy:reinforce",
}
_registered: dict[str, Loss] = {}


def loss_names() -> tuple[str, ...]:
    """Return the names that resolve_loss knows: the built-in losses, then the registered ones."""
    return (*BUILT_IN, *_registered)


def register_loss(name: str, fn: Loss) -> None:
    """Make `fn` known as `name`; registering a name again replaces it, so that a notebook's cell can run twice.

    Errors: UserError for the name of a built-in loss, for a name that is no identifier, and for what cannot be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"register_loss: the name {name!r} is no word of letters, digits and _: choose such a one.")
    if name in BUILT_IN:
        raise UserError(f"register_loss: {name!r} is a built-in loss: choose another name.")
    _registered[name] = _checked(fn, name)


def resolve_loss(
    loss: str | Loss, *, allowed: Collection[str] | None = None, options: Mapping[str, Any] | None = None
) -> Loss:
    """Return the loss that a name, a function or ``pkg.mod:fn`` stands for.

    `allowed` is a server's list of names and ``pkg.mod:fn``: nothing else is resolved, and no other module is imported.
    None, in process, allows everything. A module is looked for among the installed ones and in the current directory.
    `options` are keyword arguments of the loss, such as ``{"margin": 0.5}``.
    Errors: UserError for an unknown name, with the nearest; for what is not allowed; for a module that cannot be
    imported, a function that it does not have, and an option that the loss does not take or of another kind.
    """
    if allowed is not None:
        _require_allowed(loss, allowed)
    if isinstance(loss, str):
        name, function = loss, _named(loss)
    else:
        name = getattr(loss, "__name__", type(loss).__name__)
        function = _checked(loss, name)
    if not options:
        return function
    _require_options(function, name, options)
    return functools.partial(function, **options)


def _require_allowed(loss: str | Loss, allowed: Collection[str]) -> None:
    if not isinstance(loss, str):
        raise UserError("loss: a function cannot be sent to a server: name a loss, or train in process.")
    if loss not in allowed:
        raise UserError(f"loss {loss!r} is not allowed here; {_hint(loss, allowed)}")


def _named(name: str) -> Loss:
    if name in _registered:
        return _registered[name]
    if name not in BUILT_IN and ":" not in name:
        raise UserError(f"loss {name!r} is unknown; {_hint(name, loss_names())}")
    place = BUILT_IN.get(name, name)
    module_name, _, attribute = place.rpartition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"loss {name!r}: expected module:function, such as my_losses:focal.")
    if name not in BUILT_IN:
        _look_here()
    module = _module(module_name, name)
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"loss {name!r}: {module_name} has no function {attribute!r}; {_hint(attribute, own)}")
    return _checked(getattr(module, attribute), name)


def _look_here() -> None:
    here = os.getcwd()
    if here not in sys.path:  # last, so that a file here stands for no installed module; console scripts leave it out
        sys.path.append(here)


def _module(module_name: str, name: str) -> ModuleType:
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            places = f"neither installed nor in {os.getcwd()}"
            raise UserError(f"loss {name!r}: there is no module {error.name}, {places}: mend the name.") from error
        raise UserError(f"loss {name!r}: importing {module_name} needs {error.name}: install it.") from error
    except (Exception, SystemExit) as error:  # whatever the user's module does at its import
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"loss {name!r}: importing {module_name} failed with {said}.") from error


def _checked(function: Any, name: str) -> Loss:
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise UserError(f"loss {name!r} is {kind}: a loss is a function of LossInputs that returns LossOutput.")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"loss {name!r} is an async function: write it with def.")
    found: Loss = function
    return found


def _require_options(function: Loss, name: str, options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # some functions written in C do not say what they take
        raise UserError(f"loss {name!r} does not say which options it takes: write it in Python.") from error
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [key for key, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if option in known:
            _require_kind(name, option, value, parameters[option].default)
        elif not takes_any:
            raise UserError(f"loss {name!r} has no option {option!r}; {_hint(option, known)}")


def _require_kind(name: str, option: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than the option's default: options come from JSON, and a NaN fits no bound."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if type(default) in (int, float) and not (number and math.isfinite(value)):
        raise UserError(f"loss {name!r}: {option} is {value!r:.60}: give a finite number, such as {default}.")
    if type(default) in (str, bool) and type(value) is not type(default):
        raise UserError(f"loss {name!r}: {option} is {value!r:.60}: give one such as {default!r}.")


def _hint(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}."
