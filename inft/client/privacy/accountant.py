"""How much privacy a sequence of steps has spent: Opacus' RDP and PRV accountants behind one small class.

A step is one Poisson-subsampled Gaussian mechanism: each row is drawn with probability q (`sample_rate`), and noise of
σ (`noise_multiplier`) times the clipping norm is added to the sum. Neighbouring data sets differ by one row added or
removed. Every ε given here is an upper bound for the δ asked.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from params.errors import UserError

AccountantName = Literal["prv", "rdp"]
MECHANISMS = ("prv", "rdp")
# Below this σ a step spends ε in the thousands; the accountants overflow there, and ∞ is a true bound.
LEAST_NOISE = 0.01
LEAST_LOOK_AHEAD = 64  # steps

Run = tuple[float, float, int]  # noise multiplier, sample rate, consecutive steps that had them


class TooLittleNoise(UserError):
    """PRV cannot give ε here: its grid would not fit into memory, or is too coarse for that much ε or little δ."""


def spent_epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: AccountantName = "prv"
) -> float:
    """Return the ε at `delta` of `steps` equal steps; ∞ without noise.

    Errors: UserError for values outside their range, for PRV where its grid is too large, and without Opacus.
    Source: Mironov et al. 2019, section 3.3 (RDP); Gopi et al. 2021, algorithm 1 (PRV).
    """
    check_step(noise_multiplier, sample_rate)
    if steps < 0:
        raise UserError(f"steps is {steps}: give 0 or more.")
    return _epsilon([(noise_multiplier, sample_rate, steps)], delta, accountant)


class Accountant:
    """The steps of one client and what they have spent, for its checkpoint: plain values in and out."""

    def __init__(self, mechanism: AccountantName = "prv") -> None:
        _check_mechanism(mechanism)
        self.mechanism: AccountantName = mechanism
        self.bound: AccountantName = mechanism  # what gave the last ε: rdp too where prv's grid would not fit
        self.history: list[Run] = []
        # What `allows` last found: (σ, q, δ, target) and the number of steps up to which such steps keep the target.
        self._allowed: tuple[tuple[float, float, float, float], int] | None = None

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return sum(count for _, _, count in self.history)

    def step(self, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step that is taken."""
        check_step(noise_multiplier, sample_rate)
        if self._allowed is not None and self._allowed[0][:2] != (noise_multiplier, sample_rate):
            self._allowed = None
        self.history = _with_steps(self.history, noise_multiplier, sample_rate, 1)

    def epsilon(self, delta: float) -> float:
        """Return the ε at `delta` of the steps so far; by RDP, as valid and larger, where PRV cannot give it."""
        return self._bounded(self.history, delta)

    def _bounded(self, history: Sequence[Run], delta: float) -> float:
        try:
            found, self.bound = _epsilon(history, delta, self.mechanism), self.mechanism
        except TooLittleNoise:
            found, self.bound = _epsilon(history, delta, "rdp"), "rdp"
        return found

    def epsilon_after(self, delta: float, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> float:
        """Return the ε at `delta` that so many more steps would bring about; nothing is recorded."""
        check_step(noise_multiplier, sample_rate)
        return self._bounded(_with_steps(self.history, noise_multiplier, sample_rate, steps), delta)

    def allows(self, *, target_epsilon: float, delta: float, noise_multiplier: float, sample_rate: float) -> bool:
        """Whether one more step keeps ε at or below the target.

        It looks ahead as far as there are steps already, so that an accountant is asked for ε only now and then: the
        privacy loss grows with every step, hence what many steps may spend, fewer may.
        """
        key = (noise_multiplier, sample_rate, delta, target_epsilon)
        if self._allowed is not None and self._allowed[0] == key and self.steps < self._allowed[1]:
            return True

        def keeps(steps: int) -> bool:
            after = self.epsilon_after(delta, noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
            return after <= target_epsilon

        if not keeps(1):
            return False
        good, bad = 1, max(self.steps, LEAST_LOOK_AHEAD) + 1
        if keeps(bad - 1):
            good = bad - 1
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if keeps(middle) else (good, middle)
        self._allowed = (key, self.steps + good)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values that JSON takes: the mechanism and [σ, q, steps] of each run of equal steps."""
        return {"mechanism": self.mechanism, "history": [list(run) for run in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of `state_dict`; on an error nothing has changed.

        Errors: UserError for a state that is not one, with the entry named.
        """
        missing = {"mechanism", "history"} - state.keys()
        if missing:
            raise UserError(f"the accountant's state lacks {', '.join(sorted(missing))}: it is no state of ours.")
        _check_mechanism(state["mechanism"])
        if not isinstance(state["history"], list):
            raise UserError("history of the accountant's state is no list of [σ, sample rate, steps].")
        history = [_run(number, entry) for number, entry in enumerate(state["history"])]
        self.mechanism, self.history, self._allowed = state["mechanism"], history, None


def check_step(noise_multiplier: float, sample_rate: float) -> None:
    """Raise UserError unless σ is a finite number of 0 or more and q is a probability."""
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise UserError(f"noise_multiplier is {noise_multiplier}: give a number of 0 or more.")
    if not 0 <= sample_rate <= 1:
        raise UserError(f"sample_rate is {sample_rate}: give a probability from 0 to 1.")


def check_delta(delta: float) -> None:
    """Raise UserError unless δ is strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta}: give a number between 0 and 1, below 1 / (number of rows).")


def _check_mechanism(mechanism: object) -> None:
    if mechanism not in MECHANISMS:
        raise UserError(f"accountant is {mechanism!r}: choose {' or '.join(MECHANISMS)}.")


def _run(number: int, entry: object) -> Run:
    match entry:
        case [float() | int() as noise, float() | int() as rate, int() as steps] if steps > 0:
            check_step(noise, rate)
            return float(noise), float(rate), steps
    raise UserError(f"history[{number}] of the accountant's state is {entry!r}: [σ, sample rate, steps] is needed.")


def _with_steps(history: Sequence[Run], noise_multiplier: float, sample_rate: float, steps: int) -> list[Run]:
    noise, rate = float(noise_multiplier), float(sample_rate)
    if history and history[-1][:2] == (noise, rate):
        return [*history[:-1], (noise, rate, history[-1][2] + steps)]
    return [*history, (noise, rate, steps)]


def _epsilon(history: Sequence[Run], delta: float, mechanism: AccountantName) -> float:
    check_delta(delta)
    _check_mechanism(mechanism)
    totals: dict[tuple[float, float], int] = {}  # composition does not depend on the order of the steps
    for noise, rate, steps in history:
        if rate > 0 and steps > 0:
            totals[noise, rate] = totals.get((noise, rate), 0) + steps
    if not totals:
        return 0.0
    if min(noise for noise, _ in totals) < LEAST_NOISE:
        return math.inf
    runs = [(noise, rate, steps) for (noise, rate), steps in totals.items()]
    return _prv(runs, delta) if mechanism == "prv" else _rdp(runs, delta)


def _rdp(runs: list[Run], delta: float) -> float:
    try:
        from inft.client.privacy.rdp import rdp_epsilon
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    # Renyi's bound can fall below zero where next to nothing is spent.
    return max(rdp_epsilon(runs, delta), 0.0)


def _prv(runs: list[Run], delta: float) -> float:
    try:
        import numpy as np

        from inft.client.privacy.prv import GridTooLarge, prv_epsilon
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    try:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # log 0 in the tails of its integrals
            return max(prv_epsilon(runs, delta), 0.0)
    except GridTooLarge as error:
        steps = sum(count for _, _, count in runs)
        raise TooLittleNoise(
            f"the PRV accountant would need {error} for {steps} steps. Choose accountant='rdp', more noise or fewer "
            "steps."
        ) from error
    except (RuntimeError, ValueError) as error:
        raise TooLittleNoise(
            f"the PRV accountant cannot compute ε here ({error}). Choose accountant='rdp', more noise or a larger δ."
        ) from error


def _not_installed(error: ModuleNotFoundError) -> UserError:
    return UserError(
        f"privacy accounting needs the package {error.name}, which is not installed: pip install 'inft[client]'."
    )
