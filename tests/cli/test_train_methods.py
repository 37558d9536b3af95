"""`inft train --method`: how it is told, what it refuses before torch, and what a short demo of each leaves."""

import json
import sys
from types import SimpleNamespace

import pytest

import craft.config
from inft.cli import train
from params.presets import METHODS
from params.resolve import load_params


@pytest.fixture
def asked(monkeypatch):
    """What the command asked for instead of training."""
    calls = []
    monkeypatch.setattr(train, "run", lambda params, **options: calls.append(params) or SimpleNamespace(status="done"))
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_the_method_reaches_the_parameters_the_log_and_the_directory(inft, asked, method):
    assert inft("train", "aya", "--demo", "--method", method).status == 0
    [params] = asked
    own = "" if method == "sft" else f"_{method}"
    assert (params.method, params.task) == (method, f"aya_basic{own}_demo")
    assert params.output_dir.endswith(f"aya_basic{own}_demo")


def test_rewards_reach_their_parameter(inft, asked):
    assert inft("train", "text", "--demo", "--method", "grpo", "--rewards", "chrf,json").status == 0
    assert asked[0].rl.rewards == ("chrf", "json")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--method dppo", "unknown method 'dppo'; did you mean"),
        ("--rewards json", "rl.rewards has no effect with --method sft"),
        ("--method grpo --rewards jsn", "unknown reward 'jsn'; did you mean json?"),
        ("--method ppo --rewards absent_module:brief", "there is no module absent_module"),
        ("--method grpo --set sft.per_device_train_batch_size=6", "does not divide the 6 rows of an optimizer step"),
        ("--method grpo --best-metric loss", "sft.best_metric=loss says nothing of a run with --method grpo"),
    ],
)
def test_what_is_wrong_with_a_method_is_told_before_torch(inft, words, complaint):
    found = inft("train", "text", "--demo", *words.split())
    assert found.status == 2
    assert complaint in found.err


def test_orpo_without_trls_experimental_module_is_told_with_the_version(inft, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("inft.training.methods.orpo", "craft.trainers.orpo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    monkeypatch.delitem(vars(craft.config), "CRAFTORPOConfig", raising=False)  # which keeps what it made
    found = inft("train", "text", "--demo", "--method", "orpo")
    assert found.status == 2
    assert "--method orpo: " in found.err
    assert "trl.experimental.orpo" in found.err
    assert "1.16" in found.err


SHORT = ["--max-rows-per-lang", "24", "--max-steps", "2", "--set", "sft.per_device_train_batch_size=8"]


@pytest.mark.parametrize("method", ["dpo", "orpo", "grpo", "ppo"])
def test_a_short_demo_measures_what_its_method_teaches(inft, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("inft.evaluation.demo.SCENES", 6)
    found = inft("train", "text", "--demo", "--method", method, *SHORT)
    assert found.status == 0, found.err
    output = tmp_path / "outputs" / f"text_basic_{method}_demo"
    assert load_params(output / "params.yaml").method == method
    figures = json.loads((output / "demo.json").read_text())
    assert [set(figures[key]) for key in ("before", "after", "shuffled")] == [{"yue"}] * 3
    title = "likelier than a wrong one" if method in ("dpo", "orpo") else "Reward of captions"
    assert title in " ".join(found.out.split())
    assert ("chance: 50.0%" in found.out) == (method in ("dpo", "orpo"))
    assert "finished" in inft("logs", "show").out
    assert inft("logs", "plot").status == 0
