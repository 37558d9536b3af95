"""Going on after a checkpoint: which one is whole, and whether the run is still the same."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from craft.config import CRAFTConfigMixin
from inft.training.processes import gather, is_main, process_count
from inft.training.resume import checkpoints, damage, write_manifest
from inft.training.storage import write_text
from params.errors import UserError

if TYPE_CHECKING:
    from craft_arguments import Arguments

RUN_FILE = "run.json"
LATEST = ("latest", "true")

# What the losses of a run depend on besides its rows; its length may change, and how it is logged and saved.
OF_TRAINING = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "shuffle_dataset",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "padding_free",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "assistant_only_loss",
    "completion_only_loss",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "router_aux_loss_coef",
    "bf16",
    "fp16",
)
NOT_OF_CRAFT = ("craft_report_metrics", "craft_debug")


class WholeCheckpoints(TrainerCallback):
    """Lists the files of each checkpoint when every process has written its own: one without a list is not whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for all, then let the first process write the list."""
        gather(None)
        if is_main():
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}", step=state.global_step)


def find_checkpoint(arguments: "Arguments") -> str | None:
    """Return the checkpoint to go on from; None for a new run, and for one that has not finished a checkpoint.

    Errors: UserError for a path that is no whole checkpoint of the output directory.
    """
    wanted, output_dir = arguments.training.resume_from_checkpoint, Path(arguments.training.output_dir)
    if not wanted:
        return None
    whole = [path for _, path in checkpoints(output_dir) if damage(path) is None]
    if wanted.lower() in LATEST:
        if not whole:
            print(f"{output_dir} holds no whole checkpoint: starting with the first step", flush=True)
        return str(whole[0]) if whole else None
    if Path(wanted).resolve() not in [path.resolve() for path in whole]:
        reason = damage(Path(wanted)) if Path(wanted).is_dir() else "there is no such directory"
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {reason or f'it is not in {output_dir}'}. Whole checkpoints: "
            f"{', '.join(map(str, whole)) or 'none'}. Give one of them, or latest."
        )
    return wanted


def goes_on(arguments: "Arguments") -> bool:
    """Return whether this run continues one; UserError when it would instead write over one.

    What did not come to a checkpoint is no run to protect, so that a command can be mended and given again.
    """
    output_dir = Path(arguments.training.output_dir)
    begun = bool(checkpoints(output_dir))
    if begun and arguments.training.resume_from_checkpoint:
        return True
    results = [name for name in ("adapter", "model") if (output_dir / name).exists()]
    if begun or results:
        raise UserError(
            f"{output_dir} holds another run. Go on with it by --resume_from_checkpoint latest, or choose another "
            "--output_dir."
        )
    return False


def write_run_file(arguments: "Arguments") -> None:
    """Keep what a continuation must have in common with the run."""
    text = json.dumps(_in_common(arguments), indent=1)
    write_text(Path(arguments.training.output_dir) / RUN_FILE, text)


def refuse_other_flags(arguments: "Arguments") -> None:
    """UserError listing the flags whose values differ from those that the run began with."""
    file = Path(arguments.training.output_dir) / RUN_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} does not tell what the run to go on with was ({error}).") from error
    now = json.loads(json.dumps(_in_common(arguments)))
    changed = [f"{name}: {before.get(name)!r} -> {value!r}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise UserError(
            "the run to go on with had other flags, so its losses could not be continued:\n  "
            + "\n  ".join(changed)
            + "\nGive the same flags again, or start another run with another --output_dir."
        )


def _in_common(arguments: "Arguments") -> dict[str, Any]:
    training = arguments.training
    craft = [f.name for f in fields(CRAFTConfigMixin) if f.name not in NOT_OF_CRAFT]
    return {
        "processes": process_count(),
        **asdict(arguments.model),
        **{name: getattr(training, name) for name in (*OF_TRAINING, *craft)},
    }
