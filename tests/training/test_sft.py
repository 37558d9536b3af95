import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from inft.training.callbacks import BestCallback, BestSoFar
from inft.training.methods import load_method
from inft.training.methods.method import Setup
from inft.training.plan import Steps
from inft.training.prepare import read_inputs
from inft.training.run import _adapted_model, fit
from inft.training.runlog import read_events
from inft.training.sft import sft_config
from params import SFTParams, TrainParams, UserError
from params.resolve import resolve_train

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)
STEPS = Steps(per_epoch=7, total=21, warmup=5, effective_batch=6)


def test_every_hyperparameter_reaches_the_trainer(make_params: Make) -> None:
    sft = SFTParams(
        lr=0.0123,
        lr_scheduler_type="linear",
        weight_decay=0.045,
        max_grad_norm=0.67,
        optim="sgd",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=5,
        gradient_accumulation_steps=3,
        gradient_checkpointing=True,
        logging_steps=11,
        save_steps=13,
        eval_steps=17,
    )
    params = dataclasses.replace(make_params(), sft=sft)
    params = dataclasses.replace(params, data=dataclasses.replace(params.data, seed=19, num_workers=1))
    config = sft_config(params, output_dir=Path("somewhere"), steps=STEPS, evaluate=True)
    assert {
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type.value,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim.value,
        "train": config.per_device_train_batch_size,
        "eval": config.per_device_eval_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "checkpointing": config.activation_checkpointing,
        "steps": (config.logging_steps, config.save_steps, config.eval_steps, config.max_steps, config.warmup_steps),
        "seeds": (config.seed, config.data_seed),
        "workers": config.dataloader_num_workers,
    } == {
        "learning_rate": 0.0123,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.045,
        "max_grad_norm": 0.67,
        "optim": "sgd",
        "train": 2,
        "eval": 5,
        "accumulation": 3,
        "checkpointing": True,
        "steps": (11, 13, 17, 21, 5),
        "seeds": (42, 19),
        "workers": 1,
    }


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(make_params: Make) -> None:
    params = make_params(sft__warmup_ratio=0.25)
    result = fit(params, console=QUIET)
    logged = [event["learning_rate"] for event in read_events(result.log_file) if event["event"] == "log"]
    peak, warmup, total = params.sft.lr, 2, 8
    expected = [
        peak * step / warmup
        if step < warmup
        else peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        for step in range(total)
    ]
    assert logged == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_unknown_optimizer_is_an_error_with_the_nearest_names(make_params: Make) -> None:
    with pytest.raises(UserError, match=r"sft\.optim: .*'adamw_tourch'.* adamw_torch"):
        fit(make_params(sft__optim="adamw_tourch"), console=QUIET)


@pytest.mark.parametrize("family", ["llama32", "aya"])
def test_checkpointing_keeps_the_frozen_vision_tower_out_of_the_backward_pass(family: str, tmp_path: Path) -> None:
    params = resolve_train(
        family,
        demo=True,
        overrides=("sft.gradient_checkpointing=true", "data.max_rows_per_lang=4", "sft.max_steps=1"),
        flags={"output_dir": str(tmp_path / "run")},
    )
    method = load_method("sft")
    inputs = read_inputs(params, None, kind="captions", sides=method.sides, dry_run=True, console=QUIET)
    model = _adapted_model(params, inputs.spec, QUIET)
    best = BestCallback(BestSoFar(), keep=None, patience=0, threshold=0.0)
    trainer = method.trainer(
        Setup(params=params, inputs=inputs, model=model, steps=STEPS, best=best, callbacks=[], output_dir=tmp_path)
    )
    needed: list[bool] = []
    inner = model.get_base_model().model
    tower = getattr(inner, "vision_model", None) or inner.vision_tower
    tower.register_forward_hook(lambda module, args, output: needed.append(output.last_hidden_state.requires_grad))
    model.train()
    trainer.score(inputs.collator(inputs.loaded.train[:2])).loss.backward()
    assert needed == [False]
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and torch.isfinite(grad).all() and grad.any() for grad in grads)


def test_how_often_one_evaluates_does_not_change_the_training(make_params: Make, tmp_path: Path) -> None:
    losses = []
    for every in (2, 3, 100):
        result = fit(make_params(tmp_path / str(every), sft__eval_steps=every, sft__save_steps=100), console=QUIET)
        losses.append([event["loss"] for event in read_events(result.log_file) if event["event"] == "log"])
    assert losses[0] == losses[1] == losses[2]


def test_the_first_and_the_last_step_are_logged_however_short_the_run(make_params: Make) -> None:
    result = fit(make_params(sft__logging_steps=50), console=QUIET)
    steps = [event["step"] for event in read_events(result.log_file) if event["event"] == "log"]
    assert steps == [1, 8]
