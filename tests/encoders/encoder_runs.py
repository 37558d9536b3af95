"""Tiny runs of an encoder on real files."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from encoder_data import language_of, make_tokenizer, sentences, write_jsonl
from rich.console import Console

from inft.encoders.pretrain import pretrain
from inft.encoders.run import EncoderResult
from inft.training.runlog import read_events
from params.encoder import EncoderParams
from params.encoder_resolve import resolve_encoder

TINY = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 48,
    "model.max_position_embeddings": 64,
    "model.vocab_size": 448,
    "dataset.max_seq_length": 32,
    "dataset.language_column": "language",
    "trainer.per_device_train_batch_size": 4,
    "trainer.max_steps": 6,
    "trainer.save_steps": 3,
    "trainer.eval_steps": 3,
    "trainer.logging_steps": 1,
    "trainer.mixed_precision": "no",
    "trainer.num_threads": 1,
    "scheduler.warmup_steps": 0,
    "optimizer.lr": 3e-3,
}


def write_data(directory: Path, *, train: int = 60, heldout: int = 32) -> Path:
    """A data set of two training shards and a validation shard, and a tokenizer beside it."""
    texts = sentences(train + heldout, seed=1)
    languages = [language_of(i) for i in range(len(texts))]
    half = train // 2
    for name, rows in (
        ("train-0", slice(0, half)),
        ("train-1", slice(half, train)),
        ("validation", slice(train, train + heldout)),
    ):
        write_jsonl(directory / "data" / f"{name}.jsonl", texts[rows], language=languages[rows])
    make_tokenizer(directory / "tokenizer", vocab_size=400)
    return directory


def tiny_values(directory: Path, **changed: Any) -> dict[str, Any]:
    """The values of a tiny run by dotted name; `changed` has __ for the dot."""
    own = {
        "dataset.path": str(directory / "data"),
        "tokenizer.name": str(directory / "tokenizer"),
        "trainer.output_dir": str(directory / "run"),
        "trainer.logs_dir": str(directory / "logs"),
    }
    values = {**TINY, **own, **{key.replace("__", "."): value for key, value in changed.items()}}
    return {"dataset.shuffle_buffer_size": 16, **values} if values.get("dataset.streaming") else values


def tiny_params(directory: Path, **changed: Any) -> EncoderParams:
    """The parameters of a tiny run."""
    return resolve_encoder("pretraining", base=tiny_values(directory, **changed))


def run_tiny(directory: Path, *, overwrite: bool = False, **changed: Any) -> EncoderResult:
    """Train a tiny encoder in this process."""
    return pretrain(tiny_params(directory, **changed), overwrite=overwrite, console=Console(quiet=True))


def command_line(directory: Path, **changed: Any) -> list[str]:
    """The same run as a command."""
    values = tiny_values(directory, **changed)
    dotted = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "inft", "pretrain", "neobert", *dotted]


def started(command: list[str], cwd: Path) -> "subprocess.Popen[str]":
    """A command in a process of its own."""
    return subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ}
    )


def losses(directory: Path, name: str = "neobert") -> dict[int, float]:
    """Step -> training loss, of the last run that logged the step."""
    return {event["step"]: event["loss"] for event in events(directory, "log", name)}


def events(directory: Path, kind: str, name: str = "neobert") -> list[dict[str, Any]]:
    """The events of one kind in a run's log."""
    return [e for e in read_events(directory / "logs" / f"trainer_{name}.jsonl") if e["event"] == kind]
