"""Which checkpoint a run goes on from, which of them are whole, and whose an output directory is."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inft.training.storage import BEST_FILE, PREVIOUS, STAGING, file_sha256, remove
from params import TrainParams, UserError

MANIFEST = "inft_checkpoint.json"
STATE_FILE = "inft_state.json"  # in a checkpoint: what transformers' own state lacks
PARAMS_FILE = "params.yaml"
QUARANTINE_FILE = "quarantine.jsonl"
HASHED_BELOW = 64 * 2**20  # bytes; larger files are checked by size alone
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
OURS = re.compile(
    rf"{CHECKPOINT.pattern}|params\.yaml|\.?quarantine\.jsonl.*|demo\.json|runs"  # runs: TensorBoard's
    rf"|{re.escape(STAGING)}.*|{re.escape(PREVIOUS)}.*"
)

# A resumed run may change these: they touch neither the weights nor what they are compared by.
HARMLESS = (
    "task",
    "basic.logs_dir",
    "basic.metric_dir",
    "basic.num_threads",
    "basic.device_map",
    "basic.gen_*",
    "data.cjk_tokens",
    "data.num_workers",
    "data.max_bad_fraction",
    "sft.num_epochs",
    "sft.max_steps",
    "sft.logging_steps",
    "sft.save_steps",
    "sft.eval_steps",
    "sft.eval_captions",
    "sft.per_device_eval_batch_size",
    "sft.gradient_checkpointing",
    "sft.save_total_limit",
    "sft.early_stopping_*",
    "sft.report_to",
    "sft.*_dir",
    "output_dir",
    "best_model_dir",
    "basic.output_dir",
)
# But these are what captions are compared by, where they choose the best adapter.
OF_CAPTIONS = ("sft.eval_captions", "basic.gen_max_new_tokens", "data.cjk_tokens")


def write_manifest(checkpoint: Path, *, step: int) -> None:
    """List the files of a checkpoint with size and, for the smaller ones, checksum; written last."""
    files = {
        path.relative_to(checkpoint).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_sha256(path) if path.stat().st_size < HASHED_BELOW else None,
        }
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"step": step, "time": time.time(), "files": files}, indent=1)
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as it was written."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing: the checkpoint was not finished"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, written in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["size"]:
            return f"{name} has {file.stat().st_size:,} bytes, {written['size']:,} were written"
        if written["sha256"] is not None and file_sha256(file) != written["sha256"]:
            return f"{name} has changed since it was written"
    return None


def checkpoints(output_dir: Path, pattern: re.Pattern[str] = CHECKPOINT) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint in ``output_dir``, whole or not, the one written last first.

    After going back to an earlier checkpoint by its path, the last one written need not have the highest step.
    """
    if not output_dir.is_dir():
        return []
    found = [(pattern.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    numbered = [(int(match[1]), path) for match, path in found if match]
    return sorted(numbered, key=lambda entry: (_written(entry[1]), entry[0]), reverse=True)


def _written(checkpoint: Path) -> float:
    """Seconds since 1970 at which a checkpoint was finished; of an unfinished one, when it was last touched."""
    try:
        return float(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["time"])
    except (OSError, ValueError, KeyError, TypeError):  # damage() says what is wrong with it
        return checkpoint.stat().st_mtime


def find_checkpoint(
    output_dir: Path, resume: str, pattern: re.Pattern[str] = CHECKPOINT
) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``resume`` ("latest" or a path) means, and warnings about damaged ones passed over.

    None: no checkpoint was finished before the run was killed, so it starts from the beginning. A path that is not a
    whole checkpoint is a UserError.
    """
    if resume != "latest":
        path = Path(resume)
        if not path.is_dir():
            raise UserError(f"--resume {resume}: there is no such directory. {_choices(output_dir, pattern)}")
        reason = damage(path)
        if reason:
            raise UserError(f"--resume {resume}: {reason}. {_choices(output_dir, pattern)}")
        return path, []
    warnings: list[str] = []
    for _, path in checkpoints(output_dir, pattern):
        reason = damage(path)
        if reason is None:
            return path, warnings
        warnings.append(f"{path} is damaged and passed over: {reason}.")
    return None, warnings


def _choices(output_dir: Path, pattern: re.Pattern[str]) -> str:
    whole = [str(path) for _, path in checkpoints(output_dir, pattern) if damage(path) is None]
    return f"Whole checkpoints: {', '.join(whole)}." if whole else f"{output_dir} holds no whole checkpoint."


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What RunTrainer saved in a checkpoint beside the state of transformers."""
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return state


def refuse_other_rows(checkpoint: Path, fingerprint: str) -> None:
    """UserError when the rows are not those that the run had seen up to the checkpoint and was going to see."""
    if read_state(checkpoint)["rows"] != fingerprint:
        raise UserError(
            f"--resume: the data has changed since {checkpoint} was saved, so rows would be skipped or seen twice. "
            "Bring back the data as it was, or start another run with another --output-dir."
        )


def refuse_other_processes(checkpoint: Path, processes: int) -> None:
    """UserError when the run was in another number of processes, whose random states and order of rows it holds."""
    before = read_state(checkpoint)["processes"]
    if before != processes:
        how = f"torchrun --nproc-per-node {before} -m inft train …" if before > 1 else "inft train …, without torchrun"
        raise UserError(
            f"--resume: {checkpoint} was saved by {before} process{'es' if before > 1 else ''} and this run has "
            f"{processes}: the rows would be dealt out in another order. Go on with {how}, or start another run with "
            "another --output-dir."
        )


def refuse_missing_best(params: TrainParams, step: int | None) -> None:
    """UserError when the adapter that an evaluation chose, of ``step``, is no longer where it was stored."""
    best_dir = Path(params.best_model_dir)
    if step is not None and params.sft.load_best_model_at_end and not (best_dir / BEST_FILE).exists():
        raise UserError(
            f"the run's best adapter so far, of step {step}, is no longer in {best_dir}. Put it back there, or start "
            "again with --overwrite."
        )


def is_run_directory(output_dir: Path) -> bool:
    """Whether a run has written to ``output_dir``."""
    return (output_dir / PARAMS_FILE).exists() or bool(checkpoints(output_dir))


def refuse_foreign_output(params: TrainParams, *, resume: bool, overwrite: bool) -> None:
    """UserError when the run would write over another run, or over files that no run wrote; deletes nothing."""
    output_dir, best_dir = Path(params.output_dir), Path(params.best_model_dir)
    for path in (output_dir, best_dir):
        try:
            taken = path.exists() and not path.is_dir()
        except OSError as error:  # a name that is too long
            raise UserError(f"{path} cannot be used: {error.strerror}. Choose another --output-dir.") from error
        if taken:
            raise UserError(f"{path} is a file; a directory is needed there. Choose another --output-dir.")
    if best_dir.exists() and any(best_dir.iterdir()) and not (best_dir / BEST_FILE).exists():
        raise UserError(
            f"{best_dir} would be replaced by the best adapter, but what it holds is not one (no {BEST_FILE}). "
            "Choose another directory."
        )
    if resume:
        return
    if overwrite:
        foreign = _foreign_files(output_dir, best_dir) if is_run_directory(output_dir) else []
        if foreign:
            raise UserError(
                f"--overwrite would delete the run in {output_dir}, which also holds files that no run wrote: "
                f"{', '.join(foreign[:5])}{' …' if len(foreign) > 5 else ''}. Move them, or choose another "
                "--output-dir."
            )
    elif is_run_directory(output_dir) or best_dir.exists():
        where = output_dir if is_run_directory(output_dir) else best_dir
        raise UserError(
            f"{where} holds another run. Go on with it by --resume, replace it by --overwrite, or choose another "
            "--output-dir."
        )


def delete_run(params: TrainParams) -> None:
    """Delete what an earlier run wrote to the output directory and the best adapter's; nothing else.

    quarantine.jsonl stays: the new run replaces it, or removes it, next.
    """
    output_dir, best_dir = Path(params.output_dir), Path(params.best_model_dir)
    if (best_dir / BEST_FILE).exists():
        shutil.rmtree(best_dir.resolve())  # a link stays, and its target is filled again
    if not output_dir.is_dir():
        return
    for path in output_dir.iterdir():
        if OURS.fullmatch(path.name) and path.name != QUARANTINE_FILE:
            remove(path)


def _foreign_files(output_dir: Path, best_dir: Path) -> list[str]:
    names = [path for path in output_dir.iterdir() if path.resolve() != best_dir.resolve()]
    return sorted(path.name for path in names if not OURS.fullmatch(path.name))


def changed_parameters(before: TrainParams, now: TrainParams) -> Iterator[tuple[str, Any, Any, bool]]:
    """(dotted name, old, new, harmless) of every parameter that differs between a run and its continuation."""
    old, new = dict(flat_fields(asdict(before))), dict(flat_fields(asdict(now)))
    chosen_by_captions = before.sft.best_metric not in ("loss", "reward")
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            harmless = any(_matches(name, pattern) for pattern in HARMLESS)
            yield name, old.get(name), new.get(name), harmless and not (chosen_by_captions and name in OF_CAPTIONS)


def refuse_changed_parameters(before: TrainParams, now: TrainParams) -> list[str]:
    """Notes on harmless changes; a UserError that lists the others."""
    notes: list[str] = []
    refused: list[str] = []
    for name, old, new, harmless in changed_parameters(before, now):
        (notes if harmless else refused).append(f"{name}: {old!r} -> {new!r}")
    if refused:
        raise UserError(
            "--resume: these parameters differ from those of the run in "
            f"{now.output_dir}, so its losses, or the choice of its best adapter, could not be continued:\n  "
            + "\n  ".join(refused)
            + "\nGive the same values again, or start another run with another --output-dir."
        )
    return notes


def flat_fields(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of parameters as plain data, tuples as lists; sections are one level deep."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and prefix == "":
            yield from flat_fields(value, f"{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None
