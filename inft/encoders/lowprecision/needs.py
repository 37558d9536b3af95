"""What a recipe needs of the machine, and what of it is missing: packages, a GPU, its compute capability."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch

from params.encoder_lowprecision import LowPrecision
from params.lowprecision import TorchAOParams

Capability = tuple[int, int]

FAMILIES: Mapping[Capability, str] = {
    (8, 9): "Ada or Hopper",
    (10, 0): "Blackwell",
    (12, 0): "Blackwell, sm120a",
}
# Of torchao: what is emulated runs anywhere, and mxfp4_qat with it. torchao's nvfp4_qat multiplies NVFP4 by hardware in
# the forward pass: torch has no such product without Blackwell.
_TORCHAO: Mapping[str, Capability | None] = {
    "float8_tensorwise": (8, 9),
    "float8_rowwise": (8, 9),
    "float8_rowwise_with_gw_hp": (8, 9),
    "mxfp8_emulated": None,
    "mxfp8_cublas": (10, 0),
    "mxfp8_cublas_rceil": (10, 0),
    "mxfp4_emulated": None,
    "mxfp4_cutlass": (10, 0),
    "mxfp4_qat": None,
    "nvfp4_qat": (10, 0),
}
_TRANSFORMER_ENGINE: Mapping[str, Capability] = {
    "fp8_delayed": (8, 9),
    "fp8_current": (8, 9),
    "mxfp8": (10, 0),
    "nvfp4": (10, 0),
}
_PACKAGES: Mapping[str, Mapping[str, str]] = {  # module -> how it is installed
    "torchao": {"torchao": "pip install 'inft[lowprecision]'"},
    "transformer_engine": {"transformer_engine": "pip install --no-build-isolation 'inft[transformer_engine]'"},
    "quartet2": {
        "quartet2": "pip install --no-build-isolation 'inft[quant_quartet]'",
        "qutlass": "pip install --no-build-isolation 'qutlass @ git+https://github.com/IST-DASLab/qutlass.git'",
    },
}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What must be there for a recipe."""

    packages: Mapping[str, str]  # module -> how it is installed
    capability: Capability | None = None  # lowest compute capability of the GPU; None: runs without a GPU
    below: Capability | None = None  # the first compute capability it does not support


class Machine(NamedTuple):
    """What is there."""

    gpu: str | None  # its name; None without one
    capability: Capability | None
    torch: str  # version
    cuda: str | None  # that torch was built for; None: a CPU build
    modules: frozenset[str]  # packages that can be imported


def needs_of(name: str, section: LowPrecision) -> Needs:
    """What the enabled section `name` needs with its recipe."""
    packages = _PACKAGES[name]
    if isinstance(section, TorchAOParams):
        return Needs(packages=packages, capability=None if section.emulate else _TORCHAO[section.recipe])
    if name == "quartet2":
        return Needs(packages=packages, capability=(12, 0), below=(13, 0))
    # Transformer Engine itself refuses mxfp8 from 12.0 on: not all layouts of the product exist there.
    below = (12, 0) if section.recipe == "mxfp8" else None
    return Needs(packages=packages, capability=_TRANSFORMER_ENGINE[section.recipe], below=below)


def this_machine() -> Machine:
    """The GPU that this process would take, torch's build and the installed packages."""
    modules = {module for packages in _PACKAGES.values() for module in packages if find_spec(module) is not None}
    cuda = torch.cuda.is_available()
    return Machine(
        gpu=torch.cuda.get_device_name() if cuda else None,
        capability=torch.cuda.get_device_capability() if cuda else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        modules=frozenset(modules),
    )


def missing(needs: Needs, machine: Machine) -> list[str]:
    """What the machine lacks, each in words; empty when it has everything."""
    lacking = [
        f"the package {module} ({install})"
        for module, install in needs.packages.items()
        if module not in machine.modules
    ]
    low = needs.capability
    if low is not None and not _fits(low, needs.below, machine.capability):
        lacking.append(f"{_wanted(low, needs.below)}; found {_found(machine)}")
    return lacking


def _fits(low: Capability, below: Capability | None, found: Capability | None) -> bool:
    return found is not None and low <= found and (below is None or found < below)


def _wanted(low: Capability, below: Capability | None) -> str:
    limit = "" if below is None else f" and below {_dotted(below)}"
    return f"a GPU of compute capability {_dotted(low)} or higher{limit} ({FAMILIES[low]})"


def _found(machine: Machine) -> str:
    build = f"torch {machine.torch}, {f'CUDA {machine.cuda}' if machine.cuda else 'built without CUDA'}"
    if machine.gpu is None or machine.capability is None:
        return f"no GPU ({build})"
    return f"{machine.gpu} of {_dotted(machine.capability)} ({build})"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
