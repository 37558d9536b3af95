"""Seeds, deterministic kernels, and what golden files need: the platform's fingerprint and floats as hex."""

import os
import platform
import random
import warnings
from collections.abc import Iterable
from importlib import metadata

import numpy as np
import torch
from torch import Tensor

from params.errors import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # the two with which cuBLAS sums in one order; the first is the faster


def set_seed(seed: int) -> None:
    """Seed Python, numpy, torch and every CUDA device.

    Errors: UserError for what is no whole number from 0 to 2^32 - 1, the range of numpy.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}: give a whole number from 0 to {2**32 - 1}.")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def deterministic(enabled: bool = True) -> None:
    """Let torch use only kernels that give the same result in every run, and raise where there is none.

    Sets CUBLAS_WORKSPACE_CONFIG unless it has one of CUBLAS_WORKSPACES; cuBLAS reads it once, so this warns when CUDA
    is at work already. False undoes all but the variable and cuDNN's choice of kernels by time, which stays off.
    """
    if enabled and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES[0]
        if torch.cuda.is_initialized():
            warnings.warn(
                "deterministic(True) came after the first use of CUDA: call it before, or start with "
                f"CUBLAS_WORKSPACE_CONFIG={CUBLAS_WORKSPACES[0]}; matrix products may differ between runs.",
                stacklevel=2,
            )
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        torch.backends.cudnn.benchmark = False  # it times kernels and takes the fastest, another one in another run


def platform_fingerprint() -> dict[str, str | int | bool]:
    """Return what decides the last bits of a float here: versions, machine, vector unit, threads, device, mode.

    Two runs with equal fingerprints and seeds are to agree exactly; plain JSON.
    """
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "numpy": np.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def float_hex(values: Iterable[float] | Tensor) -> list[str]:
    """Return numbers as hexadecimal floats, which lose no bit; float.fromhex reads them back."""
    listed = values.detach().double().flatten().tolist() if isinstance(values, Tensor) else values
    return [float(value).hex() for value in listed]
