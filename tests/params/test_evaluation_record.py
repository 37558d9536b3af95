"""What of a run's record an evaluation takes over, and what it leaves."""

from dataclasses import asdict
from pathlib import Path

import pytest

from params import MUNIChusLoadConfig, UserError
from params.evaluation import resolve_eval
from params.resolve import resolve_train


def trained(model="llama32", **flags):
    return asdict(resolve_train(model, demo=True, flags=flags))


def test_what_limited_the_training_does_not_limit_an_evaluation():
    changed = {
        "data.max_rows_per_lang": 5,
        "data.eval_fraction": 0.3,
        "data.num_workers": 3,
        "data.split": "validation",
    }
    params = resolve_eval("llama32", trained=trained(**changed))
    plain = MUNIChusLoadConfig()
    assert (params.data.max_rows_per_lang, params.data.split) == (None, "test")
    assert (params.data.eval_fraction, params.data.num_workers) == (
        plain.eval_fraction,
        resolve_eval("llama32", demo=True).data.num_workers,
    )
    was = params.trained
    assert (was.max_rows_per_lang, was.eval_fraction, was.num_workers, was.split) == (5, 0.3, 3, "validation")


def test_a_directory_may_begin_at_home_and_not_be_empty():
    params = resolve_eval("llama32", demo=True, overrides=["basic.metric_dir=~/figures"])
    assert params.basic.metric_dir == str(Path.home() / "figures")
    with pytest.raises(UserError, match=r"--set: basic\.metric_dir is empty: name a directory"):
        resolve_eval("llama32", demo=True, overrides=["basic.metric_dir="])


def test_no_model_name_is_no_embedded_model():
    with pytest.raises(UserError, match="the model name is empty: name a hub id or a local path with --model"):
        resolve_eval("llama32", model_name="")


def test_what_a_run_rewarded_is_kept_for_its_held_out_rows():
    overrides = ["rl.rewards=exact,length"]
    run = asdict(resolve_train("text", method="grpo", overrides=overrides))
    assert (resolve_eval("text", trained=run).method, resolve_eval("text", trained=run).rewards) == (
        "grpo",
        ("exact", "length"),
    )
    del run["rl"]
    assert resolve_eval("text", trained=run).rewards == ("chrf",)
    assert resolve_eval("text", trained=asdict(resolve_train("text"))).rewards == ()
