"""A client's state as a directory: an adapter that PEFT loads, and what training goes on from.

adapter_model.safetensors and adapter_config.json are PEFT's; optimizer.safetensors and gradient.safetensors hold what
their names say, where there is any; state.json has the rest and the SHA-256 of the others. Nothing is pickled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inft.client.accumulator import Accumulator
from inft.client.manifest import content_hash
from inft.client.state import ADAPTER, GRADIENT, OPTIMIZER, LearnerState, of_prefix
from inft.training.storage import STATE_FILE, file_sha256
from params.client import TrainingConfig
from params.client_resolve import as_mapping, training_config
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.bases import Base

VERSION = 1  # of state.json
ADAPTER_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
TENSOR_FILES = {ADAPTER: ADAPTER_FILE, OPTIMIZER: "optimizer.safetensors", GRADIENT: "gradient.safetensors"}
FIELDS = ("version", "base", "config", "values", "info", "files")  # of state.json, beside its own hash
ELSEWHERE = "The directory is damaged: use another checkpoint."


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written."""

    content_hash: str  # SHA-256 over state.json, and so over the hashes of all files
    size_bytes: int  # of all files


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read, whole and checked."""

    state: LearnerState
    config: TrainingConfig
    info: Mapping[str, Any]  # what the writer was given
    base_name: str
    base_fingerprint: str
    content_hash: str


def write_checkpoint(
    directory: Path,
    state: LearnerState,
    *,
    base: "Base",
    config: TrainingConfig,
    include_optimizer: bool,
    include_gradients: bool,
    info: Mapping[str, Any],
) -> Written:
    """Fill an empty directory with a client's state; the same input gives the same bytes.

    Without the optimizer, loading starts it afresh; without gradients, what was accumulated is left out.
    """
    kept = {ADAPTER, *([OPTIMIZER] if include_optimizer else []), *([GRADIENT] if include_gradients else [])}
    for prefix, name in TENSOR_FILES.items():
        tensors = of_prefix(prefix, state.tensors) if prefix in kept else {}
        if tensors:
            _write_tensors(directory / name, tensors)
    settings = _settings(base, config)
    (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    values = {**state.values, **({} if include_gradients else Accumulator().state()[1])}
    stored: dict[str, Any] = {
        "version": VERSION,
        "base": {"name": base.name, "family": base.spec.name, "fingerprint": base.fingerprint},
        "config": as_mapping(config),
        "values": values,
        "info": dict(info),
        "files": {path.name: file_sha256(path) for path in sorted(directory.iterdir())},
    }
    hashed = content_hash(stored)
    text = json.dumps({**stored, "content_hash": hashed}, indent=2, sort_keys=True)
    (directory / STATE_FILE).write_text(text + "\n", encoding="utf-8")
    return Written(content_hash=hashed, size_bytes=sum(path.stat().st_size for path in directory.iterdir()))


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return a checkpoint whose every file is as it was written.

    Errors: UserError that names the file that is missing, damaged or of another version.
    """
    stored = _read_state(directory / STATE_FILE)
    for name, digest in stored["files"].items():
        if name not in (*TENSOR_FILES.values(), SETTINGS_FILE):
            raise UserError(f"{directory / STATE_FILE} lists a file {name!r:.60}, which no checkpoint has. {ELSEWHERE}")
        _check_file(directory / name, digest)
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, file in TENSOR_FILES.items()
        if file in stored["files"]
        for name, tensor in _read_tensors(directory / file).items()
    }
    return Checkpoint(
        state=LearnerState(tensors=tensors, values=stored["values"]),
        config=_config(directory, stored["config"]),
        info=stored["info"],
        base_name=str(stored["base"].get("name")),
        base_fingerprint=str(stored["base"].get("fingerprint")),
        content_hash=stored["content_hash"],
    )


def check_fits(checkpoint: Checkpoint, base: "Base", config: TrainingConfig) -> None:
    """Raise UserError unless a client on `base` with `config` can go on from the checkpoint.

    Base, rank, alpha and layers must be the same, privacy of the same kind, and the optimizer where there is one in it.
    """
    other, mine, theirs = checkpoint.config, config.lora, checkpoint.config.lora
    if checkpoint.base_fingerprint != base.fingerprint:
        raise UserError(
            f"the checkpoint is of other weights ({checkpoint.base_name}) than {base.name} has: load it into a client "
            "on that model."
        )
    for name in ("rank", "alpha"):
        if getattr(mine, name) != getattr(theirs, name):
            raise UserError(
                f"the checkpoint has lora_config.{name}={getattr(theirs, name)}, and this client "
                f"{getattr(mine, name)}: create a client with {name}={getattr(theirs, name)}."
            )
    if set(base.targets(mine)) != set(base.targets(theirs)):
        raise UserError(
            f"the checkpoint adapts other layers ({', '.join(theirs.target_modules)}) than this client "
            f"({', '.join(mine.target_modules)}): create a client with its lora_config.target_modules."
        )
    if (config.dp is None) != (other.dp is None):
        kinds = ("with", "without") if other.dp is not None else ("without", "with")
        raise UserError(
            f"the checkpoint was trained {kinds[0]} differential privacy, and this client trains {kinds[1]}: what it "
            "spent could not be counted on. Load it into a client of its own kind."
        )
    stored = any(name.startswith(OPTIMIZER) for name in checkpoint.state.tensors)
    if stored and config.optimizer.name != other.optimizer.name:
        raise UserError(
            f"the checkpoint has the state of {other.optimizer.name}, and this client uses {config.optimizer.name}: "
            "save it with include_optimizer=false, or create a client with its optimizer."
        )


def _settings(base: "Base", config: TrainingConfig) -> dict[str, Any]:
    """The adapter as adapter_config.json has it."""
    from inft.client.adapters import adapter_settings

    settings = adapter_settings(config.lora, base.targets(config.lora))
    settings.base_model_name_or_path, settings.inference_mode = base.name, True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. {ELSEWHERE}") from error


def _read_state(path: Path) -> dict[str, Any]:
    """state.json with its fields, each of its type, under the hash that it carries."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {ELSEWHERE}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}. {ELSEWHERE}") from error
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        found = stored.get("version") if isinstance(stored, dict) else None
        raise UserError(f"{path} is of version {found!r:.20}, and {VERSION} is read here. {ELSEWHERE}")
    wrong = [name for name in FIELDS[1:] if not isinstance(stored.get(name), dict)]
    if wrong:
        raise UserError(f"{path} has no {wrong[0]}. {ELSEWHERE}")
    if stored.get("content_hash") != content_hash({name: stored[name] for name in FIELDS}):
        raise UserError(f"{path} is not as it was written. {ELSEWHERE}")
    for name in (ADAPTER_FILE, SETTINGS_FILE):
        if name not in stored["files"]:
            raise UserError(f"{path} does not list {name}. {ELSEWHERE}")
    return stored


def _check_file(path: Path, digest: Any) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {ELSEWHERE}") from error
    if found != digest:
        raise UserError(f"{path} is not as it was written. {ELSEWHERE}")


def _config(directory: Path, values: Any) -> TrainingConfig:
    try:
        return training_config(values)
    except UserError as error:
        raise UserError(f"{directory / STATE_FILE} has a configuration that is none: {error} {ELSEWHERE}") from error
