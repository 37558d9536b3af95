"""What answers are worth: the reward functions called and checked, and their weighted sum."""

from collections.abc import Mapping, Sequence
from typing import Any

from craft.rewards import checked_rewards
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
        return checked_rewards(reward.function, **columns)
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
            raise UserError(
                f"answer {row} has no reward: {', '.join(found)} all returned None for it. Let one of rl.rewards "
                "return a number for every answer."
            )
        totals.append(sum(given))
    return totals


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
    line = line_of(error.__cause__) if error.__cause__ is not None else ""
    for number, sample in enumerate(columns["samples"]):
        try:
            checked_rewards(reward.function, **{name: values[number : number + 1] for name, values in columns.items()})
        except ValueError:
            return f"{error}{line} [{sample.meta.get('where', sample.prompt.text)}]"
    return f"{error}{line}"
