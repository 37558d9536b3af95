"""Joint mode: every trainer of TRL with the contrastive loss in each of its micro-batches."""

import math

import pytest
import torch
from joint_trainers import NAMES, make_joint

METHODS = tuple(NAMES)
CASES = [(method, strategy) for method in METHODS for strategy in ("self_align", "paired_dataset")]
CASES.remove(("reward", "self_align"))


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_alpha_1_gives_the_weights_of_the_plain_trainer_to_the_bit(method, tmp_path, tokenizer):
    strategy = "paired_dataset" if method == "reward" else "self_align"
    found = {}
    for name, how in (("plain", None), ("craft", strategy)):
        torch.manual_seed(0)
        trainer = make_joint(method, tmp_path / name, tokenizer, strategy=how, craft_alpha=1.0)
        before = weights(trainer)
        trainer.train()
        found[name] = weights(trainer)
        assert any(not torch.equal(a, b) for a, b in zip(before, found[name], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found["plain"], found["craft"], strict=True))


@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_both_losses_are_trained_and_logged(method, strategy, tmp_path, tokenizer):
    trainer = make_joint(method, tmp_path, tokenizer, strategy=strategy)
    head = [p.detach().clone() for p in trainer.craft_parameters()]
    trainer.train()
    for entry in (e for e in trainer.state.log_history if "loss" in e):
        own, contrastive = entry["loss/craft_sft"], entry["loss/craft_contrast"]
        assert contrastive > 0
        assert entry["loss/craft_total"] == pytest.approx(0.6 * own + 0.4 * contrastive)
        assert entry["loss"] == pytest.approx(entry["loss/craft_total"], rel=1e-3, abs=1e-3)
        assert all(math.isfinite(value) for value in entry.values())
    assert all(not torch.equal(a, b) for a, b in zip(head, trainer.craft_parameters(), strict=True))


def test_the_first_loss_of_dpo_is_ln_2(tmp_path, tokenizer):
    trainer = make_joint("dpo", tmp_path, tokenizer, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss/craft_sft"] == pytest.approx(math.log(2), abs=1e-6)
