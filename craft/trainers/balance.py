"""How the losses of an optimizer step are weighed and their gradients put together."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from craft.config import CRAFTConfigMixin
from craft.distributed import average_gradients
from craft.gradient_balancing import GradNormBalancer, UncertaintyWeightingBalancer, create_gradient_balancer
from craft.trainers.tasks import TaskGradients
from craft.trainers.window import TASKS, Window


class Balance:
    """Weighs each micro-batch's share of a loss, and finishes the step: average over ranks, combine, weigh anew.

    Balancers see unweighted losses and gradients; alpha multiplies what they make of them.
    """

    def __init__(
        self, args: CRAFTConfigMixin, device: torch.device, *, note_norm: Callable[[str, float], None]
    ) -> None:
        self.args = args
        self.note_norm = note_norm
        self.balancer = create_gradient_balancer(
            args.craft_gradient_balancing,
            list(TASKS),
            device,
            momentum=args.craft_loss_scale_momentum,
            alpha=args.craft_gradnorm_alpha,
            # A loss that is solved, as the contrastive one of self_align soon is, must not take all the gradient.
            max_ratio=args.craft_balancing_max_ratio,
        )
        self.window = Window()
        self.weights = dict.fromkeys(TASKS, 1.0)
        self.tasks: TaskGradients | None = None
        self._losses: dict[str, Tensor] = {}  # of this window so far
        self._seen: dict[str, tuple[float, float]] = {}  # task -> gradient norm and loss since GradNorm's last update

    @property
    def strategy(self) -> str:
        """craft_gradient_balancing."""
        return self.args.craft_gradient_balancing

    @property
    def separates(self) -> bool:
        """Whether the tasks' gradients have to be told apart."""
        return (
            self.args.craft_gradient_balancing in ("gradnorm", "pcgrad")
            or self.args.craft_gradient_clip_per_task
            or "gradient_norm" in self.args.craft_report_metrics
        )

    def separate(self, *, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter]) -> None:
        """Keep the tasks' gradients apart from now on, if they have to be told apart."""
        if self.separates and self.tasks is None:
            self.tasks = TaskGradients(TASKS, shared=shared, own=own)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains of the balancer: uncertainty weights."""
        return list(self.balancer.parameters()) if isinstance(self.balancer, UncertaintyWeightingBalancer) else []

    @contextmanager
    def running(self, task: str) -> Iterator[None]:
        """Around a backward pass of one task."""
        if self.tasks is None:
            yield
            return
        with self.tasks.running(task):
            yield

    def weighted(self, task: str, share: Tensor, alpha: float) -> Tensor:
        """A micro-batch's share of a task's loss as it enters the objective; a balancer's penalty is part of it."""
        before = self._losses.get(task)
        self._losses[task] = share.detach() if before is None else before + share.detach()
        if isinstance(self.balancer, UncertaintyWeightingBalancer):
            penalty = self.balancer.regularizer(task) / self.window.batches(task)
            return alpha * (self.balancer.weight(task) * share + penalty)
        return share * (alpha * self.weights[task])

    def finish(self, parameters: Sequence[nn.Parameter], alphas: Mapping[str, float], *, scale: float) -> None:
        """After the last micro-batch: gradients and losses averaged over ranks, the next step's weights.

        ``alphas`` are those that each task was weighted with, ``scale`` the loss scale of float16 training.
        """
        zero = torch.zeros((), device=next((p.device for p in parameters), None))
        losses = torch.stack([self._losses.get(task, zero).float().to(zero.device) for task in TASKS])
        averaged = average_gradients(parameters, losses) if self.tasks is None else self.tasks.average(losses)
        assert averaged is not None, "losses were given along"
        mean = dict(zip(TASKS, averaged, strict=True))
        if self.tasks is not None:
            self._combine(self.tasks, mean, alphas, scale)
        ran = {task: loss for task, loss in mean.items() if self.window.batches(task)}
        # A loss that is not finite is the trainer's to deal with; balancing goes on with what it had.
        if self.balancer is not None and all(loss.isfinite() for loss in ran.values()):
            self.weights = self.balancer.compute_weights(ran)
            self.balancer.step()
        self._losses = {}
        self.window = Window()

    def forget(self) -> None:
        """Drop the losses and gradients of a step that was not finished."""
        self._losses = {}
        self.window = Window()
        if self.tasks is not None:
            self.tasks.forget()

    def _combine(
        self, tasks: TaskGradients, losses: Mapping[str, Tensor], alphas: Mapping[str, float], scale: float
    ) -> None:
        # What each task's gradient was multiplied by: norms and limits are those of the gradient of its loss alone.
        factors = {task: alphas[task] * self.weights[task] * scale for task in TASKS}
        norms = {task: float(norm) / factors[task] for task, norm in tasks.norms().items() if factors[task] > 0}
        if "gradient_norm" in self.args.craft_report_metrics:
            for task, norm in norms.items():
                self.note_norm(task, norm)
        if isinstance(self.balancer, GradNormBalancer):
            self._feed(self.balancer, norms, losses)
        if self.args.craft_gradient_clip_per_task:
            tasks.clip({task: self.args.craft_gradient_clip_value * factor for task, factor in factors.items()})
        tasks.combine(project=self.args.craft_gradient_balancing == "pcgrad")

    def _feed(self, balancer: GradNormBalancer, norms: Mapping[str, float], losses: Mapping[str, Tensor]) -> None:
        """Give GradNorm the norms of the unweighted gradients, once each task has run: a step may hold one alone."""
        found = {task: (norm, float(losses[task])) for task, norm in norms.items()}
        self._seen |= {task: pair for task, pair in found.items() if all(map(math.isfinite, pair))}
        if len(self._seen) == len(TASKS):
            balancer.update(
                {task: norm for task, (norm, _) in self._seen.items()},
                {task: loss for task, (_, loss) in self._seen.items()},
            )
            self._seen = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to remember, as JSON can hold it."""
        own = self.balancer.state_dict() if self.balancer is not None else {}
        return {"strategy": self.strategy, "weights": self.weights, "seen": self._seen, "balancer": own}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; ValueError when it was balanced in another way."""
        if state["strategy"] != self.strategy:
            raise ValueError(
                f"the checkpoint was saved with craft_gradient_balancing={state['strategy']!r}, and this run has "
                f"{self.strategy!r}: resume with the one that the run began with."
            )
        self.weights = dict(state["weights"])
        self._seen = {task: (norm, loss) for task, (norm, loss) in state["seen"].items()}
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
