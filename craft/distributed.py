"""What processes exchange: rows with gradient, ids, sums, averaged gradients. In one process each is the identity.

The default process group of torch.distributed is used, on any backend. Every process must make the same calls in the
same order. Axes: W processes, B rows of this process, M rows of all, D embedding size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BUCKET_BYTES = 256 * 2**20  # of one all-reduce


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_rows(x_BD: Tensor) -> tuple[Tensor, int]:
    """Return the rows [M, D] of all processes in rank order, and the index of this process's first row.

    B may differ between processes and may be 0. The gradient reaches the rows of every process: it is the sum over
    processes of the gradients of their losses, so that the mean of the parameters' gradients over processes is the
    gradient of the mean of the losses. Every process must run the backward pass.
    """
    if world_size() == 1:
        return x_BD, 0
    sizes = _row_counts(x_BD)
    # The switch makes the result part of a graph on every process: one that skipped the backward pass, because its
    # own rows need no gradient, would leave the others waiting.
    switch = x_BD.new_zeros((), requires_grad=torch.is_grad_enabled())
    return _GatherRows.apply(x_BD, switch, sizes), sum(sizes[: rank()])


def gather_ids(ids_BK: Tensor) -> Tensor:
    """Return the rows [M, K] of all processes in rank order, without gradient."""
    if world_size() == 1:
        return ids_BK
    return _all_rows(ids_BK.detach(), _row_counts(ids_BK))


def _row_counts(x: Tensor) -> list[int]:
    counts_W = torch.empty(world_size(), dtype=torch.int64, device=x.device)
    dist.all_gather_into_tensor(counts_W, counts_W.new_tensor([len(x)]))
    counts: list[int] = counts_W.tolist()
    return counts


def _all_rows(x_BD: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes; the shorter batches travel padded to the longest."""
    longest = max(sizes)
    if not longest:
        return torch.empty_like(x_BD)
    padded = _pad(x_BD.contiguous(), longest)
    stack = padded.new_empty(len(sizes) * longest, *x_BD.shape[1:])
    dist.all_gather_into_tensor(stack, padded)
    if min(sizes) == longest:
        return stack
    return torch.cat([rows[:size] for rows, size in zip(stack.split(longest), sizes, strict=True)])


def _pad(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


class _GatherRows(torch.autograd.Function):
    """All processes' rows; backward sums each process's rows of gradient in one reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, switch: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_rows(x_BD, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        longest = max(ctx.sizes)
        if not longest:
            return grad_MD, None, None
        stack = torch.cat([_pad(rows, longest) for rows in grad_MD.split(ctx.sizes)])
        own = stack.new_empty(longest, *stack.shape[1:])
        dist.reduce_scatter_tensor(own, stack)
        return own[: ctx.sizes[rank()]], None, None


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
    """Replace each `.grad` by its mean over processes; returns the mean of `extra` [n] float32 as well.

    One all-reduce per device and dtype, and per 256 MB of it. A parameter without gradient here counts as zero; one
    without gradient everywhere keeps None.
    """
    if world_size() == 1:
        return extra
    like: list[Tensor] = list(parameters)
    values = [parameter.grad for parameter in parameters]
    if extra is None:
        means = average_tensors(values, like)
    else:
        *means, extra = average_tensors([*values, extra.clone()], [*like, extra])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean
    return extra


@torch.no_grad()
def average_tensors(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of each value over processes, in place where there is one; None counts as in average_gradients.

    `like` gives each value's shape, dtype and device, which this process may have to know without having the value.
    """
    means = list(values)
    if world_size() > 1:
        for bucket in _buckets(like):
            _average_bucket(means, like, bucket)
    return means


def _buckets(like: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of the tensors that travel together: one device, one dtype, at most BUCKET_BYTES or one tensor."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(like):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(number)
    for numbers in by_kind.values():
        bucket: list[int] = []
        size = 0
        for number in numbers:
            if bucket and size + like[number].nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(number)
            size += like[number].nbytes
        yield bucket


def _average_bucket(values: list[Tensor | None], like: Sequence[Tensor], bucket: Sequence[int]) -> None:
    """Average some of `values` in one all-reduce, in which how many processes have each of them travels along."""
    template = like[bucket[0]]
    present = torch.tensor([float(values[number] is not None) for number in bucket]).to(template)
    sizes = [like[number].numel() for number in bucket]
    parts = [_flat(values[number], like[number]) for number in bucket]
    buffer = torch.cat([*parts, present])
    del parts
    dist.all_reduce(buffer)
    *totals, present = buffer.split([*sizes, len(bucket)])
    for number, total, processes in zip(bucket, totals, present.tolist(), strict=True):
        if processes:
            mean = total.div_(world_size()).view(like[number].shape)
            value = values[number]
            values[number] = mean.clone() if value is None else value.copy_(mean)


def _flat(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.numel()) if value is None else value.reshape(-1).to(like.dtype)
