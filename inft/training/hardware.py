"""What the run stands on: devices, library versions and how much memory it took."""

import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from inft.training.processes import process_count
from params.errors import UserError

LIBRARIES = ("inft", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
# What torch and the CUDA libraries say of a full memory in a plain RuntimeError: of a CPU's allocator on Linux, on
# Windows and on macOS, of the driver, and of cuBLAS and cuDNN.
FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "alloc_cpu",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
)


def hardware() -> dict[str, Any]:
    """CUDA, GPU name, torch and its CUDA build, bfloat16 support, threads, processes of the run."""
    cuda = torch.cuda.is_available()
    return {
        "cuda": cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "gpu_memory_bytes": [
            torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
        ],
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "bf16": has_bf16(),
        "threads": torch.get_num_threads(),  # of each process
        "processes": process_count(),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 itself; emulation, which older cards offer, is slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def hardware_line(found: dict[str, Any]) -> str:
    """The same in one line for the console."""
    devices = ", ".join(found["gpus"]) if found["cuda"] else "no CUDA device"
    build = f"CUDA {found['cuda_build']}" if found["cuda_build"] else "CPU build"
    bf16 = "supported" if found["bf16"] else "not supported"
    threads = f"{found['threads']} CPU thread{'s' if found['threads'] > 1 else ''}"
    if found["processes"] > 1:
        threads = f"{found['processes']} processes of {threads}"
    return f"{devices} · torch {found['torch']} ({build}) · bf16 mixed precision {bf16} · {threads}"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide the result; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process and peak GPU memory, in bytes; None without a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak_gpu_bytes": gpu}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the machine's memory is full; torch has no class for the latter."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in FULL)


@contextmanager
def out_of_memory_told(remedy: str) -> Iterator[None]:
    """Turn a full memory into a message that says what takes less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        whose = "GPU's" if isinstance(error, torch.OutOfMemoryError) else "machine's"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the {whose} memory is full. {remedy} Checkpoints are kept. ({said})") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
