"""A full memory is known as one, whatever class of error says so."""

import pytest
import torch

from inft.training.hardware import is_out_of_memory, out_of_memory_told
from params.errors import UserError


def raised(call) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("call", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)], ids=["torch", "python"])
def test_a_machine_that_has_not_the_memory_says_so(call):
    assert is_out_of_memory(raised(call))
    with pytest.raises(UserError, match=r"the machine's memory is full\. Use less\. Checkpoints are kept\. \(\S+"):
        told(call)


def told(call):
    with out_of_memory_told("Use less."):
        call()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_full_memory_is_told_from_other_errors(error, full):
    assert is_out_of_memory(error) == full


def test_another_error_is_let_through():
    with pytest.raises(RuntimeError, match="other"):
        told(lambda: (_ for _ in ()).throw(RuntimeError("other")))
