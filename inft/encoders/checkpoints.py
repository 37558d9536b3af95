"""An encoder run's two kinds of checkpoint: `checkpoints/<step>` to go on from, `model_checkpoints/<step>` to use.

A checkpoint to go on from holds accelerate's state (weights, optimizers), the random states of each process, where each
process stands in the data, and what the run was told. Both appear whole or not at all.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inft.training.processes import gather, is_main, process_count, rank
from inft.training.resume import checkpoints, flat_fields, write_manifest
from inft.training.storage import remove, staged
from params.encoder import EncoderParams
from params.encoder_resolve import dump_encoder_yaml, load_encoder_params
from params.encoder_schedule import make_schedule
from params.errors import UserError

STEP = re.compile(r"(\d+)")  # the name of a checkpoint's directory
STATES = "checkpoints"  # below output_dir
MODELS = "model_checkpoints"  # below output_dir
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"  # what a checkpoint to go on from says of its run
TOKENIZER_FILE = "tokenizer_info.json"
REMEDY = (
    "Free space there (a new checkpoint is whole before an old one goes), then resume: "
    "--trainer.resume_from_checkpoint latest."
)

# A resumed run may change these: they touch neither the weights nor the order of the data.
HARMLESS = frozenset(
    {
        "trainer.per_device_eval_batch_size",
        "trainer.save_steps",
        "trainer.eval_steps",
        "trainer.logging_steps",
        "trainer.output_dir",
        "trainer.logs_dir",
        "trainer.run_name",
        "trainer.eval_max_batches",
        "trainer.max_bad_steps",
        "trainer.resume_from_checkpoint",
        "trainer.save_total_limit",
        "trainer.num_threads",
        "trainer.gradient_checkpointing",
        "dataset.max_bad_fraction",
        "dataset.num_workers",
        "dataset.pin_memory",
        "dataset.persistent_workers",
        "dataset.prefetch_factor",
    }
)


class Position(Protocol):
    """Where a run stands in its data; written to and read from a directory of its own."""

    def save(self, directory: Path) -> None:
        """Write it into an existing directory."""


def save_state(
    accelerator: Accelerator,
    params: EncoderParams,
    position: Position,
    *,
    step: int,
    data: Mapping[str, Any],
    window: Mapping[str, Any],
) -> Path:
    """Write `checkpoints/<step>` whole, in all processes together; returns its directory.

    `data` describes the data for `refuse_changes`; `window` is what the loop has added up since its last log, of this
    process.
    """
    final = Path(params.trainer.output_dir) / STATES / str(step)
    with staged(final, what=f"checkpoint {step}", remedy=REMEDY) if is_main() else nullcontext() as staging:
        directory = Path(gather(str(staging))[0])
        accelerator.save_state(str(directory), safe_serialization=True)
        save_file(_random_states(), directory / f"random_{rank()}.safetensors")
        place = directory / f"data_{rank()}"
        place.mkdir()
        position.save(place)
        windows = gather(dict(window))
        if staging is not None:
            (directory / CONFIG_FILE).write_text(dump_encoder_yaml(params), encoding="utf-8")
            run = {"step": step, "processes": process_count(), "data": data, "windows": windows}
            (directory / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
            write_manifest(directory, step=step)
        gather(None)
    return final


def load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """Put weights, optimizers and random states back as they were; the data's place is the caller's."""
    accelerator.load_state(str(checkpoint))
    states = load_file(checkpoint / f"random_{rank()}.safetensors")
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def data_place(checkpoint: Path) -> Path:
    """Where this process's place in the data lies in a checkpoint."""
    return checkpoint / f"data_{rank()}"


def read_run(checkpoint: Path) -> dict[str, Any]:
    """RUN_FILE of a checkpoint: step, processes, data, windows."""
    run: dict[str, Any] = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    return run


def store_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    params: EncoderParams,
    directory: Path,
    add: Callable[[Path], None],
) -> None:
    """Write what inference needs: model.safetensors, config.json, config.yaml, tokenizer_info.json, tokenizer/.

    `add` puts beside it what the task needs.
    """
    with staged(directory, what=f"the model of step {directory.name}", remedy=REMEDY) as staging:
        model.save_pretrained(staging)
        (staging / CONFIG_FILE).write_text(dump_encoder_yaml(params), encoding="utf-8")
        tokenizer.save_pretrained(staging / "tokenizer")
        info = {
            "name": params.tokenizer.name or tokenizer.name_or_path,
            "class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "max_seq_length": params.dataset.max_seq_length,
            "written": time.time(),
        }
        (staging / TOKENIZER_FILE).write_text(json.dumps(info, ensure_ascii=False, indent=1), encoding="utf-8")
        add(staging)


def remove_old(params: EncoderParams) -> None:
    """Keep the newest save_total_limit checkpoints of either kind."""
    limit = params.trainer.save_total_limit
    for kind in (STATES, MODELS) if limit is not None and is_main() else ():
        directory = Path(params.trainer.output_dir) / kind
        for old in _newest_first(directory)[limit:]:
            remove(old)


def newest_model(run_dir: Path) -> Path | None:
    """The directory that was written last in a run's model_checkpoints; None where there is none."""
    return next(iter(_newest_first(run_dir / MODELS)), None)


def refuse_changes(checkpoint: Path, params: EncoderParams, data: Mapping[str, Any]) -> list[str]:
    """Notes on harmless changes since the checkpoint was saved; UserError that lists the others."""
    run = read_run(checkpoint)
    before = load_encoder_params(checkpoint / CONFIG_FILE)
    found = list(_changes(before, params, step=run["step"]))
    refused = [f"{name}: {old!r} -> {new!r}{_why(name)}" for name, old, new, harmless in found if not harmless]
    refused += [f"data: {name}: {old!r} -> {new!r}" for name, old, new in _differences(run["data"], data)]
    if run["processes"] != process_count():
        refused.append(f"processes: {run['processes']} -> {process_count()}")
    if refused:
        raise UserError(
            f"{checkpoint} cannot be gone on with, because what the run depends on has changed:\n  "
            + "\n  ".join(refused)
            + "\nGive the same again, or start another run with another trainer.output_dir."
        )
    told = [change for change in found if change[0] != "trainer.resume_from_checkpoint"]
    return [f"{name}: {old!r} -> {new!r}" for name, old, new, harmless in told if harmless]


def _changes(before: EncoderParams, now: EncoderParams, *, step: int) -> Iterator[tuple[str, Any, Any, bool]]:
    old, new = dict(flat_fields(asdict(before))), dict(flat_fields(asdict(now)))
    for name in old:
        if old[name] != new[name]:
            scheduled = name == "trainer.max_steps" or name.startswith("scheduler.")
            yield name, old[name], new[name], name in HARMLESS or (scheduled and _same_past(before, now, step))


def _why(name: str) -> str:
    """What a user who wants to train longer should know."""
    if name != "trainer.max_steps":
        return ""
    return " (the learning rates so far would have been others: give scheduler.decay_steps from the start)"


def _same_past(before: EncoderParams, now: EncoderParams, step: int) -> bool:
    """Whether the learning rates up to the step are those that the run has had."""
    old, new = (make_schedule(params.scheduler, params.trainer.max_steps) for params in (before, now))
    return now.trainer.max_steps >= step and all(old(i) == new(i) for i in range(1, step + 1))


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of what differs between two descriptions of data."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif json.loads(json.dumps(old)) != json.loads(json.dumps(new)):
        yield name, old, new


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _newest_first(directory: Path) -> list[Path]:
    """The checkpoints of a directory by the time they were written.

    A run that went back to an earlier checkpoint writes lower steps after higher ones.
    """
    if directory.name == STATES:
        return [path for _, path in checkpoints(directory, STEP)]
    found = [path for path in directory.iterdir() if STEP.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: (_written(path), int(path.name)), reverse=True)


def _written(model_dir: Path) -> float:
    """Seconds since 1970."""
    try:
        return float(json.loads((model_dir / TOKENIZER_FILE).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return model_dir.stat().st_mtime
