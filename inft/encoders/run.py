"""One run of an encoder, of either task: directory → data and tokenizer → model → low precision → compile → loop."""

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from inft.encoders.checkpoints import CONFIG_FILE, MODELS, STATES, STEP, newest_model, read_run, refuse_changes
from inft.encoders.loop import Loop, Outcome, Task
from inft.encoders.report import Report
from inft.training.callbacks import GracefulStop, sigterm_interrupts
from inft.training.hardware import hardware, hardware_line, out_of_memory_told, peak_memory, versions
from inft.training.logfiles import PREFIX
from inft.training.prepare import draw_apart
from inft.training.processes import is_main, joined, launch_command, lost_process_told, on_main, together
from inft.training.quiet import quiet_libraries
from inft.training.resume import checkpoints, find_checkpoint
from inft.training.runlog import JsonlLogger, errors_logged
from inft.training.storage import PREVIOUS, STAGING, disk_trouble, locked, remove, remove_leftovers, write_text
from params.encoder import EncoderParams
from params.encoder_resolve import dump_encoder_yaml
from params.errors import UserError

OURS = re.compile(
    rf"{STATES}|{MODELS}|{re.escape(CONFIG_FILE)}|pre_tokenized|demo|{re.escape(STAGING)}.*|{re.escape(PREVIOUS)}.*"
)

LESS_MEMORY = (
    "Lower trainer.per_device_train_batch_size (and raise trainer.gradient_accumulation_steps) or "
    "dataset.max_seq_length; turn on trainer.gradient_checkpointing."
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a task brings to a run."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel  # plain, in float32, on the CPU
    task: Task[Any]


@dataclass(frozen=True, kw_only=True)
class EncoderResult:
    """What a run left behind."""

    outcome: Outcome
    model_dir: Path | None  # model_checkpoints/<step> of the last step; None when nothing was saved
    log_file: Path


def run_encoder(
    params: EncoderParams,
    build: Callable[[EncoderParams, Console], Parts],
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> EncoderResult:
    """Train what `build` makes of the parameters; under torchrun each process calls it.

    `overwrite` replaces an earlier run in trainer.output_dir. Errors: UserError for everything that the user can mend;
    checkpoints stay as they were last saved.
    """
    console = (console or Console()) if is_main() else Console(quiet=True)
    began = time.perf_counter()
    _refuse_sharding()
    with ExitStack() as stack:
        stack.enter_context(joined())
        stack.enter_context(sigterm_interrupts())
        output = Path(params.trainer.output_dir)
        on_main(lambda: _claim(output, params, overwrite=overwrite, held=stack))
        checkpoint = on_main(lambda: _starting_point(params, console))
        _prepare_process(params, console)
        file = Path(params.trainer.logs_dir) / f"{PREFIX}{params.trainer.run_name}.jsonl"
        log = stack.enter_context(
            together(lambda: JsonlLogger(file if is_main() else None, setting="trainer.logs_dir"))
        )
        for told in (errors_logged(log), out_of_memory_told(LESS_MEMORY), lost_process_told()):
            stack.enter_context(told)
        parts = together(lambda: build(_own_weights(params, checkpoint), console))
        draw_apart(params.seed)
        step = read_run(checkpoint)["step"] if checkpoint else None
        if checkpoint:
            notes = together(lambda: refuse_changes(checkpoint, params, parts.task.description))
            for note in notes:
                _say(console, f"changed since the checkpoint: {note}")
        log.event("run_start", **_run_start(params, parts, step))
        on_main(lambda: _write_config(output, params))
        report = stack.enter_context(Report(log, console))
        with GracefulStop(tell=console.print) as stop:
            loop = Loop(params, parts.task, parts.model, parts.tokenizer, report, stop)
            if checkpoint:
                loop.go_on(checkpoint)
            outcome = loop.run()
        log.event("run_end", **_run_end(outcome, time.perf_counter() - began))
    stored = output / MODELS / str(outcome.step)
    result = EncoderResult(outcome=outcome, model_dir=stored if stored.is_dir() else None, log_file=file)
    _say_goodbye(params, result, console)
    return result


def _claim(output: Path, params: EncoderParams, *, overwrite: bool, held: ExitStack) -> None:
    """Make the output directory this run's: locked, free of leftovers, of no other run unless it is gone on with."""
    resume = params.trainer.resume_from_checkpoint
    if resume is not None and overwrite:
        raise UserError("trainer.resume_from_checkpoint and --overwrite contradict each other: give one of them.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"trainer.output_dir {output} cannot be used: {error.strerror}. Choose another.") from error
    held.enter_context(locked(output, setting="trainer.output_dir"))
    remove_leftovers(output)
    for kind in (STATES, MODELS):
        if (output / kind).is_dir():
            remove_leftovers(output / kind)
    taken = any((output / kind).exists() for kind in (STATES, MODELS))
    if overwrite and taken:
        foreign = sorted(path.name for path in output.iterdir() if not OURS.fullmatch(path.name))
        if foreign:
            raise UserError(
                f"--overwrite would delete the run in {output}, which also holds files that no run wrote: "
                f"{', '.join(foreign[:5])}. Move them, or choose another trainer.output_dir."
            )
        for kind in (STATES, MODELS):
            if (output / kind).exists():
                remove(output / kind)
    elif taken and resume is None:
        raise UserError(
            f"{output} holds another run. Go on with it by --trainer.resume_from_checkpoint latest, replace it by "
            "--overwrite, or choose another --trainer.output_dir."
        )


def _write_config(output: Path, params: EncoderParams) -> None:
    try:
        write_text(output / CONFIG_FILE, dump_encoder_yaml(params))
    except OSError as error:
        reason = disk_trouble(error) or error.strerror
        raise UserError(f"{CONFIG_FILE} cannot be written to trainer.output_dir {output}: {reason}.") from error


def _own_weights(params: EncoderParams, checkpoint: Path | None) -> EncoderParams:
    """The parameters of a resumed run that began with stored weights: its own model tells the architecture.

    Those weights may be gone by now, and the checkpoint replaces them anyway.
    """
    own = newest_model(Path(params.trainer.output_dir))
    if checkpoint is None or params.model.name is None or own is None:
        return params
    return replace(params, model=replace(params.model, name=str(own)))


def _refuse_sharding() -> None:
    """FSDP and DeepSpeed keep weights in pieces that neither the guards nor the stored model know."""
    for name, title in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"encoders do not train under {title}: each process holds the whole model, which is small. Start one "
                "process per GPU with torchrun, or with accelerate launch --multi_gpu."
            )


def _starting_point(params: EncoderParams, console: Console) -> Path | None:
    resume = params.trainer.resume_from_checkpoint
    if resume is None:
        return None
    directory = Path(params.trainer.output_dir) / STATES
    checkpoint, warnings = find_checkpoint(directory, resume, STEP)
    for warning in warnings:
        _say(console, f"warning: {warning}")
    if checkpoint is None and not checkpoints(directory, STEP):
        _say(console, "resuming from the beginning: no checkpoint had been finished")
    elif checkpoint is None:
        raise UserError(f"no checkpoint in {directory} is whole: start again with --overwrite.")
    else:
        _say(console, f"resuming from {checkpoint}")
    return checkpoint


def _prepare_process(params: EncoderParams, console: Console) -> None:
    """Threads and seeds of this process; the hardware on the console."""
    if params.trainer.num_threads is not None:
        torch.set_num_threads(params.trainer.num_threads)
    set_seed(params.seed)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that tied weights are stored once
    quiet_libraries(progress_bars=console.is_terminal and is_main())
    _say(console, hardware_line(hardware()))


def _run_start(params: EncoderParams, parts: Parts, step: int | None) -> dict[str, Any]:
    return {
        "task": params.task,
        "params": {**asdict(params), "output_dir": params.trainer.output_dir},  # by which inft logs joins runs
        "versions": versions(),
        "hardware": hardware(),
        "data": parts.task.description,
        "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        "resumed_from_step": step,
    }


def _run_end(outcome: Outcome, seconds: float) -> dict[str, Any]:
    figures: Mapping[str, Any] = outcome.figures or {}
    return {
        "status": outcome.status,
        "step": outcome.step,
        "best_step": None,  # the last step is what is used
        "best_metric": None,
        "eval_loss": figures.get("loss"),
        "seconds": seconds,
        **peak_memory(),
    }


def _say_goodbye(params: EncoderParams, result: EncoderResult, console: Console) -> None:
    outcome = result.outcome
    if outcome.status == "interrupted":
        _say(console, f"stopped after step {outcome.step}; go on with:")
        config = Path(params.trainer.output_dir) / CONFIG_FILE
        command = "pretrain neobert" if params.task == "pretraining" else "finetune-encoder"
        _say(console, f"  {launch_command()} {command} {config} --trainer.resume_from_checkpoint latest")
    else:
        _say(console, f"finished · step {outcome.step} is stored in {result.model_dir}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
