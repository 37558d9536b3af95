"""A new run from the newest weights of another, at a longer context: the second stage of the NeoBERT paper."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from inft.encoders.checkpoints import CONFIG_FILE, MODELS, newest_model
from params.encoder_resolve import load_encoder_params
from params.errors import UserError

STEPS = 50_000
TOKENS = 4_096


def continued_parameters(run_dir: Path) -> dict[str, Any]:
    """Return the other run's parameters by dotted name, but for weights, context, steps and directories.

    Errors: UserError for a directory that holds no pretraining run.
    """
    stored = newest_model(run_dir)
    if stored is None or not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir} holds no pretraining run: {CONFIG_FILE} and {MODELS}/<step> are looked for there.")
    params = load_encoder_params(run_dir / CONFIG_FILE)
    plain = asdict(params)
    values = {
        f"{section}.{name}": value
        for section, fields in plain.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }
    return {
        **values,
        "task": params.task,
        "seed": params.seed + 1,  # of masks and order: the first stage has seen those of its own
        "model.name": str(stored),
        "tokenizer.name": None,
        "dataset.max_seq_length": TOKENS,
        "dataset.pre_tokenize": False,
        "trainer.max_steps": STEPS,
        "trainer.resume_from_checkpoint": None,
        "trainer.output_dir": f"{run_dir}_longer",
        "trainer.run_name": f"{params.trainer.run_name}_longer",
        "scheduler.warmup_steps": 0,
        "scheduler.decay_steps": None,
    }
