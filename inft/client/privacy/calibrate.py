"""The noise that a privacy budget asks for, and the budget's guard before each step."""

import math
from typing import Protocol

from inft.client.privacy.accountant import (
    Accountant,
    AccountantName,
    TooLittleNoise,
    check_delta,
    check_step,
    spent_epsilon,
)
from params.errors import UserError

SMALLEST_NOISE, LARGEST_NOISE = 2.0**-5, 2.0**14  # range of σ that calibration searches
CLOSENESS = 0.01  # the calibrated σ spends at least (1 − this) of the target
MOST_HALVINGS = 40


class Budget(Protocol):
    """What the guard reads of a client's privacy settings."""

    @property
    def target_epsilon(self) -> float:
        """The most ε that may be spent; ∞ where only δ and σ are wanted."""

    @property
    def delta(self) -> float:
        """The δ at which ε is counted."""

    @property
    def noise_multiplier(self) -> float:
        """σ of the next step."""

    @property
    def sample_rate(self) -> float:
        """Probability of each row to be in the next step."""


class BudgetExhausted(UserError):
    """The next step would spend more than the target; it has not been taken."""

    def __init__(self, *, spent: float, after: float, target: float, delta: float, steps: int) -> None:
        self.spent, self.after, self.target = spent, after, target  # ε
        super().__init__(
            f"the privacy budget is exhausted after {steps} steps: ε is {spent:.4f} at δ {delta:g}, the next step "
            f"would bring it to {after:.4f}, and target_epsilon is {target:g}. The step was not taken. Stop here, or "
            "start a client with a larger target_epsilon, more noise or a smaller sample rate."
        )


def check_budget(accountant: Accountant, params: Budget) -> None:
    """Refuse the next step where it would bring ε above the target; to be called before the step is taken.

    Nothing is recorded: `Accountant.step` follows when the step is really taken.
    Errors: BudgetExhausted with the figures; UserError for a target that is not above 0.
    """
    if not params.target_epsilon > 0:
        raise UserError(f"target_epsilon is {params.target_epsilon}: give a number above 0.")
    noise, rate = params.noise_multiplier, params.sample_rate
    allowed = accountant.allows(
        target_epsilon=params.target_epsilon, delta=params.delta, noise_multiplier=noise, sample_rate=rate
    )
    if not allowed:
        raise BudgetExhausted(
            spent=accountant.epsilon(params.delta),
            after=accountant.epsilon_after(params.delta, noise_multiplier=noise, sample_rate=rate),
            target=params.target_epsilon,
            delta=params.delta,
            steps=accountant.steps,
        )


def calibrate_noise(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: AccountantName = "prv"
) -> float:
    """Return the noise multiplier σ with which `steps` steps spend at most `target_epsilon`, and at least 99 % of it.

    Bisection on log σ, since ε falls as σ grows.
    Errors: UserError where no σ between 2⁻⁵ and 2¹⁴ meets the target.
    """
    _check_target(target_epsilon, delta, sample_rate, steps)

    def epsilon(noise: float) -> float:
        try:
            return spent_epsilon(
                noise_multiplier=noise, sample_rate=sample_rate, steps=steps, delta=delta, accountant=accountant
            )
        except TooLittleNoise:
            if noise >= LARGEST_NOISE:
                raise  # the grid is too large for the number of steps alone
            return math.inf  # where more noise would still make the grid fit

    high = 1.0
    while epsilon(high) > target_epsilon:
        high *= 2
        if high > LARGEST_NOISE:
            raise UserError(
                f"target_epsilon {target_epsilon:g} at δ {delta:g} is out of reach for {steps} steps at sample rate "
                f"{sample_rate:g}: σ {LARGEST_NOISE:g} still spends {epsilon(LARGEST_NOISE):.4f}. Raise "
                "target_epsilon, or take fewer steps or a smaller sample rate."
            )
    low = high / 2
    while low >= SMALLEST_NOISE and epsilon(low) <= target_epsilon:
        low, high = low / 2, low
    for _ in range(MOST_HALVINGS):
        if epsilon(high) >= (1 - CLOSENESS) * target_epsilon:
            return high
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(middle) > target_epsilon else (low, middle)
    raise UserError(
        f"target_epsilon {target_epsilon:g} is not spent by any σ from {SMALLEST_NOISE:g} on ({high:.4g} spends "
        f"{epsilon(high):.4f}). Lower target_epsilon, or set noise_multiplier yourself."
    )


def _check_target(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> None:
    check_step(1.0, sample_rate)
    check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise UserError(f"target_epsilon is {target_epsilon}: give a finite number above 0.")
    if steps < 1 or sample_rate == 0:
        raise UserError(f"{steps} steps at sample rate {sample_rate} spend nothing: there is no noise to calibrate.")
