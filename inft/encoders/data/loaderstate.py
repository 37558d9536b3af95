"""Where a loader of training batches stands, as files: from here on it gives the same batches, to the bit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from inft.encoders.data.blocks import Cursor
from inft.encoders.data.counts import Counts
from inft.encoders.data.packing import Piece
from inft.training.storage import write_text
from params.errors import UserError

VERSION = 1  # of the files
PLACE, WAITING = "loader.json", "loader.safetensors"  # the place in the data; the documents in the pool


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """The place in the data, and the documents that wait in the pool."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # what the sequence of batches depends on
    cursor: Cursor = field(default_factory=Cursor)  # of the block that is being read
    taken: int = 0  # documents of the block that were taken
    counted: bool = False  # the block is in the counts
    counts: Counts = field(default_factory=Counts)
    bad_rows: tuple[str, ...] = ()  # the first that could not be read
    batch: int = 0  # batches made
    pool: tuple[Piece, ...] = ()

    def save(self, directory: Path) -> None:
        """Write ``loader.json`` and ``loader.safetensors`` into a directory that exists: one for each process."""
        numbers = {
            "lengths": [len(piece) for piece in self.pool],
            "keys": [piece.key for piece in self.pool],
            "pieces": [piece.piece for piece in self.pool],
            "arrived": [piece.arrived for piece in self.pool],
        }
        arrays = {name: np.array(values, np.int64) for name, values in numbers.items()}
        arrays["input_ids"] = _joined([piece.input_ids_T for piece in self.pool])
        arrays["labels"] = _joined([piece.labels_T for piece in self.pool])
        save_file(arrays, directory / WAITING)
        words = {
            "version": VERSION,
            "settings": dict(self.settings),
            "cursor": self.cursor.asdict(),
            "taken": self.taken,
            "counted": self.counted,
            "counts": self.counts.asdict(),
            "bad_rows": list(self.bad_rows),
            "batch": self.batch,
            "languages": [piece.language for piece in self.pool],
        }
        write_text(directory / PLACE, json.dumps(words, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "LoaderState":
        """Read what ``save`` wrote; UserError when it is not there or not whole."""
        file = directory / PLACE
        try:
            words = json.loads(file.read_text(encoding="utf-8"))
            if words["version"] != VERSION:
                raise UserError(f"{file} is of version {words['version']}, this program reads {VERSION}.")
            arrays = load_file(directory / WAITING)
            return cls(
                settings=words["settings"],
                cursor=Cursor(**words["cursor"]),
                taken=words["taken"],
                counted=words["counted"],
                counts=Counts(**words["counts"]),
                bad_rows=tuple(words.get("bad_rows", ())),
                batch=words["batch"],
                pool=tuple(_pieces(arrays, words["languages"])),
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{file}: the place in the data cannot be read ({type(error).__name__}: {error}). Resume from an "
                "earlier checkpoint."
            ) from error

    def require(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError unless these settings make the sequence of batches that the state is of."""
        changed = [
            f"{name} {self.settings.get(name)} -> {value}"
            for name, value in settings.items()
            if self.settings.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the checkpoint was made with other settings of the data: {', '.join(changed)}. The batches would "
                "not go on where they stopped: put the settings back, or start a new run from its weights (model.name)."
            )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)


def _pieces(arrays: Mapping[str, np.ndarray], languages: list[str | None]) -> list[Piece]:
    cuts = np.cumsum(arrays["lengths"])[:-1]
    numbers = zip(*(arrays[name].tolist() for name in ("keys", "pieces", "arrived")), languages, strict=True)
    tokens = zip(np.split(arrays["input_ids"], cuts), np.split(arrays["labels"], cuts), strict=True)
    return [
        Piece(input_ids_T=ids, labels_T=labels, key=key, piece=piece, language=language, arrived=arrived)
        for (key, piece, arrived, language), (ids, labels) in zip(numbers, tokens, strict=False)
    ]
