"""What differential privacy adds to one client's steps: noise, what it has spent, and the budget's guard."""

import base64
import binascii
import copy
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from inft.client.errors import InvalidRequest
from inft.client.privacy.accountant import Accountant
from inft.client.privacy.calibrate import calibrate_noise, check_budget
from inft.client.privacy.noise import NoiseSource, add_noise
from inft.client.state import finite_or_none
from params.client import DPConfig, TrainingConfig
from params.errors import UserError

calibrated = functools.lru_cache(maxsize=256)(calibrate_noise)  # it takes seconds, and clients come in kinds


@dataclass(frozen=True, kw_only=True)
class StepBudget:
    """What one step asks of the budget."""

    target_epsilon: float
    delta: float
    noise_multiplier: float  # σ; 0 without noise
    sample_rate: float  # q


def with_noise(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with its noise multiplier, found for target_epsilon over max_steps where it has none.

    Errors: UserError for a target that no noise meets.
    """
    dp = config.dp
    if dp is None or dp.noise_multiplier is not None:
        return config
    assert config.max_steps is not None, "params.client_resolve asks for it"
    assert dp.target_epsilon is not None
    noise = calibrated(
        target_epsilon=dp.target_epsilon,
        delta=dp.target_delta,
        sample_rate=sample_rate_of(config, dp),
        steps=config.max_steps,
        accountant=dp.accountant,
    )
    return replace(config, dp_config=replace(dp, noise_multiplier=noise))


def sample_rate_of(config: TrainingConfig, dp: DPConfig) -> float:
    """Return q, the chance of each row to be in a step."""
    return config.batch_size / dp.dataset_size if dp.sample_rate is None else dp.sample_rate


class PrivateSteps:
    """The noise, the accountant and the budget of one client, whose configuration has a noise multiplier."""

    def __init__(self, config: TrainingConfig, dp: DPConfig) -> None:
        assert dp.noise_multiplier is not None
        self.dp = dp
        self.noise_multiplier = dp.noise_multiplier
        self.sample_rate = sample_rate_of(config, dp)
        self.expected_rows = self.sample_rate * dp.dataset_size
        self._source = NoiseSource(dp.seed)
        self._accountant = Accountant(dp.accountant)
        self._spent = 0.0  # ε so far; reckoned once a step
        # Loads Opacus, which takes seconds, and refuses what its accountant cannot count: here and not at a step.
        self._epsilon_after(self.noise_multiplier)

    def _epsilon_after(self, noise_multiplier: float) -> float:
        return self._accountant.epsilon_after(
            self.dp.target_delta, noise_multiplier=noise_multiplier, sample_rate=self.sample_rate
        )

    def check(self, *, noise: bool) -> None:
        """Raise BudgetExhausted where a step, with noise or without, would bring ε above the target."""
        if self.dp.target_epsilon is None:
            return
        budget = StepBudget(
            target_epsilon=self.dp.target_epsilon,
            delta=self.dp.target_delta,
            noise_multiplier=self.noise_multiplier if noise else 0.0,
            sample_rate=self.sample_rate,
        )
        check_budget(self._accountant, budget)

    def check_rows(self, rows: int) -> None:
        """Raise InvalidRequest for more rows in one step than there are: ε holds where each is in it at most once."""
        if rows > self.dp.dataset_size:
            raise InvalidRequest(
                f"that would be {rows} rows since the last step, and dp_config.dataset_size is {self.dp.dataset_size}: "
                "a row may be in a step once at the most. Take an optim_step, or mend dataset_size."
            )

    def add_noise(self, parameters: Iterable[nn.Parameter], *, noise: bool) -> None:
        """Make `.grad`, the sum of clipped gradients, the mean that the step takes."""
        add_noise(
            parameters,
            noise_multiplier=self.noise_multiplier if noise else 0.0,
            clip_norm=self.dp.max_grad_norm,
            expected_batch_size=self.expected_rows,
            source=self._source,
        )

    def spend(self, *, noise: bool) -> None:
        """Record a step."""
        self._accountant.step(self.noise_multiplier if noise else 0.0, self.sample_rate)
        self._spent = self._accountant.epsilon(self.dp.target_delta)

    def metrics(self) -> dict[str, Any]:
        """Return what has been spent and under which settings; an ε without a bound is None."""
        return {
            "epsilon": finite_or_none(self._spent),
            "delta": self.dp.target_delta,
            "target_epsilon": self.dp.target_epsilon,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "max_grad_norm": self.dp.max_grad_norm,
            "accountant": self._accountant.bound,
            "steps": self._accountant.steps,
            "private": self._source.private and math.isfinite(self._spent),
        }

    def state(self) -> dict[str, Any]:
        """Return the state as plain values."""
        noise = self._source.state()
        text = None if noise is None else base64.b64encode(bytes(noise.tolist())).decode()
        return {"accountant": self._accountant.state_dict(), "noise": text}

    def read(self, values: Any) -> "PrivateSteps":
        """Return a copy at the state that `state` gave. Errors: UserError for what is none, or of another kind."""
        if not isinstance(values, Mapping) or not isinstance(values.get("accountant"), dict):
            raise UserError("the stored privacy state is none of a private client: load it into a client without dp.")
        fresh = copy.copy(self)
        fresh._source, fresh._accountant = NoiseSource(self.dp.seed), Accountant(self.dp.accountant)
        fresh._source.load_state(_generator_state(values.get("noise")))
        fresh._accountant.load_state_dict({**values["accountant"], "mechanism": self.dp.accountant})
        fresh._spent = fresh._accountant.epsilon(self.dp.target_delta)
        return fresh

    def after(self, earlier: "PrivateSteps", *, same_client: bool) -> "PrivateSteps":
        """Return these steps with those that a client took before it loaded them: what was released stays spent.

        Of the same client these are among them already.
        """
        before = earlier._accountant.history
        if before:
            history = before if same_client else [*before, *self._accountant.history]
            state = {"mechanism": self.dp.accountant, "history": [list(run) for run in history]}
            self._accountant.load_state_dict(state)
            self._spent = self._accountant.epsilon(self.dp.target_delta)
        return self


def _generator_state(text: Any) -> torch.Tensor | None:
    if text is None:
        return None
    try:
        state = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
        torch.Generator().set_state(state)
    except (TypeError, ValueError, binascii.Error, RuntimeError) as error:
        raise UserError("the stored state of the noise is none of a generator: the state is damaged.") from error
    return state


def clipping_metrics(norms: torch.Tensor, clip_norm: float) -> dict[str, float]:
    """Return the share of rows whose gradient was clipped, and the mean norm before; 0 and 0 without rows."""
    if not len(norms):
        return {"clipped_fraction": 0.0, "mean_norm": 0.0}
    mean = float(norms.double().mean())
    return {
        "clipped_fraction": float((norms > clip_norm).double().mean()),
        "mean_norm": mean if math.isfinite(mean) else 0.0,
    }
