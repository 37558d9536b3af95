"""Work in batches that are halved for as long as the GPU's memory does not suffice."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from params.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def in_batches(items: Sequence[T], size: int, work: Callable[[Sequence[T]], R]) -> Iterator[R]:
    """Yield what ``work`` makes of each batch; UserError when the memory does not suffice for a single item."""
    for start in range(0, len(items), size):
        yield from halving(items[start : start + size], work)


def halving(batch: Sequence[T], work: Callable[[Sequence[T]], R]) -> Iterator[R]:
    """Yield what ``work`` makes of the batch, or of its halves when the GPU's memory is full."""
    try:
        result = work(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise UserError(
                f"the GPU's memory does not suffice for one row ({str(error).splitlines()[0]}): lower "
                "basic.max_length or, for Aya, basic.max_image_tiles; or set qlora.load_in_4bit=true."
            ) from error
    else:
        yield result
        return
    torch.cuda.empty_cache()  # out of the handler: until then the traceback holds the tensors of the failed batch
    half = len(batch) // 2
    yield from halving(batch[:half], work)
    yield from halving(batch[half:], work)
