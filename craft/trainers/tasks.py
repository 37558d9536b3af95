"""The gradients of each task kept apart over the micro-batches of an optimizer step, and combined just before it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from craft.distributed import average_gradients
from craft.gradient_balancing import pcgrad_coefficients

Gradients = dict[int, Tensor]  # position of the parameter -> its gradient


class TaskGradients:
    """One buffer of gradients per task; ``.grad`` points into the buffer of the task that runs, so nothing is copied.

    ``shared`` are the model's parameters, which every task reaches; ``own`` those of the contrastive head, which take
    no part in projections and norms.
    """

    def __init__(self, tasks: Sequence[str], *, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter]) -> None:
        self.parameters = [*shared, *own]
        self.n_shared = len(shared)
        self.buffers: dict[str, Gradients] = {task: {} for task in tasks}

    @contextmanager
    def running(self, task: str) -> Iterator[None]:
        """Let backward passes inside add to the buffer of ``task``; may be nested."""
        outside = self._take()
        self._put(self.buffers[task])
        try:
            yield
        finally:
            self.buffers[task] = self._take()
            self._put(outside)

    def average(self, extra: Tensor | None = None) -> Tensor | None:
        """Average every buffer over the ranks, one all-reduce a task; ``extra`` travels with the first."""
        averaged: Tensor | None = None
        for number, task in enumerate(self.buffers):
            self._put(self.buffers[task])
            result = average_gradients(self.parameters, extra if number == 0 else None)
            averaged = result if number == 0 else averaged
            self.buffers[task] = self._take()
        return averaged

    def norms(self) -> dict[str, Tensor]:
        """L2 norm of each task's gradient over the shared parameters; only tasks that ran are in it."""
        return {task: _norm(self._shared(task)) for task, buffer in self.buffers.items() if buffer}

    def clip(self, limit: float) -> None:
        """Scale each task's gradient, head included, to a norm of at most ``limit``."""
        for buffer in self.buffers.values():
            if buffer:
                factor = (limit / (_norm(list(buffer.values())) + 1e-6)).clamp(max=1.0)
                for gradient in buffer.values():
                    gradient.mul_(factor.to(gradient.device))

    def combine(self, *, project: bool) -> None:
        """Put the sum of the tasks' gradients into ``.grad``, conflicts projected away if asked (Yu 2020), and forget
        them."""
        ran = [task for task, buffer in self.buffers.items() if buffer]
        coefficients = dict.fromkeys(ran, 1.0)
        if project and len(ran) > 1:
            coefficients = dict(zip(ran, pcgrad_coefficients(self._gram(ran)).tolist(), strict=True))
        for index, parameter in enumerate(self.parameters):
            projected = index < self.n_shared
            parts = [
                self.buffers[task][index] * coefficients[task] if projected and coefficients[task] != 1.0 else grad
                for task in ran
                if (grad := self.buffers[task].get(index)) is not None
            ]
            for first, second in pairwise(parts):
                second.add_(first)
            parameter.grad = parts[-1] if parts else None
        self.buffers = {task: {} for task in self.buffers}

    def _gram(self, tasks: Sequence[str]) -> Tensor:
        """Dot products of the tasks' gradients over the shared parameters [T, T], float64."""
        gram_TT = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        for i, first in enumerate(tasks):
            for j, second in enumerate(tasks[: i + 1]):
                common = [index for index in self.buffers[first] if index < self.n_shared]
                dots = [
                    (self.buffers[first][index].double() * self.buffers[second][index].double()).sum().cpu()
                    for index in common
                    if index in self.buffers[second]
                ]
                gram_TT[i, j] = gram_TT[j, i] = sum(dots, torch.zeros((), dtype=torch.float64))
        return gram_TT

    def _shared(self, task: str) -> list[Tensor]:
        return [gradient for index, gradient in self.buffers[task].items() if index < self.n_shared]

    def _take(self) -> Gradients:
        taken = {i: parameter.grad for i, parameter in enumerate(self.parameters) if parameter.grad is not None}
        for index in taken:
            self.parameters[index].grad = None
        return taken

    def _put(self, gradients: Gradients) -> None:
        for index, gradient in gradients.items():
            self.parameters[index].grad = gradient


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm([gradient.float() for gradient in gradients])
    return torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms]))
