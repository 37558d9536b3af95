"""What CRAFT adds to a checkpoint: the head with its temperature, and everything else that training remembers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD_FILE = "craft_head.safetensors"
STATE_FILE = "craft_state.safetensors"
VERSION = 1
REFERENCE, QUEUE = "reference", "queue."  # names in the state file


def save_checkpoint(directory: Path, trainer: Any, sums: Mapping[str, tuple[float, float]]) -> None:
    """Write what ``trainer`` needs to go on; ``sums`` are its journal's, of all ranks."""
    save_file(_plain(trainer.craft_loss.state_dict()), directory / HEAD_FILE)
    tensors: dict[str, Tensor] = {}
    if trainer._craft_journal.reference is not None:
        tensors[REFERENCE] = trainer._craft_journal.reference
    queue = trainer._craft_objective.queue
    if queue is not None:
        tensors |= {f"{QUEUE}{name}": value for name, value in queue.state_dict().items()}
    figures = {
        "version": VERSION,
        "strategy": trainer.craft_bundle.strategy,
        "learnable_temperature": trainer.craft_loss.learnable_temperature,
        "sums": sums,
        "pairs_taken": trainer.craft_pairs_taken,
        "balance": trainer._craft_balance.state(),
    }
    metadata = {"craft": json.dumps(figures, allow_nan=False)}
    save_file(_plain(tensors), directory / STATE_FILE, metadata=metadata)


def load_checkpoint(directory: Path, trainer: Any) -> None:
    """Go on from what save_checkpoint wrote; ValueError when it is of another head, queue or balancer."""
    figures, tensors = _read_state(directory / STATE_FILE)
    own = {"strategy": trainer.craft_bundle.strategy, "learnable_temperature": trainer.craft_loss.learnable_temperature}
    for name, value in own.items():
        if figures[name] != value:
            raise ValueError(
                f"{directory} was saved with craft_{name}={figures[name]!r}, and this run has {value!r}: resume with "
                "the one that the run began with."
            )
    trainer._craft_balance.restore(figures["balance"])
    try:
        trainer.craft_loss.load_state_dict(load_file(directory / HEAD_FILE))
    except RuntimeError as error:
        raise ValueError(
            f"{directory / HEAD_FILE} holds another projection head than this run's: {error}. Resume with the "
            "craft_projection_dim that the run began with."
        ) from error
    trainer.craft_pairs_taken = figures.get("pairs_taken", 0)
    trainer._craft_journal.restore(figures["sums"], tensors.get(REFERENCE))
    held = {name.removeprefix(QUEUE): value for name, value in tensors.items() if name.startswith(QUEUE)}
    queue = trainer._craft_objective.queue
    if (queue is not None) != bool(held):
        had, has = ("a", "none") if held else ("no", "one")
        raise ValueError(
            f"{directory} has {had} queue of negatives and this run {has}: resume with the craft_negative_strategy "
            "that the run began with."
        )
    if queue is not None:
        queue.load_state_dict(held)


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        figures: dict[str, Any] = json.loads(file.metadata()["craft"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if figures["version"] != VERSION:
        raise ValueError(f"{path} was written by another version of this library and cannot be resumed from.")
    return figures, tensors


def refuse_other_kind(directory: Path, *, enabled: bool) -> None:
    """ValueError when a checkpoint was saved with CRAFT and the run is without, or the other way round."""
    missing = [name for name in (HEAD_FILE, STATE_FILE) if not (directory / name).is_file()]
    if len(missing) == 1:
        raise ValueError(f"{directory} lacks {missing[0]}: it is not whole. Resume from another checkpoint.")
    if enabled == bool(missing):
        was, now = ("without", "with") if enabled else ("with", "without")
        raise ValueError(
            f"{directory} was saved {was} CRAFT, but this run is {now} it. Resume with the craft_alpha that the run "
            "began with, or start anew from the model's weights."
        )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
