"""A learner trains as a plain PyTorch loop does, refuses what cannot be, and goes on from its state bit by bit."""

import math
from dataclasses import replace

import pytest
import torch
from embedded_bases import embedded_base
from embedded_learners import FAMILIES, SELF_ATTENTION, learners, run, same, text_batch, token_batch, weights
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from inft.client.errors import InvalidRequest, NotFinite
from inft.client.learner import prepare
from inft.client.losses.inputs import LossOutput
from inft.client.losses.supervised import supervised_tokens
from inft.models.loading import EMBEDDED, load_model
from params.basic import BasicParams
from params.errors import UserError

NO_DROPOUT = {"lora_config": {"rank": 4, "dropout": 0.0, "target_modules": [SELF_ATTENTION]}}
DROPOUT = {"lora_config": {"rank": 4, "dropout": 0.3, "target_modules": [SELF_ATTENTION]}}
OPTIMIZERS = {
    "adamw": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6},
    "adam": {"name": "adam", "learning_rate": 1e-2, "weight_decay": 0.1},
    "sgd": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.5},
}
TORCH = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@pytest.fixture
def new():
    with learners("text") as make:
        yield make


def plain_peft(family, first):
    """The model as transformers and PEFT have it, with the adapter's first weights."""
    spec = embedded_base(family).spec
    basic = BasicParams(attn_impl="sdpa", dtype="float32")
    model = load_model(spec, str(EMBEDDED / family), basic=basic)
    targets = r".*self_attn\..*_proj"
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    wrapped = get_peft_model(model, lora).eval()
    named = {key.replace(".default.", "."): p for key, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(first[f"adapter.{key}"])
    return wrapped, list(named.values())


def plain_loop(family, first, batches, optimizer):
    """The adapter's weights after a plain training loop with transformers' own loss."""
    model, parameters = plain_peft(family, first)
    settings = {**optimizer}
    kind, limit = TORCH[settings.pop("name")], settings.pop("max_grad_norm", None)
    rate = settings.pop("learning_rate")
    stepper = kind(parameters, lr=rate, **settings)
    for batch in batches:
        model(**batch).loss.backward()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(parameters, limit)
        stepper.step()
        stepper.zero_grad()
    return {f"adapter.{key}": tensor for key, tensor in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_a_plain_loop_whatever_other_clients_do(new, name):
    learner = new(optimizer=OPTIMIZERS[name], **NO_DROPOUT)
    other = new(seed=9, lora_config={"rank": 2, "target_modules": ["up_proj", "q_proj"]})
    first, batches = weights(learner), [token_batch(seed) for seed in range(4)]
    for number, batch in enumerate(batches):
        run(learner, batch)
        run(other, token_batch(100 + number))
        learner.optim_step({})
        other.optim_step({})
    tensors = [{key: torch.tensor(value) for key, value in batch.items()} for batch in batches]
    assert same(weights(learner), plain_loop("text", first, tensors, OPTIMIZERS[name]))
    assert not same(weights(learner), first)


@pytest.mark.parametrize("family", ["llama32", "aya"])
def test_a_vision_language_model_trains_as_in_a_plain_loop(family):
    base = embedded_base(family)
    with learners(family) as new:
        learner = new(optimizer=OPTIMIZERS["adamw"], **NO_DROPOUT)
        first, batches = weights(learner), []
        for seed in range(2):
            batch = prepare(base, learner.config, {"batch": text_batch(family, seed)}).model_batch
            rows = {"input_ids": batch.batch.input_ids_BT, "attention_mask": batch.batch.attention_mask_BT}
            batches.append({**rows, **batch.vision, "labels": batch.batch.labels_BT})
            run(learner, text_batch(family, seed))
            learner.optim_step({})
        assert same(weights(learner), plain_loop(family, first, batches, OPTIMIZERS["adamw"]))


def test_the_first_loss_is_that_of_the_base_and_near_log_v(new):
    learner, batch = new(**DROPOUT), token_batch(tokens=40)
    first = run(learner, batch)
    assert first["tokens_processed"] == 4 * 40 - 2
    assert first["metrics"] == {"tokens": 4 * 37 - 2}
    ids = torch.tensor(batch["input_ids"])
    with torch.no_grad(), learner.base.using(""):
        labels, mask = torch.tensor(batch["labels"]), torch.tensor(batch["attention_mask"])
        plain = learner.base.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert first["loss"] == pytest.approx(float(plain), abs=1e-5)
    assert abs(first["loss"] - math.log(1161)) < 2  # a trained model on random tokens


def test_a_gradient_in_parts_is_that_of_the_whole(new):
    whole, parts = new(**NO_DROPOUT), new(gradient_accumulation_steps=3, **NO_DROPOUT)
    batch = token_batch(rows=6, padded=5)
    at_once = run(whole, batch)
    for number in range(3):
        answer = run(parts, {key: rows[2 * number : 2 * number + 2] for key, rows in batch.items()})
        assert answer["accumulated"] == number + 1
        if number < 2:
            before = parts.state()
            waits = parts.optim_step({})
            assert (waits["applied"], waits["step"], waits["grad_norm"]) == (False, 0, None)
            assert same(before.tensors, parts.state().tensors)
    assert answer["grad_norm"] == pytest.approx(at_once["grad_norm"], rel=1e-5)
    one, other = whole._gradient.gradient(), parts._gradient.gradient()
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-6 * at_once["grad_norm"]
    assert parts.optim_step({})["applied"]


def test_sums_add_up_and_are_not_mixed_with_means(new):
    learner, batch = new(**NO_DROPOUT), token_batch()
    once = run(learner, batch, loss="cross_entropy")["grad_norm"]
    assert run(learner, batch, loss="cross_entropy")["grad_norm"] == pytest.approx(2 * once, rel=1e-6)
    before = learner.state()
    with pytest.raises(InvalidRequest, match=r"this loss is a mean over tokens, and the gradient .* is of a sum"):
        run(learner, batch)
    assert same(before.tensors, learner.state().tensors)
    assert before.values == learner.state().values


def nan_loss(inputs):
    return LossOutput(loss=inputs.logits_BTV.sum() * float("nan"), denominator=1)


def nan_gradient(inputs):
    return LossOutput(loss=(inputs.logits_BTV * 0).sum().sqrt(), denominator=1)


@pytest.mark.parametrize(("loss", "message"), [(nan_loss, "the loss is nan"), (nan_gradient, "gradient is not finite")])
def test_what_is_not_finite_is_refused_and_changes_nothing(new, loss, message):
    learner = new(**DROPOUT)
    run(learner, token_batch())
    before = learner.state()
    with pytest.raises(NotFinite, match=message):
        run(learner, token_batch(1), loss=loss)
    assert same(before.tensors, learner.state().tensors)
    assert before.values == learner.state().values


def test_a_step_into_infinity_is_told(new):
    learner = new(optimizer={"name": "sgd", "learning_rate": 1e30}, **NO_DROPOUT)
    run(learner, token_batch())
    with pytest.raises(NotFinite, match="weights that are not finite"):
        learner.optim_step({})


def test_a_users_loss_gets_hidden_states_and_its_own_failure_is_its_own(new):
    learner, seen = new(**NO_DROPOUT), []

    def hidden(inputs):
        seen.append((inputs.hidden_BTH, inputs.logits_BTV))
        return LossOutput(loss=inputs.hidden_BTH.square().mean(), metrics={"rows": float(inputs.rows)}, denominator=1)

    answer = run(learner, token_batch(), loss=hidden)
    assert answer["metrics"] == {"rows": 4.0}
    states, logits = seen[0]
    head = learner.base.model.get_output_embeddings()
    assert torch.equal(head(states), logits)
    with pytest.raises(InvalidRequest, match=r"loss 'broken' failed: KeyError: 'nothing'"):
        run(learner, token_batch(), loss=broken)
    assert len(head._forward_pre_hooks) == 0


def broken(inputs):
    return inputs.extras["nothing"]


def test_every_built_in_loss_trains(new):
    learner = new(batch_size=8, **NO_DROPOUT)
    batch = token_batch()
    extras = {
        "token_ce": {},
        "margin_ranking": {"pair_ids": [0, 0, 1, 1], "chosen": [1, 0, 0, 1]},
        "contrastive": {"pair_ids": [0, 0, 1, 1]},
        "mse": {"targets": [0.0, 1.0, 2.0, 3.0]},
        "cross_entropy": {"weights": [1.0, 2.0, 0.5, 1.0]},
        "reinforce": {"advantages": [1.0, -1.0, 0.5, 0.0]},
        "ppo": {"advantages": [1.0, -1.0, 0.5, 0.0], "old_logprobs": [[-7.0] * 12] * 4},
    }
    for loss, more in extras.items():
        answer = run(learner, {**batch, **more}, loss=loss)
        assert math.isfinite(answer["loss"]), loss
        assert answer["grad_norm"] > 0, loss
        before = weights(learner)
        assert learner.optim_step({})["applied"]
        assert not same(before, weights(learner)), loss


def test_the_clients_own_loss_has_the_clients_options(new):
    options = {"loss": "margin_ranking", "loss_options": {"margin": 50.0}}
    learner = new(**options, **NO_DROPOUT)
    batch = {**token_batch(), "pair_ids": [0, 0, 1, 1], "chosen": [1, 0, 0, 1]}
    with_option = run(learner, batch)["loss"]
    assert with_option == run(learner, batch, loss="margin_ranking")["loss"]
    assert run(learner, batch, loss_options={"margin": 60.0})["loss"] == pytest.approx(with_option + 10, abs=1e-3)
    learner.optim_step({})
    run(learner, batch, loss="token_ce")  # which has no margin
    with pytest.raises(UserError, match="has no option 'margn'"):
        new(loss="margin_ranking", loss_options={"margn": 1.0})


def test_a_loss_that_is_not_allowed_is_not_imported(new):
    learner = new("elsewhere", loss="no_such_module_here:loss", **NO_DROPOUT)
    with pytest.raises(UserError, match="is not allowed here"):
        prepare(learner.base, learner.config, {"batch": token_batch()}, allowed_losses=("token_ce",))


def test_a_learning_rate_is_for_one_step(new):
    learner, other = (
        new(optimizer={"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}, **NO_DROPOUT) for _ in "ab"
    )
    before = weights(learner)
    run(learner, token_batch())
    answer = learner.optim_step({"learning_rate": 0.0})
    assert (answer["learning_rate"], answer["step"]) == (0.0, 1)
    assert same(before, weights(learner))
    for each in (learner, other):
        run(each, token_batch(1))
    assert learner.optim_step({})["learning_rate"] == 0.1
    other.optim_step({"learning_rate": 0.1})
    assert same(weights(learner), weights(other))
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(InvalidRequest, match="learning_rate is"):
            learner.optim_step({"learning_rate": wrong})


def test_a_step_needs_a_gradient_and_steps_end_at_max_steps(new):
    learner = new(max_steps=1, **NO_DROPOUT)
    with pytest.raises(InvalidRequest, match="there is no gradient to apply"):
        learner.optim_step({})
    run(learner, token_batch())
    learner.optim_step({})
    run(learner, token_batch())
    with pytest.raises(InvalidRequest, match="taken its max_steps of 1"):
        learner.optim_step({})


def test_rows_may_be_as_long_as_the_model_and_the_client_allow(new):
    with pytest.raises(UserError, match="max_length is 5000, and embedded/text takes 4096"):
        new(max_length=5000)
    learner = new(max_length=8, **NO_DROPOUT)
    with pytest.raises(UserError, match="more than the 8 allowed"):
        run(learner, token_batch(tokens=9))
    with pytest.raises(InvalidRequest, match="more than the client's batch_size of 8"):
        run(learner, token_batch(rows=9, tokens=8))


def test_training_leaves_global_state_alone(new):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    learner = new(**DROPOUT)
    with torch.no_grad():
        run(learner, token_batch())
        learner.optim_step({})
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


def train(learner, family, numbers):
    answers = []
    for number in numbers:
        answers.append(run(learner, text_batch(family, number))["loss"])
        if number % 2:
            learner.optim_step({})
    return answers


@pytest.mark.parametrize("stop", [2, 3], ids=["after a step", "within a step"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_from_a_state_bit_by_bit(family, stop):
    with learners(family) as new:
        learner = new(**DROPOUT)
        train(learner, family, range(stop))
        state = learner.state()
        losses = train(learner, family, range(stop, 6))
        resumed = new("another name", **{**DROPOUT, "seed": 1})
        resumed.load(state)
        assert train(resumed, family, range(stop, 6)) == losses
        assert same(learner.state().tensors, resumed.state().tensors)
        assert learner.state().values == resumed.state().values
        learner.load(state)  # back, in the client itself
        assert train(learner, family, range(stop, 6)) == losses
        assert same(learner.state().tensors, resumed.state().tensors)


def test_a_state_is_a_copy(new):
    learner = new(**NO_DROPOUT)
    run(learner, token_batch())
    state = learner.state()
    copied = {name: tensor.clone() for name, tensor in state.tensors.items()}
    learner.load(state)
    learner.optim_step({})
    assert same(copied, state.tensors)


def damaged(state, **values):
    return replace(state, values={**state.values, **values})


@given(
    name=st.sampled_from(["step", "passes", "accumulated", "rows", "denominator", "unit", "private"]),
    value=st.sampled_from([-1, True, 1.5, "3", [], {}, {"accountant": 3}]),
)
def test_values_that_are_none_are_refused_and_change_nothing(damageable, name, value):
    learner, state = damageable
    before = learner.state()
    with pytest.raises(UserError):
        learner.load(damaged(state, **{name: value}))
    assert same(before.tensors, learner.state().tensors)
    assert before.values == learner.state().values


@pytest.fixture(scope="module")
def damageable():
    with learners("text") as make:
        learner = make("damageable", **NO_DROPOUT)
        run(learner, token_batch())
        learner.optim_step({})
        run(learner, token_batch())
        yield learner, learner.state()


def test_tensors_of_another_adapter_or_optimizer_are_refused(new):
    adam, sgd, wide = (
        new(**NO_DROPOUT),
        new(optimizer={"name": "sgd"}, **NO_DROPOUT),
        new(lora_config={"rank": 8, "target_modules": [SELF_ATTENTION]}),
    )
    other = new(lora_config={"rank": 4, "target_modules": ["q_proj"]})
    run(adam, token_batch())
    adam.optim_step({})
    state = adam.state()
    for learner, message in (
        (sgd, "which sgd has not"),
        (wide, "is of another adapter"),
        (other, "not on the same layers"),
    ):
        before = weights(learner)
        with pytest.raises(UserError, match=message):
            learner.load(state)
        assert same(before, weights(learner))
    moment = next(name for name in state.tensors if name.startswith("optimizer.exp_avg."))
    part = {name: tensor for name, tensor in state.tensors.items() if name != moment}
    with pytest.raises(UserError, match="the stored optimizer has only exp_avg_sq, step"):
        adam.load(replace(state, tensors=part))


def test_an_adapter_that_a_batch_does_not_reach_has_no_gradient():
    with learners("llama32") as new:
        learner = new(lora_config={"rank": 2, "target_modules": ["*cross_attn.*_proj", "*self_attn.q_proj"]})
        first = weights(learner)
        run(learner, {"prompt": ["No image."], "completion": ["None at all."]})
        learner.optim_step({})
        changed = {key for key, weight in weights(learner).items() if not torch.equal(weight, first[key])}
        assert changed
        assert all("self_attn" in key for key in changed)


def test_rows_without_a_supervised_token_are_refused(new):
    learner, batch = new(**NO_DROPOUT), token_batch()
    with pytest.raises(UserError, match="no token of the batch is supervised"):
        run(learner, {**batch, "labels": [[-100] * 12] * 4})
    labels = [row if number != 2 else [-100] * 12 for number, row in enumerate(batch["labels"])]
    with pytest.raises(UserError, match="row 2 has no supervised token"):
        run(learner, {**batch, "labels": labels, "targets": [0.0] * 4}, loss="mse")


def test_logprobs_of_the_loss_are_those_of_the_weights(new):
    learner, seen = new(**NO_DROPOUT), []

    def peek(inputs):
        tokens = supervised_tokens(inputs)
        seen.append(tokens.logprobs_N.detach())
        return LossOutput(loss=-tokens.logprobs_N.mean(), denominator=tokens.count)

    batch = token_batch()
    run(learner, batch, loss=peek)
    learner.optim_step({"learning_rate": 1e-2})
    run(learner, batch, loss=peek)
    assert seen[1].mean() > seen[0].mean()
