"""What answers are worth: the reward functions called and checked, and their weighted sum."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from craft.rewards import checked_rewards, reward_name
from inft.rewards.load import Reward, line_of
from inft.sample import Sample
from params.errors import UserError


def score(
    reward: Reward, *, samples: Sequence[Sample], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> list[float | None]:
    """Return the reward of each completion, the answer to the sample at the same place; None where it has none.

    Errors: UserError naming the function and the row when it raises, returns another number of rewards, or one that is
    NaN, infinite or no number.
    """
    columns = _columns(samples, completions, completion_ids)
    try:
        return _called(reward, columns)
    except ValueError as error:
        raise UserError(f"rl.rewards={reward.name}: {_told(reward, error, columns)}") from error


def score_all(
    rewards: Sequence[Reward],
    *,
    samples: Sequence[Sample],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, list[float | None]]:
    """Return the name of each reward -> what it says of each completion. Errors: as score has them."""
    return {
        reward.name: score(reward, samples=samples, completions=completions, completion_ids=completion_ids)
        for reward in rewards
    }


def weighted_sum(found: Mapping[str, Sequence[float | None]], weights: Sequence[float] = ()) -> list[float]:
    """Return the sum over the rewards of each completion; no weights stand for 1 each, and a None adds nothing.

    Errors: UserError for a completion without any reward.
    """
    totals = []
    for row, values in enumerate(zip(*found.values(), strict=True)):
        parts = zip(weights or [1.0] * len(values), values, strict=True)
        given = [weight * value for weight, value in parts if value is not None]
        if not given:
            raise UserError(_unrewarded(f"answer {row}", found))
        totals.append(sum(given))
    return totals


def refuse_unrewarded(found: Mapping[str, Sequence[float | None]], samples: Sequence[Sample]) -> None:
    """UserError naming the functions and the row of the first completion that all of them gave None."""
    for sample, values in zip(samples, zip(*found.values(), strict=True), strict=True):
        if all(value is None for value in values):
            raise UserError(_unrewarded(f"the answer to {_place(sample)}", found))


def _unrewarded(answer: str, names: Iterable[str]) -> str:
    return (
        f"{answer} has no reward: {', '.join(names)} returned None for it. Let one of rl.rewards return a number for "
        "every answer."
    )


def _place(sample: Sample) -> str:
    return str(sample.meta.get("where", sample.prompt.text))


def _called(reward: Reward, columns: Mapping[str, Any]) -> list[float | None]:
    """The rewards of a function that is given the columns that it takes."""
    function = reward.function

    def with_its_own(**given: Any) -> Any:
        return function(**{name: value for name, value in given.items() if name in reward.takes})

    with_its_own.__name__ = reward_name(function)  # an object or a partial has none
    return checked_rewards(with_its_own, **columns)


def _columns(
    samples: Sequence[Sample], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, Any]:
    return {
        "prompts": [sample.prompt.text for sample in samples],
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        "references": [sample.answer for sample in samples],
        "languages": [sample.language for sample in samples],
        "samples": list(samples),
    }


def _told(reward: Reward, error: ValueError, columns: Mapping[str, Any]) -> str:
    """The error with the place of the row in its data set, where one row alone shows it, and the user's line."""
    line = line_of(error.__cause__, reward.module) if error.__cause__ is not None else ""
    for number, sample in enumerate(columns["samples"]):
        try:
            _called(reward, {name: values[number : number + 1] for name, values in columns.items()})
        except ValueError:
            return f"{error}{line} [{_place(sample)}]"
    return f"{error}{line}"
