"""What a directory of inft holds: an adapter with its origin and size, a run, a checkpoint, or a merged model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inft.evaluation.merged import MERGE_FILE, damaged_files, read_merged
from inft.models import MODELS, load_spec
from inft.models.spec import ModelSpec
from inft.training.resume import CHECKPOINT, MANIFEST, PARAMS_FILE, checkpoints, damage, is_run_directory
from inft.training.storage import BEST_FILE
from inft.training.stored import (
    CONFIG_FILE,
    RUN_BEST,
    WEIGHTS_FILE,
    StoredAdapter,
    adapter_directory,
    changed_files,
    read_unchecked,
)
from params import TrainParams, UserError
from params.resolve import load_params

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 5  # layers that are named
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))  # endings of tensors' names
PREFIX = "base_model.model."
PEFT_DEFAULT = 8  # of r and lora_alpha, where adapter_config.json leaves them out
Kind = Literal["adapter", "run", "checkpoint", "merged model"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer that an adapter changes."""

    name: str  # in the base model
    part: str
    rank: int
    parameters: int
    norm: float | None  # ||s B A||, Frobenius; None: a value is not finite
    untrained: bool  # B is all zero


@dataclass(frozen=True, kw_only=True)
class Part:
    """The adapted layers of one part."""

    part: str
    layers: int
    parameters: int
    mean_norm: float | None  # of the layers whose values are finite
    largest_norm: float | None


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What there is to say of a stored adapter."""

    directory: str
    family: str | None
    base_model: str | None  # hub id or path, "" for the embedded model; None: nothing says
    mode: str | None
    method: str | None  # sft, dpo, orpo, grpo or ppo
    task: str | None
    step: int | None
    metric: str | None
    value: float | None
    why: str | None  # this step was stored
    r: int
    alpha: float
    dropout: float
    bias: str
    init: str
    dora: bool
    rslora: bool
    quantised: bool  # trained on 4-bit weights
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int  # of everything in the directory
    sha256: str  # of the weights
    listed_files: int  # with a checksum in best.json
    changed_files: tuple[str, ...]  # of those, missing or not as they were written
    parts: tuple[Part, ...]
    largest: tuple[Layer, ...]
    not_finite: tuple[str, ...]  # tensors
    untrained: tuple[str, ...]  # layers whose B is all zero


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """One checkpoint of a run."""

    directory: str
    step: int | None  # None: renamed
    bytes: int
    damage: str | None  # why it cannot be used; None: whole


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a directory is, and what was found in it."""

    kind: Kind
    directory: str
    bytes: int
    run: Mapping[str, Any] | None = None  # model, mode, method, base, data and output of a run, from its params.yaml
    checkpoints: tuple[CheckpointFacts, ...] = ()  # the one written last first
    adapter: AdapterFacts | None = None  # the best one of a run
    merged: Mapping[str, Any] | None = None  # merge.json
    damaged_files: tuple[str, ...] = ()  # of a merged model


def inspect_directory(directory: Path) -> Inspection:
    """Say what ``directory`` holds, reading files only: no base model is loaded.

    Errors: UserError for a directory that is none of Kind, and for files that are damaged beyond being described.
    """
    directory = directory.expanduser()
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}.")
    if (directory / MERGE_FILE).exists():
        merged = read_merged(directory)
        wrong = tuple(damaged_files(directory, merged))
        return _inspection("merged model", directory, merged=merged, damaged_files=wrong)
    if CHECKPOINT.fullmatch(directory.resolve().name) or (directory / MANIFEST).exists():
        return _checkpoint(directory)
    if is_run_directory(directory):
        return _run(directory)
    try:
        found = adapter_directory(directory)
    except UserError as error:
        raise UserError(
            f"{directory} is nothing that inft wrote: it holds none of {CONFIG_FILE} (an adapter), {PARAMS_FILE} "
            f"(a run) and {MERGE_FILE} (a merged model)."
        ) from error
    return _inspection("adapter", directory, adapter=adapter_facts(read_unchecked(found)))


def adapter_facts(stored: StoredAdapter, run: TrainParams | None = None) -> AdapterFacts:
    """Describe a stored adapter; ``run`` says what best.json would, where a checkpoint has none."""
    record, config = stored.record or {}, stored.config
    params: Mapping[str, Any] = record.get("params") or {}
    family = stored.family or (run.model if run else None)
    spec = _spec_of(family, stored)
    layers, not_finite = layers_of(stored, spec)
    init = (params.get("lora") or {}).get("init") or (run.lora.init if run else config.get("init_lora_weights"))
    return AdapterFacts(
        directory=str(stored.directory),
        family=family,
        base_model=run.model_name if run and stored.record is None else stored.base_model,
        mode=params.get("training_mode") or (run.training_mode if run else None),
        method=params.get("method") or (run.method if run else None),
        task=params.get("task") or (run.task if run else None),
        step=record.get("step"),
        metric=record.get("metric"),
        value=record.get("value"),
        why=record.get("why"),
        r=config.get("r", PEFT_DEFAULT),
        alpha=config.get("lora_alpha", PEFT_DEFAULT),
        dropout=config.get("lora_dropout", 0.0),
        bias=config.get("bias", "none"),
        init="default" if init in (True, None) else str(init),
        dora=bool(config.get("use_dora")),
        rslora=bool(config.get("use_rslora")),
        quantised=stored.quantised or bool(run and run.qlora.load_in_4bit),
        parameters=stored.parameters,
        dtypes=tuple(sorted({tensor.dtype for tensor in stored.tensors.values()})),
        bytes=_size(stored.directory),
        sha256=stored.sha256,
        listed_files=len((record or stored.state or {}).get("files") or {}),
        changed_files=tuple(changed_files(stored)),
        parts=tuple(_parts(layers, spec)),
        largest=tuple(sorted(layers, key=lambda layer: -(layer.norm or 0.0))[:LARGEST]),
        not_finite=tuple(not_finite),
        untrained=tuple(layer.name for layer in layers if layer.untrained),
    )


def layers_of(stored: StoredAdapter, spec: ModelSpec) -> tuple[list[Layer], list[str]]:
    """The layers that an adapter changes, in the file's order, and the tensors with values that are not finite."""
    from safetensors import safe_open

    from inft.models.modules import part_of

    found: list[Layer] = []
    with safe_open(stored.directory / WEIGHTS_FILE, framework="pt") as file:
        not_finite = [name for name in stored.tensors if not file.get_tensor(name).isfinite().all()]
        for name, first, second in _factors(stored.tensors):
            a, b = file.get_tensor(first), file.get_tensor(second)
            a, b = a.flatten(1), b.flatten(1)  # of a convolution, too
            scale = layer_scale(stored.config, name, rank=len(a))
            broken = first in not_finite or second in not_finite
            found.append(
                Layer(
                    name=name,
                    part=part_of(name, spec),
                    rank=len(a),
                    parameters=a.numel() + b.numel(),
                    norm=None if broken else product_norm(a, b, scale=scale),
                    untrained=not bool(b.any()),
                )
            )
    return found, not_finite


def product_norm(a: "Tensor", b: "Tensor", *, scale: float) -> float:
    """||scale b a||, Frobenius, of a [r, inputs] and b [outputs, r], without the product [outputs, inputs].

    b a = Q_b R_b R_a^T Q_a^T with orthonormal Q, so that only R_b R_a^T [r, r] is needed; in float64.
    """
    import torch

    right = torch.linalg.qr(a.double().T, mode="r").R
    left = torch.linalg.qr(b.double(), mode="r").R
    return abs(scale) * float(torch.linalg.matrix_norm(left @ right.T))


def layer_scale(config: Mapping[str, Any], name: str, *, rank: int) -> float:
    """The factor s of a layer's s B A: alpha / r, with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023)."""
    alpha = config.get("lora_alpha", PEFT_DEFAULT)
    if config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key

        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], name), alpha)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _factors(names: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(layer, A, B) of each layer that has both factors."""
    for name in names:
        for first, second in FACTORS:
            if name.endswith(f".{first}") and (other := name.removesuffix(first) + second) in names:
                yield name.removesuffix(f".{first}").removeprefix(PREFIX), name, other


def _parts(layers: Sequence[Layer], spec: ModelSpec) -> Iterator[Part]:
    """The parts that have adapted layers, in the family's reading order."""
    from inft.models.modules import OTHER

    for part in (*spec.parts, OTHER):
        members = [layer for layer in layers if layer.part == part]
        norms = [layer.norm for layer in members if layer.norm is not None]
        if not members:
            continue
        yield Part(
            part=part,
            layers=len(members),
            parameters=sum(layer.parameters for layer in members),
            mean_norm=sum(norms) / len(norms) if norms else None,
            largest_norm=max(norms, default=None),
        )


def _spec_of(family: str | None, stored: StoredAdapter) -> ModelSpec:
    """The family's spec; where nothing says the family, that whose parts hold the most of the adapted layers."""
    from inft.models.modules import OTHER, part_of

    if family is not None:
        return load_spec(family)
    names = [name for name, _, _ in _factors(stored.tensors)]
    specs = [load_spec(name) for name in MODELS]
    return min(specs, key=lambda spec: sum(part_of(name, spec) == OTHER for name in names))


def _checkpoint(directory: Path) -> Inspection:
    reason = damage(directory)
    whole = reason is None and (directory / CONFIG_FILE).is_file()
    return _inspection(
        "checkpoint",
        directory,
        checkpoints=(_checkpoint_facts(directory, reason),),
        adapter=adapter_facts(read_unchecked(directory), _params(directory.resolve().parent)) if whole else None,
    )


def _run(directory: Path) -> Inspection:
    params = _params(directory)
    best = directory / RUN_BEST
    if not (best / BEST_FILE).exists() and params is not None:
        best = Path(params.best_model_dir)
    return _inspection(
        "run",
        directory,
        run=None if params is None else _run_facts(params),
        checkpoints=tuple(_checkpoint_facts(path, damage(path)) for _, path in checkpoints(directory)),
        adapter=adapter_facts(read_unchecked(best)) if (best / BEST_FILE).exists() else None,
    )


def _params(run: Path) -> TrainParams | None:
    return load_params(run / PARAMS_FILE) if (run / PARAMS_FILE).is_file() else None


def _run_facts(params: TrainParams) -> dict[str, Any]:
    return {
        "task": params.task,
        "family": params.model,
        "mode": params.training_mode,
        "method": params.method,
        "base_model": params.model_name,
        "data": params.data.data,
        "languages": list(params.data.languages),
        "max_steps": params.sft.max_steps,
        "num_epochs": params.sft.num_epochs,
        "craft": params.craft.enabled,
    }


def _checkpoint_facts(directory: Path, reason: str | None) -> CheckpointFacts:
    match = CHECKPOINT.fullmatch(directory.resolve().name)
    return CheckpointFacts(
        directory=str(directory), step=int(match[1]) if match else None, bytes=_size(directory), damage=reason
    )


def _inspection(kind: Kind, directory: Path, **found: Any) -> Inspection:
    return Inspection(kind=kind, directory=str(directory), bytes=_size(directory), **found)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
