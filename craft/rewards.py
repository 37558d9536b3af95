"""Reward functions in TRL's convention: called with keywords, their answer checked before anything learns from it."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

SHOWN = 80  # characters of a completion in a message

RewardFunction = Callable[..., Sequence[float | None]]


def reward_name(func: Any) -> str:
    """Return the name of a reward function or reward model in logs and messages."""
    path = getattr(getattr(func, "config", None), "_name_or_path", "")
    if path:  # what a model was loaded from
        return str(path).rstrip("/").rpartition("/")[-1]
    func = getattr(func, "func", func)  # of a functools.partial
    return str(getattr(func, "__name__", type(func).__name__))


def is_async(func: Any) -> bool:
    """Whether a reward function, or an object that is called as one, gives a coroutine."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def checked_rewards(
    func: RewardFunction,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float | None]:
    """Call a reward function with TRL's keywords and return its rewards as floats, one for each completion.

    ``columns`` are the other columns of the rows, each a list, and whatever else the trainer gives (trainer_state).
    None says that a row cannot be scored by this function, and stays None.
    Errors: ValueError naming the function, and the row with the beginning of its completion, when it raises (the
    original error is the cause), returns another number of rewards, or one that is NaN, infinite or no number.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
    name = reward_name(func)
    try:
        found = func(**given)
    except (Exception, SystemExit) as error:  # whatever a user's function raises; Ctrl-C is not its own
        where = _failing_row(func, given, len(completions))
        row = "" if where is None else f" for {named_row(where, completions)}"
        raise ValueError(f"reward function {name!r} raised {type(error).__name__}{row}: {error}") from error
    if isinstance(found, str | dict) or not isinstance(found, Iterable):
        raise ValueError(
            f"reward function {name!r} returned a {type(found).__name__}; it must return a list with one number for "
            f"each of the {len(completions)} completions."
        )
    rewards = list(found)
    if len(rewards) != len(completions):
        raise ValueError(
            f"reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions; it must "
            "return one for each, in their order."
        )
    return [_number(reward, name, row, completions) for row, reward in enumerate(rewards)]


def _number(reward: Any, name: str, row: int, completions: Sequence[Any]) -> float | None:
    if reward is None:
        return None
    if getattr(reward, "shape", None) == () and hasattr(reward, "item"):  # a tensor or array of one number
        reward = reward.item()
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise ValueError(
            f"reward function {name!r} returned {reward!r} for {named_row(row, completions)}; it must be a finite "
            "number, or None where the row cannot be scored."
        )
    return float(reward)


def named_row(row: int, completions: Sequence[Any]) -> str:
    """Return the words that name a completion: its number among those given, and its beginning."""
    completion = completions[row]
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):  # chat messages
        completion = completion[-1].get("content", "")
    text = str(completion)
    return f"row {row} ({text[:SHOWN] + '…' if len(text) > SHOWN else text!r})"


def _failing_row(func: RewardFunction, given: dict[str, Any], rows: int) -> int | None:
    """The first row that a function fails on when it is called with that row alone; None when it is none alone."""
    for row in range(rows):
        alone = {
            name: value[row : row + 1] if isinstance(value, list) and len(value) == rows else value
            for name, value in given.items()
        }
        try:
            func(**alone)
        except (Exception, SystemExit):  # noqa: BLE001 - whatever a user's function raises
            return row
    return None
