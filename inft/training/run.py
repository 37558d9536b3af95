"""fit(): one fine-tuning run from resolved parameters to a stored best adapter.

rows → processor → model (quantised) → adapters → plan → guards → train → best
"""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft import PeftModel
from rich.console import Console
from transformers import TrainerCallback

from inft.data.batches import write_quarantine
from inft.models.loading import load_model
from inft.models.spec import ModelSpec
from inft.sample import Sample
from inft.training.adapters import add_adapters
from inft.training.best import BestKeeper, criterion_of, read_best
from inft.training.callbacks import BestCallback, BestSoFar, GracefulStop, TrainerLoggingCallback, sigterm_interrupts
from inft.training.contrast import shortage_told_once
from inft.training.guards import GuardResult, run_guards
from inft.training.hardware import hardware, out_of_memory_told, peak_memory, versions
from inft.training.methods import load_method
from inft.training.methods.method import Method, Setup
from inft.training.plan import Plan, log_file, make_plan, show_parameters, show_plan
from inft.training.prepare import (
    Inputs,
    draw_apart,
    guard_batches,
    prepare_process,
    read_inputs,
    refuse_unlike_rows,
    say_what_runs,
    starting_point,
)
from inft.training.processes import (
    Failure,
    gather,
    is_main,
    joined,
    launch_command,
    lost_process_told,
    on_main,
    together,
    when_another_fails,
)
from inft.training.progress import ProgressReport
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.resume import PARAMS_FILE, QUARANTINE_FILE, delete_run, refuse_missing_best
from inft.training.runlog import JsonlLogger, errors_logged
from inft.training.runtrainer import RunTrainer
from inft.training.storage import write_text
from params import TrainParams, UserError
from params.presets import lora_targets
from params.resolve import dump_yaml

LESS_MEMORY = (
    "Lower sft.per_device_train_batch_size (and raise sft.gradient_accumulation_steps), basic.max_length or, for Aya, "
    "basic.max_image_tiles; turn on sft.gradient_checkpointing and qlora.load_in_4bit."
)

Status = Literal["finished", "early_stopped", "interrupted", "dry_run"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left behind."""

    output_dir: Path
    best_dir: Path  # of the stored adapter; there is none after a dry run or an early interruption
    best_step: int | None
    best_metric: float | None  # of the stored adapter, the figure that sft.best_metric names; None: not chosen by one
    log_file: Path
    global_step: int
    train_loss: float | None  # mean over all steps; None when none was made
    status: Status


def fit(
    params: TrainParams,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Run what ``params`` say and return what came of it.

    ``resume`` is None, "latest" or the path of a checkpoint in the output directory; ``overwrite`` replaces an earlier
    run there; ``dry_run`` shows the plan, runs the guards and writes nothing. Under torchrun each process calls it and
    gets the same result. Errors: UserError for everything that the user can mend; checkpoints and best adapter stay as
    they were last saved.
    """
    console = (console or Console()) if is_main() else Console(quiet=True)
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(joined())
        stack.enter_context(sigterm_interrupts())
        stack.enter_context(shortage_told_once())
        checkpoint = on_main(
            lambda: starting_point(
                params, resume=resume, overwrite=overwrite, dry_run=dry_run, console=console, held=stack
            )
        )
        together(lambda: prepare_process(params, console))
        log, progress = stack.enter_context(_told(None if dry_run else log_file(params), console))

        method = together(lambda: _method(params))
        inputs = together(lambda: _inputs(params, method, checkpoint, dry_run=dry_run, console=console))
        refuse_unlike_rows(inputs.fingerprint)
        log.event("run_start", **_run_start(params, inputs, checkpoint))
        model = together(lambda: _adapted_model(params, inputs.spec, console))
        keeper = BestKeeper(params, model=model, processor=inputs.processor, log=log)
        plan = _shown_plan(params, method, inputs, model, dry_run=dry_run, console=console)

        stop = GracefulStop(tell=console.print)
        callbacks = [TrainerLoggingCallback(log), progress, stop]
        scratch = stack.enter_context(TemporaryDirectory()) if dry_run else None  # a Trainer makes its directory
        setup = _setup(params, inputs, model, keeper, plan, callbacks, Path(scratch or params.output_dir))
        trainer = together(lambda: method.trainer(setup))
        batches = _guard_batches(params, method, inputs)
        guards = partial(run_guards, forward=trainer.score, report=_reporter(log, console))
        together(lambda: guards(model, inputs.spec, inputs.processor, batches))
        if dry_run:
            console.print("dry run: all is ready; nothing was written.")
            return _result(params, trainer, None, status="dry_run")

        on_main(lambda: _claim_directory(params, inputs, overwrite=overwrite))
        draw_apart(params.basic.seed)
        with stop:
            train_loss = trainer.fit(checkpoint)
        result = on_main(lambda: _finish(params, trainer, keeper, train_loss, interrupted=stop.requested))
        shortenings = sum(gather(inputs.collator.shortened))
        log.event("run_end", **_run_end(result, seconds=time.perf_counter() - began, shortenings=shortenings))
    _say_goodbye(params, result, console)
    return result


def evaluate_command(params: TrainParams) -> str:
    """The command line that scores the stored adapter on held-out rows."""
    return f"inft evaluate {params.model} --adapter {shlex.quote(params.best_model_dir)}"


def resume_command(params: TrainParams) -> str:
    """The command line that goes on with a run, in as many processes."""
    file = shlex.quote(str(Path(params.output_dir) / PARAMS_FILE))
    return f"{launch_command()} train {params.model} --config {file} --resume"


def _claim_directory(params: TrainParams, inputs: Inputs, *, overwrite: bool) -> None:
    """Delete the run that is to be replaced, and write what describes this one."""
    if overwrite:
        delete_run(params)
    write_quarantine(Path(params.output_dir) / QUARANTINE_FILE, inputs.bad)
    write_text(Path(params.output_dir) / PARAMS_FILE, dump_yaml(params))


def _adapted_model(params: TrainParams, spec: ModelSpec, console: Console) -> PeftModel:
    """The base model, quantised as QLoRAParams say, with adapters on the targets of (model, mode)."""
    say_what_runs(params, console)
    quantisation = quantization_config(params.qlora, spec)
    base = load_model(spec, params.model_name, basic=params.basic, quantization_config=quantisation)
    if quantisation is not None:
        after_quantised_load(base)
    targets = lora_targets(params.model, params.training_mode, params.lora)
    return add_adapters(base, spec, params.lora, targets, seed=params.basic.seed)


def _method(params: TrainParams) -> Method:
    """The run's method; UserError when the libraries or the parameters do not allow it."""
    method = load_method(params.method)
    method.check(params)
    return method


def _inputs(params: TrainParams, method: Method, checkpoint: Path | None, *, dry_run: bool, console: Console) -> Inputs:
    kind = method.row_kind(params)
    return read_inputs(params, checkpoint, kind=kind, sides=method.sides, dry_run=dry_run, console=console)


def _guard_batches(params: TrainParams, method: Method, inputs: Inputs) -> list[tuple[list[Sample], Any]]:
    """The batches that the guards look at: of a preference both answers."""
    rows = [list(method.sides(sample)) for sample in inputs.loaded.train]
    size = params.sft.per_device_train_batch_size * len(rows[0])
    return guard_batches([side for row in rows for side in row], size, inputs.collator)


def _shown_plan(
    params: TrainParams, method: Method, inputs: Inputs, model: PeftModel, *, dry_run: bool, console: Console
) -> Plan:
    """The plan of a run, after it was printed; a dry run prints the parameters too."""
    plan = make_plan(
        params,
        inputs.loaded,
        inputs.too_long,
        model=model,
        spec=inputs.spec,
        collator=inputs.collator,
        method=method,
        contrast=inputs.contrast,
    )
    if dry_run:
        show_parameters(console, dump_yaml(params))
    show_plan(console, params, plan)
    return plan


def _setup(
    params: TrainParams,
    inputs: Inputs,
    model: PeftModel,
    keeper: BestKeeper,
    plan: Plan,
    callbacks: Sequence[TrainerCallback],
    output_dir: Path,
) -> Setup:
    """What the trainer of a run is made of, writing to ``output_dir``."""
    best, steps = _judge(params, keeper), plan.steps
    return Setup(
        params=params,
        inputs=inputs,
        model=model,
        steps=steps,
        best=best,
        callbacks=callbacks,
        output_dir=output_dir,
    )


def _judge(params: TrainParams, keeper: BestKeeper) -> BestCallback:
    """What follows from each evaluation."""
    sft = params.sft
    return BestCallback(
        BestSoFar(),
        keep=keeper.keep if sft.load_best_model_at_end else None,
        patience=sft.early_stopping_patience,
        threshold=sft.early_stopping_threshold,
        criterion=criterion_of(sft, params.method),
    )


def _run_start(params: TrainParams, inputs: Inputs, checkpoint: Path | None) -> dict[str, Any]:
    loaded = inputs.loaded
    return {
        "task": params.task,
        "method": params.method,
        "params": asdict(params),
        "versions": versions(),
        "hardware": hardware(),
        "data": {
            "source": loaded.source,
            "fingerprint": inputs.fingerprint,
            "rows_per_language": loaded.rows_per_language,
            "dropped_empty": loaded.dropped_empty,
            "quarantined": loaded.quarantined,
            **({} if inputs.contrast is None else {"pairs": len(inputs.contrast.rows)}),
        },
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
    }


def _run_end(result: RunResult, *, seconds: float, shortenings: int) -> dict[str, Any]:
    return {
        "status": result.status,
        "step": result.global_step,
        "train_loss": result.train_loss,
        "best_step": result.best_step,
        "best_metric": result.best_metric,
        "seconds": seconds,
        "shortenings": shortenings,  # of news texts; a row that is seen again is shortened again
        **peak_memory(),
    }


def _last_words(log: JsonlLogger, progress: ProgressReport) -> Callable[[Failure], None]:
    """What is left to do when another process has failed and this one ends for it."""

    def say(failure: Failure) -> None:
        progress.close()
        with suppress(UserError):
            log.event("error", kind=failure.kind, message=failure.message, process=failure.rank)

    return say


def _reporter(log: JsonlLogger, console: Console) -> Callable[[GuardResult], None]:
    def report(result: GuardResult) -> None:
        mark = "ok    " if result.ok else "FAILED"
        console.print(f"{mark} {result.name}: {result.detail}", highlight=False, markup=False, soft_wrap=True)
        log.event("guard", **asdict(result))

    return report


def _finish(
    params: TrainParams, trainer: RunTrainer, keeper: BestKeeper, train_loss: float | None, *, interrupted: bool
) -> RunResult:
    """Store the last step where no evaluation chose one, and say how the run ended."""
    status: Status = "finished"
    if trainer.best.stopped_early:
        status = "early_stopped"
    elif interrupted and trainer.state.global_step < trainer.state.max_steps:
        status = "interrupted"
    if status != "interrupted":
        refuse_missing_best(params, trainer.best.so_far.step)
        keeper.finish(trainer.state.global_step, evaluated=trainer.best.so_far.step is not None)
    return _result(params, trainer, train_loss, status=status)


def _result(params: TrainParams, trainer: RunTrainer, train_loss: float | None, *, status: Status) -> RunResult:
    best = read_best(Path(params.best_model_dir)) or {}
    return RunResult(
        output_dir=Path(params.output_dir),
        best_dir=Path(params.best_model_dir),
        best_step=best.get("step"),
        best_metric=best.get("value"),
        log_file=log_file(params),
        global_step=trainer.state.global_step,
        train_loss=train_loss,
        status=status,
    )


def _say_goodbye(params: TrainParams, result: RunResult, console: Console) -> None:
    loss = f", mean training loss {result.train_loss:.4f}" if result.train_loss is not None else ""
    if result.status == "interrupted":
        lines = [f"stopped after step {result.global_step}; go on with:", f"  {resume_command(params)}"]
    else:
        by = criterion_of(params.sft, params.method)
        value = f", {by.said(result.best_metric)}" if result.best_metric is not None else ""
        still = f"the {by.title} no longer {'rises' if by.metric.higher_is_better else 'falls'}"
        word = f"stopped early, {still}" if result.status == "early_stopped" else "finished"
        lines = [
            f"{word}{loss} · step {result.best_step}{value} is stored in {result.best_dir}",
            f"captions and scores: {evaluate_command(params)}",
        ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _told(file: Path | None, console: Console) -> Iterator[tuple[JsonlLogger, ProgressReport]]:
    """The log of a run, in ``file`` unless that is None, and its progress; both hear what ends it."""
    log = together(lambda: JsonlLogger(file if is_main() else None))
    with (
        log,
        ProgressReport(console) as progress,
        when_another_fails(_last_words(log, progress)),
        errors_logged(log),
        out_of_memory_told(LESS_MEMORY),
        lost_process_told(),
    ):
        yield log, progress
