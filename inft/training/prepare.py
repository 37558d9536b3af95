"""What stands before the model of a run: where it starts, the process it runs in, the rows it uses."""

import difflib
import importlib.util
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from inft.data.batches import Loaded, load_samples
from inft.data.pairs import LoadedPairs
from inft.data.rows import BadRow, RowKind
from inft.models import load_spec
from inft.models.collate import where
from inft.models.loading import load_processor
from inft.models.spec import ModelSpec
from inft.sample import Prompt, Sample
from inft.training.captions import check_captions
from inft.training.contrast import Contrast, read_contrast
from inft.training.hardware import hardware, hardware_line
from inft.training.plan import longest
from inft.training.processes import agreed, gather, is_main, process_count, rank
from inft.training.quiet import quiet_libraries
from inft.training.resume import (
    PARAMS_FILE,
    QUARANTINE_FILE,
    find_checkpoint,
    is_run_directory,
    read_state,
    refuse_changed_parameters,
    refuse_foreign_output,
    refuse_missing_best,
    refuse_other_processes,
    refuse_other_rows,
)
from inft.training.storage import locked, remove_leftovers
from params import TrainParams, UserError
from params.methods import RL_METHODS
from params.resolve import load_params

STAND_IN = "."  # the answer of a row whose own the model does not learn


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads before it loads a model."""

    spec: ModelSpec
    loaded: Loaded
    too_long: int  # rows dropped for their length
    processor: Any
    collator: Any
    contrast: Contrast | None  # the pairs of CRAFT, if it has any

    @property
    def fingerprint(self) -> str:
        """Of everything that is trained on, in its order."""
        own = self.loaded.fingerprint
        return own if self.contrast is None else f"{own}+{self.contrast.loaded.fingerprint}"

    @property
    def bad(self) -> list[BadRow]:
        """The rows and pairs that were left out."""
        return [*self.loaded.bad, *(self.contrast.loaded.bad if self.contrast is not None else ())]


def starting_point(
    params: TrainParams, *, resume: str | None, overwrite: bool, dry_run: bool, console: Console, held: ExitStack
) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0; UserError before anything is loaded or deleted.

    The output directory is locked against other processes until ``held`` closes; a dry run locks nothing.
    """
    output_dir = Path(params.output_dir)
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them.")
    if dry_run:
        _tell_foreign_output(params, resume=resume is not None, overwrite=overwrite, console=console)
    else:
        refuse_foreign_output(params, resume=resume is not None, overwrite=overwrite)
        best_dir = Path(params.best_model_dir).resolve()  # it may be a link to a larger disk
        for directory in (output_dir, best_dir.parent):
            _make_writable(directory)
        held.enter_context(locked(output_dir))
        remove_leftovers(output_dir)
        remove_leftovers(best_dir.parent, best_dir.name)
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
    if checkpoint:
        refuse_other_processes(checkpoint, process_count())
    if checkpoint and not dry_run:
        refuse_missing_best(params, read_state(checkpoint)["best"]["step"])
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    if checkpoint and (inside := inside_a_batch(checkpoint, params)):
        console.print(inside, style="yellow", highlight=False, markup=False, soft_wrap=True)
    start = f"from {checkpoint}" if checkpoint else "from the beginning: no checkpoint had been finished"
    console.print(f"resuming {start}", highlight=False, markup=False)
    return checkpoint


def inside_a_batch(checkpoint: Path, params: TrainParams) -> str:
    """What to say of a checkpoint between two passes over the same answers, which are not kept; "" of any other."""
    step, passes = int(checkpoint.name.rpartition("-")[2]), params.rl.num_iterations
    if params.method not in RL_METHODS or step % passes == 0:
        return ""
    return (
        f"step {step:,} lies inside the {passes} passes over one batch of answers: the batch is sampled anew, so the "
        "run goes on otherwise than it would have without a stop."
    )


def _tell_foreign_output(params: TrainParams, *, resume: bool, overwrite: bool, console: Console) -> None:
    """Say in a dry run what would stop the real one."""
    try:
        refuse_foreign_output(params, resume=resume, overwrite=overwrite)
    except UserError as error:
        text = f"without --dry-run this would stop here: {error}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


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
    if process_count() > 1 and params.basic.device_map not in ("auto", None):
        raise UserError(
            f"basic.device_map={params.basic.device_map} spreads one model over GPUs; with several processes each "
            "holds a model on its own: leave it at auto, or start without torchrun."
        )
    missing = [name for name in params.sft.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"sft.report_to: {', '.join(missing)} is not installed here: pip install {' '.join(missing)}")
    optimizers = [name.value for name in OptimizerNames]
    if params.sft.optim not in optimizers:
        near = difflib.get_close_matches(params.sft.optim, optimizers, n=3) or ["adamw_torch"]
        raise UserError(f"sft.optim: transformers has no optimizer {params.sft.optim!r}. Nearest: {', '.join(near)}.")
    threads = params.basic.num_threads or (1 if not params.model_name else _threads_of_a_share())
    if threads is not None:
        torch.set_num_threads(threads)
    set_seed(params.basic.seed)
    if not is_main():
        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    quiet_libraries(progress_bars=bool(params.model_name) and console.is_terminal and is_main())
    console.print(hardware_line(hardware()), highlight=False, soft_wrap=True)


def _threads_of_a_share() -> int | None:
    """CPU threads of one of several processes; None where torch or OMP_NUM_THREADS decides."""
    if process_count() == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":  # torchrun sets 1 when nobody else did
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", process_count()))
    return max((os.cpu_count() or 1) // here, 1)


def draw_apart(seed: int) -> None:
    """Give each further process dropout of its own; the adapters, drawn before, are the same in all."""
    if not is_main():
        set_seed(seed + rank())


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


Sides = Callable[[Sample], Sequence[Sample]]  # the rows with one answer that a row of the data stands for


def read_inputs(
    params: TrainParams, checkpoint: Path | None, *, kind: RowKind, sides: Sides, dry_run: bool, console: Console
) -> Inputs:
    """Rows, processor and collator; UserError when a resumed run would read other rows than it began with.

    ``kind`` says what is read of a row, ``sides`` which rows with one answer it stands for.
    """
    spec = load_spec(params.model)
    quarantine = None if dry_run or not is_main() else Path(params.output_dir) / QUARANTINE_FILE
    loaded = read_rows(params, spec, quarantine, console, kind=kind)
    processor = load_processor(spec, params.processor_name, max_image_tiles=params.basic.max_image_tiles)
    collator = spec.collator(processor, max_length=params.basic.max_length, over_length=params.sft.over_length)
    loaded, too_long = without_long_rows(loaded, params, spec, processor, collator, sides=sides)
    check_captions(params, loaded.heldout)
    contrast = read_contrast(
        params, loaded.train, spec=spec, processor=processor, collator=collator, quarantine_file=quarantine
    )
    if contrast is not None:
        _say_left_out(contrast.loaded, "pair", quarantine, console)
    inputs = Inputs(
        spec=spec, loaded=loaded, too_long=too_long, processor=processor, collator=collator, contrast=contrast
    )
    if checkpoint:
        refuse_other_rows(checkpoint, inputs.fingerprint)
    return inputs


def refuse_unlike_rows(fingerprint: str) -> None:
    """UserError when the processes of a run have not all read the same rows."""
    if len(set(gather(fingerprint))) > 1:
        message = "the processes read different rows: data.data must hold the same files on every machine."
        raise agreed(UserError(message))


def read_rows(
    params: TrainParams, spec: ModelSpec, quarantine: Path | None, console: Console, *, kind: RowKind = "captions"
) -> Loaded:
    """The rows to train on and those held out; bad ones are counted on the console, with where they will be listed."""
    with console.status("reading rows") as status:
        loaded = load_samples(
            params.data,
            quarantine_file=quarantine,
            with_images=spec.takes_images,
            on_progress=lambda done: status.update(f"reading rows: {done:,} images checked"),
            kind=kind,
        )
    _say_left_out(loaded, "row", quarantine, console)
    return loaded


def _say_left_out(loaded: Loaded | LoadedPairs, what: str, quarantine: Path | None, console: Console) -> None:
    """How many rows or pairs are bad, where they will be listed, and why the first ones are."""
    if loaded.bad:
        count = f"{len(loaded.bad):,} bad {what}{'s' if len(loaded.bad) > 1 else ''} left out"
        place = f", to be listed with their reasons in {quarantine}" if quarantine else ""
        text = f"{count}{place}:\n{loaded.quarantine_reasons}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def without_long_rows(
    loaded: Loaded, params: TrainParams, spec: ModelSpec, processor: Any, collator: Any, *, sides: Sides
) -> tuple[Loaded, int]:
    """With over_length="drop": the rows whose sides fit into max_length, and how many did not; else all of them.

    With rewards the longest answer that may be generated counts in place of the caption, which the model never reads.
    UserError for rows that stay too long however their news text is shortened, or that are too long at all with
    over_length="error": a run must not meet them in the middle of an epoch.
    """
    shortens = params.sft.over_length == "shorten"
    limit = params.basic.max_length
    if params.method in RL_METHODS:  # the sides have a stand-in for the answer
        limit += min(stand_in_tokens(collator) - params.rl.max_completion_length, 0)
    room = limit - collator.template_bytes() - spec.most_image_tokens(processor)

    def too_long(samples: Sequence[Sample]) -> set[int]:
        kept = [replace(sample, prompt=sample.prompt.with_news("")) if shortens else sample for sample in samples]
        sided = [(i, side) for i, sample in enumerate(kept) for side in sides(sample)]
        # A token has a byte at least: most rows need no tokenizer, and no image, to be known to fit.
        doubtful = [(i, side) for i, side in sided if len((side.prompt.text + side.answer).encode()) > room]
        lengths = collator.lengths([side for _, side in doubtful])
        return {i for (i, _), length in zip(doubtful, lengths, strict=True) if length > limit}

    long = [too_long(samples) for samples in (loaded.train, loaded.heldout)]
    if not any(long):
        return loaded, 0
    if params.sft.over_length != "drop":
        rows = [samples[i] for samples, found in zip((loaded.train, loaded.heldout), long, strict=True) for i in found]
        raise _too_long(rows, params)
    train, heldout = (
        [sample for i, sample in enumerate(samples) if i not in found]
        for samples, found in zip((loaded.train, loaded.heldout), long, strict=True)
    )
    if not train:
        raise UserError(
            f"no row is left: every one has more than basic.max_length={params.basic.max_length} tokens"
            f'{_with_answer(params)} and sft.over_length is "drop". Raise basic.max_length, or for Aya lower '
            "basic.max_image_tiles."
        )
    kept, kept_heldout = (Counter(sample.language for sample in samples) for samples in (train, heldout))
    counts = {language: (kept[language], kept_heldout[language]) for language in loaded.rows_per_language}
    return replace(loaded, train=train, heldout=heldout, rows_per_language=counts), sum(map(len, long))


def stand_in_tokens(collator: Any) -> int:
    """Return how many tokens the stand-in for an answer adds to any prompt, the end of its turn included."""
    row = Sample(image=None, prompt=Prompt(instruction=STAND_IN), answer=STAND_IN, language="")
    return int(collator.lengths([row])[0]) - int(collator.prompts([row])["attention_mask"].sum())


def _with_answer(params: TrainParams) -> str:
    """What of a row's length is no text of its own, in words."""
    answer = params.rl.max_completion_length
    return f" with an answer of rl.max_completion_length={answer:,}" if params.method in RL_METHODS else ""


def _too_long(rows: Sequence[Sample], params: TrainParams) -> UserError:
    names = ", ".join(where(sample) for sample in rows[:3]) + (", …" if len(rows) > 3 else "")
    even = " even without news text" if params.sft.over_length == "shorten" else ""
    return UserError(
        f"{len(rows):,} row{'s' if len(rows) > 1 else ''} ({names}) would have more than basic.max_length="
        f"{params.basic.max_length:,} tokens{_with_answer(params)}{even}. Raise basic.max_length (or for Aya lower "
        "basic.max_image_tiles), or leave such rows out with --set sft.over_length=drop."
    )


def guard_batches(samples: Sequence[Sample], size: int, collator: Any) -> list[tuple[list[Sample], Any]]:
    """The longest rows, collated, so that memory runs out now or not at all, then the first rows, and the first with
    or without an image if those have none such."""
    batches = [longest(samples, size), list(samples[:size])]
    for has_image in (True, False):
        if not any((sample.image is not None) == has_image for batch in batches for sample in batch):
            others = [sample for sample in samples if (sample.image is not None) == has_image][:size]
            batches += [others] if others else []
    return [(batch, collator(batch)) for batch in batches]
