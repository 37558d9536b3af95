"""One client's training: forward and backward passes, optimizer steps, samples, and the state between them.

Nothing here knows of an operation log or a wire. One thread at a time uses a base's learners.

Axes: B rows.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inft.client.accumulator import Accumulator, check_totals, total_norm
from inft.client.bases import MOST_TOKENS, Base
from inft.client.batches import prepare_batch
from inft.client.dropout import seed_of
from inft.client.errors import InvalidRequest, NotFinite
from inft.client.forward import Prepared, compute_loss
from inft.client.losses.inputs import LossOutput
from inft.client.losses.registry import resolve_loss
from inft.client.optimizers import learning_rate, load_optimizer, make_optimizer, optimizer_tensors, read_optimizer
from inft.client.privacy.clipping import NonFiniteGradient, PerExample
from inft.client.private import PrivateSteps, clipping_metrics, with_noise
from inft.client.state import (
    ADAPTER,
    GRADIENT,
    OPTIMIZER,
    LearnerState,
    check_like,
    finite_or_none,
    of_prefix,
    whole_number,
    with_prefix,
)
from params.client import MOST_RATE, TrainingConfig
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.sampling import SampleRequest


def prepare(
    base: Base,
    config: TrainingConfig,
    payload: Mapping[str, Any],
    *,
    loss: Callable[..., Any] | None = None,
    allowed_losses: tuple[str, ...] | None = None,
) -> Prepared:
    """Return a forward_backward ready to run; reads only, so that any thread may call it.

    `loss` is a function, in place of a name in the payload. Options that a client has for its own loss are used
    with that loss, unless the payload has others.
    Errors: InvalidRequest for the batch, as `prepare_batch`; UserError for the loss, as `resolve_loss`.
    """
    named = payload.get("loss")
    if loss is not None and named is not None:
        raise InvalidRequest(f"the operation has the loss {named!r:.60} and a function: give one.")
    chosen: Any = loss if loss is not None else named if named is not None else config.loss
    options = payload.get("loss_options")
    if options is None and chosen == config.loss:
        options = config.loss_options
    function = resolve_loss(chosen, allowed=allowed_losses, options=options)
    batch = prepare_batch(base, payload["batch"], max_length=row_limit(base, config), batch_size=config.batch_size)
    name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
    return Prepared(model_batch=batch, loss=function, loss_name=name)


def check_optim_step(payload: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a learning rate that is none."""
    rate = payload.get("learning_rate")
    if rate is not None and not 0 <= rate <= MOST_RATE:
        raise InvalidRequest(f"learning_rate is {rate}: give a number from 0 to {MOST_RATE:g}.")


def row_limit(base: Base, config: TrainingConfig) -> int:
    """Return the most tokens that a row may have. Errors: UserError for a max_length that the model cannot take."""
    if config.max_length is None:
        return min(base.context, MOST_TOKENS)
    if config.max_length > base.context:
        raise UserError(f"max_length is {config.max_length}, and {base.name} takes {base.context} tokens: lower it.")
    return config.max_length


class Learner:
    """A client's adapter on a base, with its optimizer, its accumulated gradient and what privacy it has spent.

    `config.seed` is set: first weights and dropout follow from it. A noise multiplier that the configuration leaves
    open is found here, and stands in `config`.
    Errors: UserError for targets, a loss, a length or a budget that cannot be.
    """

    def __init__(self, base: Base, name: str, config: TrainingConfig) -> None:
        if config.seed is None:
            raise ValueError("a learner's configuration has a seed: draw one before.")
        row_limit(base, config)
        if ":" not in config.loss:  # another module is imported only where a list of allowed ones was asked
            resolve_loss(config.loss, options=config.loss_options)
        self.base, self.name = base, name
        self.config = with_noise(config)
        self.step = 0  # optimizer steps
        self._passes = 0  # forward passes whose gradient was taken
        self._seed = config.seed
        dp = self.config.dp
        self._private = None if dp is None else PrivateSteps(self.config, dp)
        self._gradient = Accumulator()
        self._parameters = base.add_adapter(name, config.lora, seed=config.seed, private=dp is not None)
        self._optimizer = make_optimizer(config.optimizer, self._parameters)
        self._clipping: PerExample | None = None
        self.half_way = False  # an optimizer step began and did not end: what is in memory is not to be used

    def forward_backward(self, prepared: Prepared) -> dict[str, Any]:
        """Add the gradient of a batch to what is accumulated; return the loss and what came with it.

        Errors: NotFinite for a loss or gradient that is not finite, UserError for a batch or a loss that cannot be;
        nothing has changed then.
        """
        seed = seed_of("dropout", self._seed, self._passes)
        with torch.enable_grad(), self.base.using(self.name, dropout_seed=seed):
            if self._private is None:
                output, private = self._add_plain(prepared), None
            else:
                output, private = self._add_clipped(prepared, self._private)
        self._passes += 1
        return {
            "loss": float(output.loss.detach()),
            "grad_norm": self._gradient.norm() / (1 if self._private is None else self._private.expected_rows),
            "tokens_processed": prepared.model_batch.batch.tokens,
            "dp_metrics": private,
            "metrics": {name: finite_or_none(value) for name, value in output.metrics.items()},
            "accumulated": self._gradient.count,
        }

    def _add_plain(self, prepared: Prepared) -> LossOutput:
        output = compute_loss(self.base, prepared)
        self._gradient.check(output.denominator, output.unit)
        found = torch.autograd.grad(output.loss, list(self._parameters.values()), allow_unused=True)
        # An adapter that a batch does not reach, such as a vision tower's, has no gradient, as in a plain loop.
        gradients = {key: g for key, g in zip(self._parameters, found, strict=True) if g is not None}
        norm = total_norm(gradients.values())
        if not math.isfinite(norm):
            raise NotFinite("the gradient is not finite: lower the learning rate, or look at the batch.")
        rows = prepared.model_batch.batch.rows
        self._gradient.add(gradients, output.denominator, output.unit, rows=rows, norm=norm)
        return output

    def _add_clipped(self, prepared: Prepared, private: PrivateSteps) -> tuple[LossOutput, dict[str, Any]]:
        parameters = list(self._parameters.values())
        clip_norm, rows = private.dp.max_grad_norm, prepared.model_batch.batch.rows
        private.check_rows(self._gradient.rows + rows)
        if self._clipping is None:
            self._clipping = PerExample(self.base.model, parameters, clip_norm=clip_norm)
        try:
            with self._clipping as clipping:
                output = compute_loss(self.base, prepared)
                if output.per_example_B is None or not output.separable:
                    raise InvalidRequest(
                        f"loss {prepared.loss_name!r} has no loss of each row on its own, so a row's part in it cannot "
                        "be bounded: use another with dp_config, such as token_ce."
                    )
                norms_B = clipping.backward(output.per_example_B)
            # Clipped rows are summed, whatever their losses were divided by.
            found = {key: p.grad for key, p in self._parameters.items() if p.grad is not None}
            self._gradient.add(found, None, rows=rows)
        except NonFiniteGradient as error:
            raise NotFinite(str(error)) from error
        finally:
            for parameter in parameters:
                parameter.grad = None
        return output, {**private.metrics(), **clipping_metrics(norms_B, clip_norm)}

    def optim_step(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Take an optimizer step with the accumulated gradient, where enough has come.

        Errors: InvalidRequest with nothing accumulated or beyond max_steps, BudgetExhausted for one that privacy
        forbids: nothing has changed then. NotFinite for weights or a gradient that are not finite.
        """
        check_optim_step(payload)
        rate = payload.get("learning_rate")
        rate = self.config.optimizer.learning_rate if rate is None else float(rate)
        noise = payload.get("apply_dp_noise", True)
        norm = self._take_step(rate, noise=noise) if self._may_step(noise=noise) else None
        return {
            "step": self.step,
            "learning_rate": rate,
            "applied": norm is not None,
            "grad_norm": norm,
            "dp_metrics": self.dp_metrics(),
        }

    def _may_step(self, *, noise: bool) -> bool:
        """Whether enough forward passes have come; an error where a step would never be right."""
        most = self.config.max_steps
        if most is not None and self.step >= most:
            raise InvalidRequest(f"the client has taken its max_steps of {most}: start another with more.")
        if self._private is not None:
            self._private.check(noise=noise)  # without rows it is an empty draw: a step of noise alone
            return True
        if not self._gradient.count:
            raise InvalidRequest("there is no gradient to apply: send a forward_backward before optim_step.")
        return self._gradient.count >= self.config.gradient_accumulation_steps

    def _take_step(self, rate: float, *, noise: bool) -> float:
        """Apply the accumulated gradient; return its norm before it was cut to max_grad_norm."""
        parameters, gradient, norm = list(self._parameters.values()), self._gradient.gradient(), self._gradient.norm()
        self.half_way = True
        for key, parameter in self._parameters.items():
            parameter.grad = gradient.get(key)
        try:
            if self._private is not None:
                self._private.add_noise(parameters, noise=noise)
                norm = total_norm(parameter.grad for parameter in parameters)
            if not math.isfinite(norm):
                raise NotFinite("the accumulated gradient is not finite: lower the learning rate.")
            limit = self.config.optimizer.max_grad_norm
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm, device=self.base.device))
            with learning_rate(self._optimizer, rate):
                self._optimizer.step()
        finally:
            for parameter in parameters:
                parameter.grad = None
        self._gradient.clear()
        self.step += 1
        if self._private is not None:
            self._private.spend(noise=noise)
        if not math.isfinite(total_norm(parameter.detach() for parameter in parameters)):
            raise NotFinite("the step made weights that are not finite: load a checkpoint and lower the learning rate.")
        self.half_way = False
        return norm

    def sample(self, request: "SampleRequest", *, seed: int) -> dict[str, Any]:
        """Return completions of the current weights."""
        from inft.client.sampling import sample

        with torch.no_grad(), self.base.using(self.name):
            return sample(self.base, request, seed=seed, step=self.step)

    def dp_metrics(self) -> dict[str, Any] | None:
        """Return what privacy has been spent; None without differential privacy."""
        return None if self._private is None else self._private.metrics()

    def state(self) -> LearnerState:
        """Return all that training has changed, copied to the CPU."""
        totals, values = self._gradient.state()
        tensors = {
            **with_prefix(ADAPTER, self._parameters),
            **with_prefix(OPTIMIZER, optimizer_tensors(self._optimizer, self._parameters)),
            **with_prefix(GRADIENT, totals),
        }
        private = None if self._private is None else self._private.state()
        return LearnerState(
            tensors=tensors,
            # With the seed, a checkpoint in another client goes on with the same dropout.
            values={"step": self.step, "passes": self._passes, "seed": self._seed, **values, "private": private},
        )

    def load(self, state: LearnerState, *, keep_privacy: bool = False) -> None:
        """Go on from a state. What this learner has spent of its privacy budget before stays spent.

        With `keep_privacy` the state is an earlier one of the same client, whose steps are counted already.
        Errors: UserError for a state of another adapter, optimizer or kind of privacy; nothing has changed then.
        """
        weights = of_prefix(ADAPTER, state.tensors)
        _check_weights(weights, self._parameters)
        moments = read_optimizer(of_prefix(OPTIMIZER, state.tensors), self._parameters, self.config.optimizer)
        totals = of_prefix(GRADIENT, state.tensors)
        check_totals(totals, self._parameters)
        step, passes, seed = (whole_number(state.values, name) for name in ("step", "passes", "seed"))
        private = self._loaded_privacy(state.values.get("private"), same_client=keep_privacy)
        gradient = Accumulator()
        gradient.load({key: total.to(self.base.device, copy=True) for key, total in totals.items()}, state.values)
        with torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(weights[key])
        load_optimizer(self._optimizer, moments, self._parameters)
        self._gradient, self._private = gradient, private
        self.step, self._passes, self._seed = step, passes, seed

    def _loaded_privacy(self, values: Any, *, same_client: bool) -> PrivateSteps | None:
        if self._private is None:
            if values is not None:
                raise UserError("the state is a private client's: load it into a client with dp_config.")
            return None
        return self._private.read(values).after(self._private, same_client=same_client)

    def close(self) -> None:
        """Remove the adapter from the base."""
        self.base.remove_adapter(self.name)


def _check_weights(stored: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if stored.keys() != parameters.keys():
        other = sorted(stored.keys() ^ parameters.keys())[0]
        raise UserError(f"the stored adapter is not on the same layers: {other} is only in one of the two.")
    for key, weight in stored.items():
        check_like(key, weight, parameters[key])
