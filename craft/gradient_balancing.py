"""Balancing the gradients of several tasks, so that none drowns another: four published strategies.

A balancer knows its tasks by name. What it works on are losses, gradient norms or gradients of whole optimizer steps;
where those come from, and on how many processes, is the trainer's affair. Axes: T tasks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Losses = Mapping[str, Tensor | float]

FAINTEST = 1e-6  # a loss below this share of the largest one is balanced as if it were this share
LEAST_WEIGHT = 0.01  # a GradNorm step that is too long for the norms at hand may not turn a task around


class GradientBalancer(ABC):
    """What all strategies have in common: named tasks, a count of optimizer steps, a state to save."""

    def __init__(self, task_names: Sequence[str], device: torch.device | str) -> None:
        self.task_names = list(task_names)
        self.device = torch.device(device)
        self._step = 0
        if not self.task_names or len(set(self.task_names)) < len(self.task_names):
            raise ValueError(f"task_names {self.task_names}: give at least one name, and each once.")

    @abstractmethod
    def compute_weights(self, losses: Losses, model: nn.Module | None = None) -> dict[str, float]:
        """Return the factor of each task's loss; to be called once per optimizer step, with the losses of that step."""

    def step(self) -> None:
        """Count an optimizer step that has been made."""
        self._step += 1

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what an optimizer may train; most strategies have nothing of the kind."""
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes in training as numbers under flat names."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, as numbers or tensors.

        Errors: ValueError when it is about other tasks or from another strategy.
        """
        self._step = int(state["step"])

    def _saved(self, state: Mapping[str, Any], kind: str) -> dict[str, float]:
        """The numbers saved as "kind.task", by task."""
        numbers = {name.removeprefix(f"{kind}."): float(x) for name, x in state.items() if name.startswith(f"{kind}.")}
        if not numbers.keys() <= set(self.task_names):
            raise ValueError(_not_mine(sorted(numbers), self.task_names))
        return numbers

    def _values(self, losses: Losses) -> dict[str, float]:
        """The losses as floats; ValueError for an unknown task and for a loss that is not finite."""
        values = {name: float(loss.detach() if isinstance(loss, Tensor) else loss) for name, loss in losses.items()}
        for name, value in values.items():
            if name not in self.task_names:
                raise ValueError(f"task {name!r} is unknown to the gradient balancing: it has {self.task_names}.")
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss of task {name!r} is {value}, which cannot be balanced. Lower the learning rate, or look "
                    "for rows without anything to learn."
                )
        return values


class LossScaleBalancer(GradientBalancer):
    """Each loss over its own running mean, so that all weigh the same whatever their scale.

    The mean is an exponential moving average of |loss| with `momentum`, one update per optimizer step in which the task
    occurs, starting from its first loss. Weights are 1 during `warmup_steps`, then in proportion 1 / mean with their
    sum T; a task that a step lacks keeps its mean, and one never seen has the weight 1. With `max_ratio` no weight is
    more than so many times another.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        device: torch.device | str,
        momentum: float = 0.99,
        warmup_steps: int = 100,
        max_ratio: float | None = None,
    ) -> None:
        super().__init__(task_names, device)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: give a number from 0 to below 1.")
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.max_ratio = _checked_ratio(max_ratio)
        self._means: dict[str, float] = {}

    def compute_weights(self, losses: Losses, model: nn.Module | None = None) -> dict[str, float]:
        """Update the means by this step's losses and return the weights."""
        for name, value in self._values(losses).items():
            mean = self._means.get(name, abs(value))
            self._means[name] = self.momentum * mean + (1 - self.momentum) * abs(value)
        weights = dict.fromkeys(self.task_names, 1.0)
        largest = max(self._means.values(), default=0.0)
        if self._step < self.warmup_steps or largest == 0:
            return weights
        inverse = {name: largest / max(mean, FAINTEST * largest) for name, mean in self._means.items()}
        return weights | _summing_to_their_number(inverse, self.max_ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the means."""
        return super().state_dict() | {f"mean.{name}": mean for name, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; ValueError when it is about other tasks."""
        super().load_state_dict(state)
        self._means = self._saved(state, "mean")


class UncertaintyWeightingBalancer(GradientBalancer):
    """Homoscedastic uncertainty (Kendall et al. 2018, eq. 7): the total is Σ ½e^{-s}L + s/2 with s = log σ² trained.

    At the optimum s = ln L, so that every task contributes ½. `log_vars` holds s, for the optimizer without weight
    decay; `weight` and `regularizer` are the two terms with their gradient.
    """

    def __init__(self, task_names: Sequence[str], device: torch.device | str, initial_log_var: float = 0.0) -> None:
        super().__init__(task_names, device)
        self.log_vars = _parameters(self.task_names, initial_log_var, self.device)

    def compute_weights(self, losses: Losses, model: nn.Module | None = None) -> dict[str, float]:
        """Return ½e^{-s} of each task; `get_regularization_loss` belongs to the total as well."""
        self._values(losses)
        return {name: self.weight(name).item() for name in self.task_names}

    def weight(self, task: str) -> Tensor:
        """Return ½e^{-s} of a task, with its gradient in s."""
        return (-self.log_vars[task]).exp() / 2

    def regularizer(self, task: str) -> Tensor:
        """Return s/2 of a task, with its gradient."""
        return self.log_vars[task] / 2

    def get_regularization_loss(self) -> Tensor:
        """Return the sum of s/2 over all tasks, with its gradient."""
        return torch.stack([self.regularizer(name) for name in self.task_names]).sum()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return s of each task."""
        return iter(self.log_vars.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and s of each task."""
        return super().state_dict() | {f"log_var.{name}": s.item() for name, s in self.log_vars.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; ValueError when it is about other tasks."""
        super().load_state_dict(state)
        _fill(self.log_vars, self._saved(state, "log_var"))


class GradNormBalancer(GradientBalancer):
    """GradNorm (Chen et al. 2018, eq. 1-2): gradients of the same size for tasks that learn at the same rate.

    With the norm n_i of a task's unweighted gradient, G_i = w_i n_i, and r_i the task's L / L(0) over the mean of all,
    the weights w descend Σ |G_i - mean(G) r_i^alpha| with the second term held constant; their sum stays T.
    Either `update` makes that step from norms, with `learning_rate` per unit of norm, or an optimizer over `parameters`
    follows `compute_gradnorm_loss` and `step` then restores the sum. L(0) is a task's first loss above 0. With
    `max_ratio` no weight is more than so many times another.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        device: torch.device | str,
        alpha: float = 1.5,
        initial_losses: Mapping[str, float] | None = None,
        learning_rate: float = 0.025,
        max_ratio: float | None = None,
    ) -> None:
        super().__init__(task_names, device)
        self.alpha = alpha
        self.max_ratio = _checked_ratio(max_ratio)
        self.learning_rate = learning_rate
        self.task_weights = _parameters(self.task_names, 1.0, self.device)
        self._initial_losses = self._values(initial_losses or {})

    def compute_weights(self, losses: Losses, model: nn.Module | None = None) -> dict[str, float]:
        """Return the weights, and note the first loss of each task."""
        self._rates(losses)
        return {name: weight.item() for name, weight in self.task_weights.items()}

    def compute_gradnorm_loss(self, task_losses: Mapping[str, Tensor], shared_params: Sequence[nn.Parameter]) -> Tensor:
        """Return Σ |G_i - target_i| over the tasks given, with its gradient in `task_weights` alone.

        The losses' graphs are kept for the caller's own backward pass. Errors: ValueError for a loss that has no
        gradient in `shared_params`, as one through GradCache: `update` takes its place there.
        """
        params = list(shared_params)
        norms = {name: _gradient_norm(name, loss, params) for name, loss in task_losses.items()}
        return self._objective(norms, self._rates(task_losses)).to(self.device)

    def update(self, norms: Mapping[str, float], losses: Losses) -> None:
        """Make one gradient step on the weights from the norms of the unweighted gradients, and restore their sum.

        A step in which a norm is not finite is left out, as GradScaler leaves out the optimizer's.
        """
        if not all(math.isfinite(norm) for norm in norms.values()):
            return
        rates = self._rates({name: losses[name] for name in norms})
        for weight in self.task_weights.values():
            weight.grad = None
        self._objective({name: torch.tensor(float(norm)) for name, norm in norms.items()}, rates).backward()
        with torch.no_grad():
            for weight in self.task_weights.values():
                if weight.grad is not None:
                    weight -= self.learning_rate * weight.grad
                    weight.grad = None
        self._renormalise()

    def step(self) -> None:
        """Count an optimizer step and restore the sum of the weights."""
        super().step()
        self._renormalise()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weight of each task."""
        return iter(self.task_weights.values())

    def _rates(self, losses: Losses) -> dict[str, float]:
        """Each task's L / L(0), over the mean of them."""
        ratios = {}
        for name, value in self._values(losses).items():
            if value < 0:
                raise ValueError(
                    f"the loss of task {name!r} is {value}: gradnorm compares losses with their start and needs them "
                    "above 0. Choose craft_gradient_balancing='loss_scale' or 'pcgrad'."
                )
            if value > 0:
                self._initial_losses.setdefault(name, value)
            ratios[name] = value / self._initial_losses[name] if name in self._initial_losses else 1.0
        total = sum(ratios.values())
        return {name: len(ratios) * ratio / total if total else 1.0 for name, ratio in ratios.items()}

    def _objective(self, norms: Mapping[str, Tensor], rates: Mapping[str, float]) -> Tensor:
        weighted_T = torch.stack([self.task_weights[name] * norm.to(self.device) for name, norm in norms.items()])
        pull_T = torch.tensor([rates[name] ** self.alpha for name in norms]).to(weighted_T)
        target_T = weighted_T.detach().mean() * pull_T
        return (weighted_T - target_T).abs().sum()

    @torch.no_grad()
    def _renormalise(self) -> None:
        floored = {name: max(weight.item(), LEAST_WEIGHT) for name, weight in self.task_weights.items()}
        for name, value in _summing_to_their_number(floored, self.max_ratio).items():
            self.task_weights[name].fill_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, the weights and L(0) of each task."""
        weights = {f"weight.{name}": weight.item() for name, weight in self.task_weights.items()}
        starts = {f"initial_loss.{name}": loss for name, loss in self._initial_losses.items()}
        return super().state_dict() | weights | starts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; ValueError when it is about other tasks."""
        super().load_state_dict(state)
        _fill(self.task_weights, self._saved(state, "weight"))
        self._initial_losses = self._saved(state, "initial_loss")


class PCGradBalancer(GradientBalancer):
    """Projecting conflicting gradients (Yu et al. 2020, algorithm 1): it changes gradients and leaves losses alone."""

    def compute_weights(self, losses: Losses, model: nn.Module | None = None) -> dict[str, float]:
        """Return 1 for each task."""
        self._values(losses)
        return dict.fromkeys(self.task_names, 1.0)

    @staticmethod
    def project_conflicting_gradients(gradients: Sequence[Tensor], order: Sequence[int] | None = None) -> list[Tensor]:
        """Return each gradient without its components against the others, taken as they came.

        Every gradient meets the others in `order` (default: as listed; the paper draws it). One that has a negative
        dot product with another at that moment is projected onto the plane normal to it. Any scale will do: only a
        gradient of exactly 0 is left out.
        """
        order = range(len(gradients)) if order is None else order
        directions = [_direction(gradient) for gradient in gradients]
        projected = []
        for i, gradient in enumerate(gradients):
            rest = gradient.flatten().to(directions[i].dtype)
            for j in order:
                along = rest.dot(directions[j])
                if i != j and along < 0:
                    rest = rest - along * directions[j]
            projected.append(rest.view_as(gradient).to(gradient.dtype))
        return projected


def pcgrad_coefficients(gram_TT: Tensor, orders: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Return the coefficient [T] of each original gradient in the sum of the projected ones (Yu 2020, algorithm 1).

    `gram_TT` holds the dot products of all pairs, in float64 for float32 gradients; task i meets the others in
    ``orders[i]`` (default: as listed). Exact: projections stay in the span of the originals, so that the gradients
    themselves need not be copied.
    """
    tasks = len(gram_TT)
    orders = [range(tasks)] * tasks if orders is None else orders
    coefficients_TT = torch.eye(tasks, dtype=gram_TT.dtype, device=gram_TT.device)
    for i, order in enumerate(orders):
        for j in order:
            dot = coefficients_TT[i] @ gram_TT[:, j]
            if i != j and dot < 0 < gram_TT[j, j]:
                coefficients_TT[i, j] -= dot / gram_TT[j, j]
    return coefficients_TT.sum(0)


_STRATEGIES: dict[str, tuple[type[GradientBalancer], tuple[str, ...]]] = {
    "loss_scale": (LossScaleBalancer, ("momentum", "warmup_steps", "max_ratio")),
    "uncertainty": (UncertaintyWeightingBalancer, ("initial_log_var",)),
    "gradnorm": (GradNormBalancer, ("alpha", "initial_losses", "learning_rate", "max_ratio")),
    "pcgrad": (PCGradBalancer, ()),
}


def create_gradient_balancer(
    strategy: str, task_names: Sequence[str], device: torch.device | str, **kwargs: Any
) -> GradientBalancer | None:
    """Return the balancer of a strategy, None for "none".

    Keyword arguments are those of the classes; one call may hold those of several strategies, and each takes its own.
    Errors: ValueError for an unknown strategy, TypeError for an argument that no strategy has.
    """
    known = {name for _, names in _STRATEGIES.values() for name in names}
    if unknown := kwargs.keys() - known:
        raise TypeError(f"no gradient balancing takes {sorted(unknown)}: they take {sorted(known)}.")
    if strategy == "none":
        return None
    if strategy not in _STRATEGIES:
        raise ValueError(f"gradient balancing {strategy!r} is unknown: choose one of none, {', '.join(_STRATEGIES)}.")
    balancer, names = _STRATEGIES[strategy]
    return balancer(task_names, device, **{name: kwargs[name] for name in names if name in kwargs})


def _checked_ratio(max_ratio: float | None) -> float | None:
    if max_ratio is not None and not max_ratio >= 1:
        raise ValueError(f"max_ratio is {max_ratio}: give a number from 1, or None for no limit.")
    return max_ratio


def _summing_to_their_number(weights: Mapping[str, float], max_ratio: float | None) -> dict[str, float]:
    """The weights scaled to the sum T, the small ones raised first to the largest one's share of `max_ratio`."""
    least = 0.0 if max_ratio is None else max(weights.values()) / max_ratio
    raised = {name: max(weight, least) for name, weight in weights.items()}
    scale = len(raised) / sum(raised.values())
    return {name: weight * scale for name, weight in raised.items()}


def _parameters(names: Sequence[str], value: float, device: torch.device) -> nn.ParameterDict:
    # From pairs: a plain dictionary would be sorted, and the tasks keep their order.
    return nn.ParameterDict([(name, nn.Parameter(torch.tensor(float(value), device=device))) for name in names])


@torch.no_grad()
def _fill(parameters: nn.ParameterDict, numbers: Mapping[str, float]) -> None:
    if numbers.keys() != set(parameters.keys()):
        raise ValueError(_not_mine(sorted(numbers), list(parameters.keys())))
    for name, parameter in parameters.items():
        parameter.fill_(numbers[name])


def _not_mine(saved: Sequence[str], own: Sequence[str]) -> str:
    return (
        f"the saved gradient balancing is about the tasks {saved}, this one about {own}: resume with the "
        "craft_gradient_balancing and the data that the run was started with."
    )


def _gradient_norm(task: str, loss: Tensor, params: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients if gradient is not None]
    if not norms:
        raise ValueError(
            f"the loss of task {task!r} has no gradient in the shared parameters given. Give the parameters that every "
            "task reaches; for a loss through GradCache call update() with the norms found after its backward pass."
        )
    return torch.linalg.vector_norm(torch.stack(norms))


def _direction(gradient: Tensor) -> Tensor:
    """The flat unit vector of a gradient, at least float32, zero for zero; scaled first, lest a square underflow."""
    flat = gradient.flatten().to(torch.promote_types(gradient.dtype, torch.float32))
    largest = flat.abs().amax() if flat.numel() else flat.new_zeros(())
    return flat if largest == 0 else nn.functional.normalize(flat / largest, dim=0)
