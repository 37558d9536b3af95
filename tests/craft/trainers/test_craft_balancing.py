"""What balancing and clipping per task do to the gradient that the optimizer is given."""

from typing import Any

import pytest
import torch
from torch import Tensor

Gradients = dict[str, Tensor]
BALANCERS = ["loss_scale", "uncertainty", "gradnorm", "pcgrad"]
STRATEGIES = ["self_align", "paired_dataset"]


@pytest.fixture
def gradient(make_trainer, make_model, rows, pairs, spy) -> Any:
    """The gradient of the first optimizer step in float64: gradient(strategy, seed=…, **config)."""

    def of_one_step(strategy: str, *, seed: int = 0, **config: Any) -> Gradients:
        trainer = make_trainer(
            rows(16, seed=seed),
            pairs(16, seed=seed + 100) if strategy == "paired_dataset" else None,
            model=make_model(dtype=torch.float64, seed=seed),
            **{"max_steps": 1, "max_grad_norm": 0.0, **config},
        )
        watched = type(spy)().watch(trainer)
        trainer.train()
        return watched.gradients[0]

    return of_one_step


def tasks_of(gradient: Any, strategy: str, *, seed: int = 0) -> tuple[Gradients, Gradients]:
    """The weighted gradients of both tasks, from those of two alphas: g(a) = a s + (1 - a) c."""
    both, contrastive = (gradient(strategy, seed=seed, craft_alpha=alpha) for alpha in (0.6, 0.0))
    second = {name: 0.4 * value for name, value in contrastive.items()}
    return {name: value - second[name] for name, value in both.items()}, second


def norm(gradients: Gradients) -> float:
    return sum(float(value.pow(2).sum()) for value in gradients.values()) ** 0.5


def of_model(gradients: Gradients) -> Gradients:
    return {name: value for name, value in gradients.items() if not name.startswith("head.")}


def check(found: Gradients, wanted: Gradients) -> None:
    difference = {name: found[name] - wanted[name] for name in found}
    assert norm(difference) <= 1e-5 * norm(wanted)  # the head and its similarities are float32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_way_of_balancing_gives_weights_of_its_own(make_trainer, rows, pairs, strategy):
    # failure 6: balancing and the clip per task were never called, so that all weights were equal
    found = []
    ways = [{"craft_gradient_balancing": name} for name in ("none", *BALANCERS)]
    for way in [*ways, {"craft_gradient_clip_per_task": True, "craft_gradient_clip_value": 0.01}]:
        trainer = make_trainer(
            rows(40), pairs(24) if strategy == "paired_dataset" else None, max_steps=6, max_grad_norm=0.0, **way
        )
        if "loss_scale" in way.values():
            trainer._craft_balance.balancer.warmup_steps = 2  # otherwise 100 steps in which its weights are 1
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    for i, first in enumerate(found):
        for second in found[:i]:
            assert not torch.equal(first, second)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pcgrad_projects_conflicts_away_and_leaves_the_rest(gradient, strategy):
    conflicts = []
    for seed in (1, 2):  # tasks that agree, and tasks that do not
        sft, contrastive = tasks_of(gradient, strategy, seed=seed)
        dot = sum(float((sft[name] * contrastive[name]).sum()) for name in of_model(sft))
        conflicts.append(dot < 0)
        # Each of the two against the other's original gradient (Yu 2020, algorithm 1): s - (s·c / |c|²) c + c - (c·s /
        # |s|²) s; the head has one task alone.
        of_sft = 1 - min(dot, 0.0) / norm(of_model(sft)) ** 2
        of_contrastive = 1 - min(dot, 0.0) / norm(of_model(contrastive)) ** 2
        wanted = {
            name: sft[name] + contrastive[name]
            if name.startswith("head.")
            else of_sft * sft[name] + of_contrastive * contrastive[name]
            for name in sft
        }
        check(gradient(strategy, seed=seed, craft_gradient_balancing="pcgrad"), wanted)
    assert conflicts == [False, True]


@pytest.mark.parametrize("balancing", ["none", "gradnorm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_task_is_clipped_by_itself(gradient, strategy, balancing):
    sft, contrastive = tasks_of(gradient, strategy)
    # The limit is for the gradient of each loss alone: alpha, .6 and .4 here, stays what it is when both are clipped.
    alone = norm(sft) / 0.6, norm(contrastive) / 0.4
    limit = (alone[0] * alone[1]) ** 0.5  # between the two
    clipped = gradient(
        strategy,
        craft_gradient_clip_per_task=True,
        craft_gradient_clip_value=limit,
        craft_gradient_balancing=balancing,  # gradnorm's weights are 1 in the first step
    )
    factors = [min(1.0, limit / size) for size in alone]
    assert min(factors) < 1
    check(clipped, {name: factors[0] * sft[name] + factors[1] * contrastive[name] for name in sft})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uncertainty_halves_the_gradient_at_first_and_trains_its_weights(gradient, make_trainer, rows, pairs, strategy):
    plain = gradient(strategy)
    check(
        gradient(strategy, craft_gradient_balancing="uncertainty"), {name: value / 2 for name, value in plain.items()}
    )
    trainer = make_trainer(
        rows(40), pairs(24) if strategy == "paired_dataset" else None, craft_gradient_balancing="uncertainty"
    )
    trainer.train()
    values = {name: s.item() for name, s in trainer._craft_balance.balancer.log_vars.items()}
    # d/ds (½ e^{-s} L + s/2) at s = 0 is (1 - L) / 2: a loss above 1 loses weight (Kendall 2018).
    assert values["sft"] > 0
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in trainer._craft_balance.parameters()} <= held


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradnorm_is_fed_the_norms_of_the_unweighted_gradients(
    gradient, make_trainer, make_model, rows, pairs, strategy
):
    sft, contrastive = tasks_of(gradient, strategy)
    trainer = make_trainer(
        rows(16),
        pairs(16, seed=100) if strategy == "paired_dataset" else None,
        model=make_model(dtype=torch.float64),
        craft_gradient_balancing="gradnorm",
        max_steps=1,
        max_grad_norm=0.0,
    )
    fed = []
    update = trainer._craft_balance.balancer.update
    trainer._craft_balance.balancer.update = lambda norms, losses: fed.append((norms, losses)) or update(norms, losses)
    trainer.train()
    (norms, losses), *others = fed
    assert not others
    assert norms["sft"] == pytest.approx(norm(of_model(sft)) / 0.6, rel=1e-5)
    assert norms["contrastive"] == pytest.approx(norm(of_model(contrastive)) / 0.4, rel=1e-5)
    assert losses["sft"] == pytest.approx(trainer.craft_metrics["loss/craft_sft"], rel=1e-5)
    assert losses["contrastive"] == pytest.approx(trainer.craft_metrics["loss/craft_contrast"], rel=1e-5)
    weights = trainer._craft_balance.weights
    assert sum(weights.values()) == pytest.approx(2)
    assert weights["sft"] != 1
