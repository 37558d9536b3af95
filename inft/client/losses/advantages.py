"""Advantages from rewards: how much better an answer is than the others to the same prompt.

Axes: R rollouts, all of one prompt next to each other; P prompts, G rollouts of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from params.errors import UserError


def advantages_of(rewards_R: Sequence[float] | Tensor, group_size: int, normalise: bool = True) -> Tensor:
    """Return each reward less the mean of its group of `group_size` neighbours, one advantage [R] for each rollout.

    With `normalise` it is divided by the group's standard deviation, that of the G rewards themselves (Shao et al.
    2024, "DeepSeekMath", section 4.1.2); a group of equal rewards gets exactly 0. Computed in float64; the dtype of a
    float tensor is kept, else it is float32.
    Errors: UserError for a group below 2, rewards that do not fill the groups, and a reward that is not finite.
    """
    try:
        given = rewards_R if isinstance(rewards_R, Tensor) else torch.tensor(rewards_R, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("rewards: give a flat list of numbers, one per rollout.") from error
    if group_size < 2:
        raise UserError(f"group_size is {group_size}: an advantage compares, so give 2 rollouts or more to a prompt.")
    if given.ndim != 1 or len(given) == 0 or len(given) % group_size:
        shape = list(given.shape)
        raise UserError(f"rewards of shape {shape} are no whole groups of {group_size}: give one per rollout.")
    if not bool(given.isfinite().all()):
        index = int((~given.isfinite()).nonzero()[0])
        raise UserError(f"rewards: rollout {index} is {float(given[index])}: give a number.")
    rewards_PG = given.detach().double().reshape(-1, group_size)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # By comparison: the mean of equal rewards may be off by rounding, which a division would blow up to 1.
    equal_P1 = rewards_PG.amax(1, keepdim=True) == rewards_PG.amin(1, keepdim=True)
    if normalise:
        centred_PG = centred_PG / rewards_PG.std(1, correction=0, keepdim=True)
    dtype = given.dtype if isinstance(rewards_R, Tensor) and given.is_floating_point() else torch.float32
    return centred_PG.masked_fill(equal_P1, 0).reshape(-1).to(dtype)
