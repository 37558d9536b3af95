"""Losses are found by name, function or module:function, and a server's list is final."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from inft.client.losses import loss_names, register_loss, registry, resolve_loss
from inft.client.losses.inputs import LossInputs, LossOutput, evaluate_loss
from inft.client.losses.token_ce import token_ce
from params.errors import UserError


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with a loss, which leaves a mark when it is imported."""
    text = (
        "from pathlib import Path\n"
        "from inft.client.losses.token_ce import token_ce\n"
        "Path(__file__).with_name('imported').touch()\n"
        "def doubled(inputs): return token_ce(inputs)\n"
        "async def later(inputs): return None\n"
        "number = 3\n"
    )
    (tmp_path / "own_client_losses.py").write_text(text)
    (tmp_path / "broken_client_losses.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "needy_client_losses.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_client_losses", "broken_client_losses", "needy_client_losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_client_losses"


def inputs() -> LossInputs:
    labels = torch.zeros(2, 3, dtype=torch.int64)
    return LossInputs(
        logits_BTV=torch.zeros(2, 3, 4, requires_grad=True), labels_BT=labels, attention_mask_BT=labels + 1
    )


def test_built_in_names_are_found() -> None:
    assert resolve_loss("token_ce") is token_ce
    assert {"token_ce", "margin_ranking", "contrastive", "mse", "ppo", "cispo"} <= set(loss_names())
    assert all(callable(resolve_loss(name)) for name in loss_names())


def test_a_registered_loss_is_found_and_may_be_replaced() -> None:
    register_loss("focal", lambda given: token_ce(given))
    register_loss("focal", token_ce)
    assert resolve_loss("focal") is token_ce
    assert "focal" in loss_names()


def test_a_function_and_a_module_function_are_taken_in_process(own_module: str) -> None:
    assert resolve_loss(token_ce) is token_ce
    assert resolve_loss(f"{own_module}:doubled")(inputs()).loss.ndim == 0


def test_options_are_bound_and_unknown_ones_refused() -> None:
    resolve_loss("ppo", options={"clip_high": 1.3})
    with pytest.raises(UserError, match="no option 'clip_hi'; did you mean 'clip_high'"):
        resolve_loss("ppo", options={"clip_hi": 1.3})


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("ppo", {"clip_high": "1.2"}),
        ("ppo", {"clip_high": None}),
        ("ppo", {"clip_high": float("nan")}),
        ("margin_ranking", {"margin": float("inf")}),
        ("margin_ranking", {"margin": True}),
        ("contrastive", {"temperature": [0.1]}),
        ("contrastive", {"pooling": 3}),
        (math.sqrt, {"pooling": 3}),
        (max, {"key": 3}),
    ],
)
def test_options_of_another_kind_are_refused(loss: str | registry.Loss, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}|does not say"):
        resolve_loss(loss, options=options)


def test_a_server_resolves_what_is_on_its_list_alone(own_module: str, tmp_path: Path) -> None:
    allowed = ("token_ce", "mse")
    assert resolve_loss("token_ce", allowed=allowed) is token_ce
    with pytest.raises(UserError, match="not allowed here; known: mse, token_ce"):
        resolve_loss(f"{own_module}:doubled", allowed=allowed)
    assert not (tmp_path / "imported").exists(), "a module that is not allowed was imported"
    with pytest.raises(UserError, match="not allowed here; did you mean 'token_ce'"):
        resolve_loss("token_cf", allowed=allowed)
    with pytest.raises(UserError, match="cannot be sent to a server"):
        resolve_loss(token_ce, allowed=allowed)
    assert resolve_loss(f"{own_module}:doubled", allowed=(f"{own_module}:doubled",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token_cee", "unknown; did you mean 'token_ce'"),
        ("zzz", "unknown; known: cispo"),
        ("own_client_losses:dubled", "no function 'dubled'; did you mean 'doubled'"),
        ("own_client_losses:number", "of type int"),
        ("own_client_losses:later", "async"),
        ("own_client_losses:Path", "a class"),
        ("not_there_at_all:loss", "no module not_there_at_all"),
        ("needy_client_losses:loss", "needs not_there_at_all"),
        ("broken_client_losses:loss", "failed with RuntimeError: no licence"),
        ("own_client_losses.py:doubled:x", "expected module:function"),
        ("../own:doubled", "expected module:function"),
        (":doubled", "expected module:function"),
    ],
)
def test_what_cannot_be_resolved_is_named(own_module: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_loss(name)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [("mse", token_ce, "built-in"), ("a:b", token_ce, "no word"), ("own", 3, "type int"), ("own", LossInputs, "class")],
)
def test_what_cannot_be_registered_is_named(name: str, function: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_loss(name, function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda given: given.logits_BTV.sum(), "returned Tensor"),
        (lambda given: LossOutput(loss=given.logits_BTV), "one number"),
        (lambda given: LossOutput(loss=given.logits_BTV.detach().sum()), "loss has no gradient"),
        (
            lambda given: LossOutput(loss=given.logits_BTV.sum(), per_example_B=torch.zeros(2)),
            "per_example_B has no gradient",
        ),
        (lambda given: LossOutput(loss=given.logits_BTV.sum(), denominator=0), "denominator is 0"),
        (lambda given: LossOutput(loss=given.logits_BTV.sum(), denominator=torch.ones(())), "denominator is tensor"),
        (lambda given: LossOutput(loss=given.logits_BTV.sum(), metrics={"a": torch.ones(())}), "'a' is Tensor"),
        (
            lambda given: LossOutput(loss=given.logits_BTV.sum(), per_example_B=torch.zeros(3)),
            "3 per-example .* 2 rows",
        ),
        (lambda given: LossOutput(loss=given.logits_BTV.sum(), per_example_B=given.logits_BTV.sum()), "one number per"),
    ],
)
def test_a_users_loss_that_returns_something_else_is_named(function: registry.Loss, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_loss(function, inputs(), name="own")


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; import inft.client.losses.registry as r; assert r.loss_names(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_module_of_the_current_directory_is_found_and_stands_for_no_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here_client_losses.py").write_text("def mine(inputs): return inputs\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    before = list(sys.path)
    resolve_loss("token_ce")
    with pytest.raises(UserError, match="not allowed"):
        resolve_loss("here_client_losses:mine", allowed=("token_ce",))
    assert sys.path == before, "what is not allowed, and what is ours, look nowhere else"
    name = "here_client_losses:mine"
    assert resolve_loss(name, allowed=("token_ce", name)).__module__ == "here_client_losses"
    assert callable(resolve_loss("colorsys:rgb_to_hsv"))
    assert sys.path == [*before, str(tmp_path)]
    monkeypatch.delitem(sys.modules, "here_client_losses")
