"""A merged model's directory: what merge.json says of it, and what may be written over; imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from params.errors import UserError

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
MERGE_FILE = "merge.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class QuantisedGap:
    """How far a merged model is from what was trained: the adapter on 4-bit weights."""

    kl: float  # KL(trained || merged), mean over the tokens of the probe rows' answers, nats
    equal_top: float  # share of these tokens, 0 to 1, whose most likely one is the same


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What merging and rounding changed, measured on the model that was read back."""

    logits: float  # on the probe rows, relative to the spread of the adapter's logits
    logits_tolerance: float
    effect: float  # the same between base and adapter: what there was to merge
    layer: float  # of the adapted layer that differs the most, relative to its weights
    layer_tolerance: float


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What merge.json says of the model beside it."""

    family: str
    base_model: str  # hub id or path; "" for the embedded model
    base_config_sha256: str
    adapter: str  # directory, as it was given
    adapter_sha256: str  # of its weights
    step: int | None
    dtype: Dtype
    layers: Mapping[str, int]  # merged linear layers by part
    parameters: int  # of the whole model
    difference: Difference
    quantised: QuantisedGap | None  # None: the adapter was trained on unquantised weights
    mended: bool  # inft.models.loading.load_model adds to the model what plain transformers leaves out
    files: Mapping[str, int]  # name -> bytes; all but merge.json


def to_json(merged: Merged) -> str:
    """The text of merge.json."""
    fields = {"schema": SCHEMA_VERSION, **asdict(merged)}
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_merged(directory: Path) -> dict[str, Any]:
    """What merge.json in ``directory`` says; UserError when it cannot be read."""
    path = directory / MERGE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}. Merge again into another directory.") from error
    return dict(found)


def damaged_files(directory: Path, merged: Mapping[str, Any]) -> list[str]:
    """Names of the files that merge.json lists and that are missing or of another size."""

    def size(name: str) -> int | None:
        path = directory / name
        return path.stat().st_size if path.is_file() else None

    return [name for name, written in merged["files"].items() if size(name) != written]


def refuse_taken(out: Path, *, overwrite: bool) -> None:
    """UserError when ``out`` cannot be written without losing something that no merge wrote, or without being asked."""
    another = "Choose another -o."
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; a directory is to be written there. {another}")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not held:
        return
    if MERGE_FILE not in held:
        raise UserError(f"{out} holds files that no merge wrote, and they are kept. {another}")
    foreign = sorted(held - {MERGE_FILE} - set(read_merged(out)["files"]))
    if foreign:
        raise UserError(f"{out} holds, beside a merged model, {foreign[0]}: move that away, or choose another -o.")
    if not overwrite:
        raise UserError(f"{out} holds a merged model already: replace it with --overwrite, or choose another -o.")
