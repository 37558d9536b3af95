"""What stands before the model of a run: where it starts, the process it runs in, the rows it uses."""

import importlib.util
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.utils import logging

from inft.data.batches import Loaded, load_samples
from inft.models.spec import ModelSpec
from inft.sample import Sample
from inft.training.hardware import hardware, hardware_line
from inft.training.resume import (
    PARAMS_FILE,
    find_checkpoint,
    is_run_directory,
    refuse_changed_parameters,
    refuse_foreign_output,
)
from inft.training.storage import remove_leftovers
from params import TrainParams, UserError
from params.resolve import load_params


def starting_point(
    params: TrainParams, *, resume: str | None, overwrite: bool, dry_run: bool, console: Console
) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0; UserError before anything is loaded or deleted."""
    output_dir = Path(params.output_dir)
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them.")
    if not dry_run:
        refuse_foreign_output(params, resume=resume is not None, overwrite=overwrite)
        for directory in (output_dir, Path(params.best_model_dir).parent):
            _make_writable(directory)
            remove_leftovers(directory)
    if resume is None:
        return None
    if resume != "latest" and Path(resume).resolve().parent != output_dir.resolve():
        raise UserError(f"--resume {resume}: the checkpoint must lie in {output_dir}, or --output-dir be its parent.")
    if (output_dir / PARAMS_FILE).exists():
        for note in refuse_changed_parameters(load_params(output_dir / PARAMS_FILE), params):
            console.print(f"changed since the run began: {note}", highlight=False, markup=False)
    elif is_run_directory(output_dir):
        raise UserError(
            f"--resume: {output_dir} has checkpoints but no {PARAMS_FILE} to compare the parameters with. "
            "Start another run with another --output-dir."
        )
    checkpoint, warnings = find_checkpoint(output_dir, resume)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    where = f"from {checkpoint}" if checkpoint else "from the beginning: no checkpoint had been finished"
    console.print(f"resuming {where}", highlight=False, markup=False)
    return checkpoint


def _make_writable(directory: Path) -> None:
    """Make a directory; UserError when nothing can be written there, before hours of training find out."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"{directory} cannot be written to: {error.strerror}. Choose another --output-dir.") from error


def prepare_process(params: TrainParams, console: Console) -> None:
    """Threads and seeds of this process; the hardware on the console."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "inft train runs in one process, which spreads the model over the visible GPUs (basic.device_map). "
            "Start it without torchrun or accelerate launch."
        )
    missing = [name for name in params.sft.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"sft.report_to: {', '.join(missing)} is not installed here: pip install {' '.join(missing)}")
    threads = params.basic.num_threads or (1 if not params.model_name else None)
    if threads is not None:
        torch.set_num_threads(threads)
    set_seed(params.basic.seed)
    # Deprecations between libraries are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate|torch)\..*")
    if not params.model_name or not console.is_terminal:
        logging.disable_progress_bar()
    console.print(hardware_line(hardware()), highlight=False, soft_wrap=True)


def say_what_runs(params: TrainParams, console: Console) -> None:
    """Without CUDA, and outside a demo: one line on what runs instead."""
    if torch.cuda.is_available() or params.demo:
        return
    weights = f"{params.qlora.bnb_4bit_quant_type.upper()} weights through bitsandbytes, " * params.qlora.load_in_4bit
    rest = f"the rest in {params.basic.dtype}" if weights else f"in {params.basic.dtype}"
    console.print(
        f"no CUDA device: training on the CPU, {weights}{rest}. "
        "A released vision model needs a GPU to finish; --demo does not.",
        style="yellow",
        highlight=False,
        soft_wrap=True,
    )


def read_rows(params: TrainParams, spec: ModelSpec, quarantine: Path | None, console: Console) -> Loaded:
    """The rows to train on and those held out; bad ones are counted on the console and listed in ``quarantine``."""
    with console.status("reading rows") as status:
        loaded = load_samples(
            params.data,
            quarantine_file=quarantine,
            with_images=spec.takes_images,
            on_progress=lambda done: status.update(f"reading rows: {done:,} images checked"),
        )
    if loaded.quarantined:
        where = f", listed with their reasons in {loaded.quarantine_file}" if loaded.quarantine_file else ""
        console.print(f"{loaded.quarantined:,} bad rows left out{where}", style="yellow", highlight=False, markup=False)
    return loaded


def without_long_rows(loaded: Loaded, params: TrainParams, spec: ModelSpec, processor: Any) -> tuple[Loaded, int]:
    """With over_length="drop": the rows that fit into max_length, and how many did not.

    They are dropped here, once, and not batch by batch, where a batch could lose all its rows.
    """
    if params.sft.over_length != "drop":
        return loaded, 0
    measure = spec.collator(processor, max_length=2**31, over_length="error")

    def fits(sample: Sample) -> bool:
        return int(measure([sample])["attention_mask"].sum()) <= params.basic.max_length

    train, heldout = ([sample for sample in samples if fits(sample)] for samples in (loaded.train, loaded.heldout))
    dropped = len(loaded.train) + len(loaded.heldout) - len(train) - len(heldout)
    if not train:
        raise UserError(
            f"no row is left: every one has more than basic.max_length={params.basic.max_length} tokens and "
            'sft.over_length is "drop". Raise basic.max_length, or for Aya lower basic.max_image_tiles.'
        )
    kept, kept_heldout = (Counter(sample.language for sample in samples) for samples in (train, heldout))
    counts = {language: (kept[language], kept_heldout[language]) for language in loaded.rows_per_language}
    return replace(loaded, train=train, heldout=heldout, rows_per_language=counts), dropped


def guard_batches(samples: Sequence[Sample], size: int, collator: Any) -> list[tuple[list[Sample], Any]]:
    """The first rows, collated, and the first with or without an image if those have none such."""
    batches = [list(samples[:size])]
    for has_image in (True, False):
        if not any((sample.image is not None) == has_image for sample in batches[0]):
            others = [sample for sample in samples if (sample.image is not None) == has_image][:size]
            batches += [others] if others else []
    return [(batch, collator(batch)) for batch in batches]
