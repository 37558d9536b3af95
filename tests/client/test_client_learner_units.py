"""What a learner accumulates: means over the same thing, and errors of a loss that are not the request's."""

import pytest
import torch
from embedded_learners import SELF_ATTENTION, learners, run, token_batch

from inft.client.errors import InvalidRequest
from inft.client.losses.inputs import LossOutput
from params.errors import UserError

NO_DROPOUT = {"lora_config": {"rank": 4, "dropout": 0.0, "target_modules": [SELF_ATTENTION]}}
UNITS = ("tokens", "rows", "pairs")


@pytest.fixture
def new():
    with learners("text") as make:
        yield make


def mean_over(unit):
    def loss(inputs):
        return LossOutput(loss=inputs.logits_BTV.float().square().mean(), denominator=2, unit=unit)

    return loss


@pytest.mark.parametrize("first", UNITS)
@pytest.mark.parametrize("second", UNITS)
def test_means_over_other_things_are_not_put_together(new, first, second):
    learner, batch = new(**NO_DROPOUT), token_batch()
    run(learner, batch, loss=mean_over(first))
    before = learner.state()
    learner.load(before)  # a state keeps what was counted
    if first == second:
        assert run(learner, batch, loss=mean_over(second))["accumulated"] == 2
    else:
        said = f"this loss is a mean over {second}, and the gradient accumulated so far is of a mean over {first}: they"
        with pytest.raises(InvalidRequest, match=said):
            run(learner, batch, loss=mean_over(second))
        assert learner.state().values == before.values
    learner.optim_step({})
    run(learner, batch, loss=mean_over(second))


def test_the_built_in_means_say_what_they_are_over(new):
    learner, batch = new(**NO_DROPOUT), token_batch()
    pairs = {"pair_ids": [0, 0, 1, 1], "chosen": [1, 0, 1, 0]}
    for loss, unit in (("token_ce", "tokens"), ("mse", "rows"), ("margin_ranking", "pairs"), ("contrastive", "pairs")):
        extras = {"mse": {"targets": [0.0] * 4}, "margin_ranking": pairs, "contrastive": pairs}.get(loss, {})
        extras = {key: value for key, value in extras.items() if loss != "contrastive" or key == "pair_ids"}
        run(learner, {**batch, **extras}, loss=loss)
        assert learner.state().values["unit"] == unit
        learner.optim_step({})


def test_a_unit_that_is_none_is_refused(new):
    with pytest.raises(UserError, match="unit is 'images': give one of tokens, rows, pairs"):
        run(new(**NO_DROPOUT), token_batch(), loss=mean_over("images"))


def test_a_full_memory_within_a_loss_is_no_mistake_of_the_request(new):
    def greedy(inputs):
        return LossOutput(loss=inputs.logits_BTV.sum() + torch.zeros(1 << 50).sum())

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run(new(**NO_DROPOUT), token_batch(), loss=greedy)
