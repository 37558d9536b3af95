"""Private learners: rows clipped one by one, noise once a step, a budget that holds, and a state that remembers."""

import subprocess
import sys

import pytest
import torch
from embedded_learners import (
    DP,
    FAMILIES,
    LANGUAGE_MODEL,
    SELF_ATTENTION,
    learners,
    run,
    same,
    text_batch,
    token_batch,
    weights,
)

from inft.client.errors import InvalidRequest
from inft.client.privacy.accountant import spent_epsilon
from inft.client.privacy.calibrate import BudgetExhausted
from inft.client.privacy.noise import NoiseSource
from params.errors import UserError

LORA = {"lora_config": {"rank": 4, "dropout": 0.0, "target_modules": [SELF_ATTENTION]}}
SGD = {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}


@pytest.fixture
def new():
    with learners("text") as make:
        yield make


def row_gradients(learner, batch):
    """Each row's own gradient [B][parameter], by a loop with transformers' loss."""
    model, parameters = learner.base.model, list(learner._parameters.values())
    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    with torch.enable_grad(), learner.base.using(learner.name):
        return [
            torch.autograd.grad(model(**{key: rows[row : row + 1] for key, rows in tensors.items()}).loss, parameters)
            for row in range(len(tensors["input_ids"]))
        ]


def clipped_sum(gradients, limit):
    norms = [torch.stack([part.norm() for part in row]).norm() for row in gradients]
    scaled = [
        [part * min(1.0, limit / float(norm)) for part in row] for row, norm in zip(gradients, norms, strict=True)
    ]
    return [torch.stack(parts).sum(0) for parts in zip(*scaled, strict=True)], norms


def test_rows_are_clipped_one_by_one_over_all_micro_batches(new):
    learner = new(dp_config={**DP, "max_grad_norm": 16.0}, **LORA)
    batch = token_batch(rows=6)
    wanted, norms = clipped_sum(row_gradients(learner, batch), 16.0)
    for rows in (slice(0, 4), slice(4, 6)):
        answer = run(learner, {key: value[rows] for key, value in batch.items()})
    got = learner._gradient.gradient().values()
    scale = max(float(part.abs().max()) for part in wanted)
    assert max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)) < 1e-6 * scale
    metrics = answer["dp_metrics"]
    assert 0 < sum(float(norm) > 16 for norm in norms) < 6
    assert metrics["clipped_fraction"] == sum(float(norm) > 16 for norm in norms[4:]) / 2
    assert metrics["mean_norm"] == pytest.approx(float(sum(norms[4:])) / 2, rel=1e-4)
    assert answer["accumulated"] == 2
    total = float(torch.stack([part.norm() for part in wanted]).norm())
    assert answer["grad_norm"] == pytest.approx(total / 8, rel=1e-5)  # E[rows] = batch_size


def test_a_step_is_the_noisy_sum_over_the_expected_rows(new):
    learner = new(dp_config=DP, optimizer=SGD, **LORA)
    before, batch = weights(learner), token_batch()
    wanted, _ = clipped_sum(row_gradients(learner, batch), 1.0)
    run(learner, batch)
    learner.optim_step({})
    source = NoiseSource(DP["seed"])
    for (key, after), total in zip(weights(learner).items(), wanted, strict=True):
        noise = source.normal(total.numel()).view(total.shape)
        mean = (total.double() + noise) / 8
        torch.testing.assert_close(after.double(), before[key].double() - 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_an_empty_draw_is_a_step_of_noise_that_counts(new):
    learner = new(dp_config=DP, **LORA)
    first = weights(learner)
    answer = learner.optim_step({})
    assert answer["applied"]
    assert answer["step"] == 1
    assert answer["grad_norm"] > 0
    assert not same(first, weights(learner))
    metrics = answer["dp_metrics"]
    assert metrics["steps"] == 1
    assert not metrics["private"]
    assert metrics["epsilon"] == spent_epsilon(noise_multiplier=1.0, sample_rate=8 / 200, steps=1, delta=1e-5)
    assert learner.dp_metrics() == metrics


def test_a_step_has_no_more_rows_than_there_are(new):
    learner = new(dp_config={**DP, "dataset_size": 6, "sample_rate": 0.5, "target_delta": 1e-5}, **LORA)
    run(learner, token_batch(rows=4))
    learner.load(learner.state())
    before = learner.state()
    with pytest.raises(InvalidRequest, match=r"8 rows since the last step, and dp_config\.dataset_size is 6"):
        run(learner, token_batch(1, rows=4))
    assert same(before.tensors, learner.state().tensors)
    assert before.values == learner.state().values
    run(learner, token_batch(1, rows=2))
    learner.optim_step({})
    run(learner, token_batch(1, rows=6))


def test_a_step_without_noise_is_not_private(new):
    learner = new(dp_config={**DP, "seed": None, "target_epsilon": None}, **LORA)
    run(learner, token_batch())
    assert learner.optim_step({})["dp_metrics"]["private"]
    run(learner, token_batch())
    assert not learner.optim_step({"apply_dp_noise": False})["dp_metrics"]["private"]
    state = learner.state()
    learner.load(state)
    assert not learner.optim_step({})["dp_metrics"]["private"]


def test_the_budget_is_enforced_before_the_step(new):
    most = spent_epsilon(noise_multiplier=1.0, sample_rate=8 / 200, steps=3, delta=1e-5)
    learner = new(dp_config={**DP, "target_epsilon": most + 1e-3}, **LORA)
    for _ in range(3):
        run(learner, token_batch())
        learner.optim_step({})
    run(learner, token_batch())
    before = learner.state()
    with pytest.raises(BudgetExhausted, match="the privacy budget is exhausted after 3 steps"):
        learner.optim_step({})
    assert same(before.tensors, learner.state().tensors)
    assert before.values == learner.state().values


def test_a_step_without_noise_is_one_of_unbounded_epsilon(new):
    learner = new(dp_config=DP, **LORA)
    run(learner, token_batch())
    with pytest.raises(BudgetExhausted, match="would bring it to inf"):
        learner.optim_step({"apply_dp_noise": False})
    unlimited = new(dp_config=DP | {"target_epsilon": None}, optimizer=SGD, **LORA)
    before = weights(unlimited)
    wanted, _ = clipped_sum(row_gradients(unlimited, token_batch()), 1.0)
    run(unlimited, token_batch())
    metrics = unlimited.optim_step({"apply_dp_noise": False})["dp_metrics"]
    assert (metrics["epsilon"], metrics["target_epsilon"]) == (None, None)
    for (key, after), total in zip(weights(unlimited).items(), wanted, strict=True):
        torch.testing.assert_close(after, before[key] - 0.1 * total / 8, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["contrastive", "margin_ranking"])
def test_a_loss_that_mixes_rows_is_refused(new, loss):
    learner = new(dp_config=DP, **LORA)
    before = learner.state()
    batch = {**token_batch(), "pair_ids": [0, 0, 1, 1], "chosen": [0, 1, 0, 1]}
    with pytest.raises(InvalidRequest, match=f"loss '{loss}' has no loss of each row on its own"):
        run(learner, batch, loss=loss)
    assert before.values == learner.state().values
    assert all(parameter.grad is None for parameter in learner.base.model.parameters())


def test_noise_is_calibrated_to_the_steps_and_stands_in_the_configuration(new):
    dp = {"dataset_size": 200, "target_epsilon": 4.0, "accountant": "rdp"}
    learner = new(dp_config=dp, max_steps=20, **LORA)
    noise = learner.config.dp.noise_multiplier
    spent = spent_epsilon(noise_multiplier=noise, sample_rate=8 / 200, steps=20, delta=1e-5, accountant="rdp")
    assert 0.99 * 4 <= spent <= 4
    assert learner.dp_metrics()["noise_multiplier"] == noise
    assert learner.dp_metrics()["private"]


def test_two_private_clients_and_a_plain_one_share_a_base(new):
    one, other, plain = new(dp_config=DP, **LORA), new(seed=2, dp_config={**DP, "seed": 6}), new(seed=3)
    alone = new("alone", dp_config=DP, **LORA)
    for number in range(2):
        for learner in (one, other, plain):
            run(learner, token_batch(number))
            learner.optim_step({})
    for number in range(2):
        run(alone, token_batch(number))
        alone.optim_step({})
    assert same(weights(one), weights(alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_private_training_goes_on_from_a_state_bit_by_bit(family):
    lora = {"lora_config": {"rank": 4, "dropout": 0.2, "target_modules": [LANGUAGE_MODEL.get(family, SELF_ATTENTION)]}}
    with learners(family) as new:
        learner, resumed = (new(dp_config=DP, **lora) for _ in "ab")
        for number in range(2):
            run(learner, text_batch(family, number))
            learner.optim_step({})
        run(learner, text_batch(family, 2))
        resumed.load(learner.state())
        for each in (learner, resumed):
            each.optim_step({})
            run(each, text_batch(family, 3))
        assert same(learner.state().tensors, resumed.state().tensors)
        assert learner.state().values == resumed.state().values
        assert learner.dp_metrics() == resumed.dp_metrics()
        assert learner.dp_metrics()["steps"] == 3


def test_what_was_spent_stays_spent_when_a_state_is_loaded(new):
    learner, other = new(dp_config=DP, **LORA), new(seed=2, dp_config={**DP, "noise_multiplier": 2.0}, **LORA)
    learner.optim_step({})
    early = learner.state()
    for _ in range(2):
        learner.optim_step({})
        other.optim_step({})
    learner.load(early, keep_privacy=True)
    assert (learner.step, learner.dp_metrics()["steps"]) == (1, 3)
    other.load(early)
    assert (other.step, other.dp_metrics()["steps"]) == (1, 3)
    fresh = new(dp_config=DP, **LORA)
    fresh.load(early)
    assert fresh.dp_metrics()["steps"] == 1
    assert fresh.dp_metrics()["epsilon"] < other.dp_metrics()["epsilon"]


def test_states_of_another_kind_of_privacy_are_refused(new):
    private, plain = new(dp_config=DP, **LORA), new(**LORA)
    unseeded = new(dp_config={**DP, "seed": None}, **LORA)
    with pytest.raises(UserError, match="the state is a private client's"):
        plain.load(private.state())
    with pytest.raises(UserError, match="none of a private client"):
        private.load(plain.state())
    with pytest.raises(UserError, match="give the same dp seed"):
        unseeded.load(private.state())
    state = private.state()
    for noise in ("?", "AAAA", 3):
        state.values["private"]["noise"] = noise
        with pytest.raises(UserError, match="none of a generator"):
            private.load(state)


@pytest.mark.slow
def test_opacus_is_loaded_by_the_first_private_learner_and_not_before():
    script = (
        "import sys\n"
        "from embedded_learners import DP, learners, run, token_batch\n"
        "with learners() as new:\n"
        "    plain = new(); run(plain, token_batch()); plain.optim_step({})\n"
        "    assert 'opacus' not in sys.modules\n"
        "    new(dp_config=DP)\n"
        "    assert 'opacus' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
