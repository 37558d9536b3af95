"""The gradients of each task kept apart over the micro-batches of an optimizer step, and combined just before it."""

from collections.abc import Iterator, Mapping, Sequence
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

    def clip(self, limits: Mapping[str, float]) -> None:
        """Scale each task's gradient, head included, to a norm of at most its limit."""
        for task, buffer in self.buffers.items():
            if buffer:
                factor = (limits[task] / (_norm(list(buffer.values())) + 1e-6)).clamp(max=1.0)
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
                grad.mul_(coefficients[task]) if projected and coefficients[task] != 1.0 else grad
                for task in ran
                if (grad := self.buffers[task].get(index)) is not None
            ]
            for first, second in pairwise(parts):
                second.add_(first)
            parameter.grad = parts[-1] if parts else None
        self.forget()

    def forget(self) -> None:
        """Drop every gradient that was kept."""
        self.buffers = {task: {} for task in self.buffers}

    def _gram(self, tasks: Sequence[str]) -> Tensor:
        """Dot products of the tasks' gradients over the shared parameters [T, T], float64."""
        gram_TT = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        for i, first in enumerate(tasks):
            peak = _peak(self._shared(first)) or 1.0
            for j, second in enumerate(tasks[: i + 1]):
                gram_TT[i, j] = gram_TT[j, i] = self._dot(first, second, peak)
        return gram_TT

    def _dot(self, first: str, second: str, peak: float) -> Tensor:
        """Dot product of two tasks' gradients over the shared parameters, float64; ``peak`` is the first's largest."""
        one, other = self.buffers[first], self.buffers[second]
        # One factor divided by its peak: no product underflows or overflows where the other factor does not. torch.sum
        # adds up in a tree: float32 keeps its digits, which BLAS' dot products lose over millions of terms.
        dots = [
            (_wide(one[i]) / peak).mul_(_wide(other[i])).sum().double().cpu()
            for i in one
            if i < self.n_shared and i in other
        ]
        return torch.stack(dots).sum() * peak if dots else torch.zeros((), dtype=torch.float64)

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


def _peak(gradients: Sequence[Tensor]) -> float:
    """The largest magnitude in a gradient; 0 for none."""
    # Not torch._foreach_norm(ord=inf), which takes fifteen times as long on a CPU.
    ends = [torch.stack(torch.aminmax(gradient)).abs().amax() for gradient in gradients if gradient.numel()]
    return max(map(float, ends), default=0.0)


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
