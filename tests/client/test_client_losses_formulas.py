"""Each loss equals its formula in loops, loss and gradient, in float64."""

import math

import plain_client_losses as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inft.client.losses import loss_names, resolve_loss
from inft.client.losses.inputs import IGNORED, LossInputs, evaluate_loss
from params.errors import UserError

torch.set_num_threads(1)

SEPARABLE = ("token_ce", "mse", "cross_entropy", "importance_sampling", "ppo", "cispo", "reinforce")


@st.composite
def batches(draw: st.DrawFn, pairs: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits in float64, labels with at least one supervised token in each row, and every extra."""
    rows = 2 * draw(st.integers(1, 2)) if pairs else draw(st.integers(1, 4))
    length, vocabulary = draw(st.integers(1, 5)), draw(st.integers(2, 7))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = 2 * torch.randn(rows, length, vocabulary, generator=random, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows, length), generator=random)
    kept = torch.rand(rows, length, generator=random) < draw(st.floats(0.2, 1))
    kept[torch.arange(rows), torch.randint(length, (rows,), generator=random)] = True
    grid = {"generator": random, "dtype": torch.float64}
    extras = {
        "advantages": torch.randn(rows, length, **grid),
        "old_logprobs": -3 * torch.rand(rows, length, **grid),
        "targets": torch.randn(rows, length, vocabulary, **grid) if draw(st.booleans()) else torch.randn(rows, **grid),
        "pair_ids": torch.arange(rows) // 2,
        "chosen": torch.arange(rows) % 2,
    }
    extras["weights"] = extras["advantages"]
    return logits.requires_grad_(), labels.masked_fill(~kept, IGNORED), extras


def inputs_of(logits: Tensor, labels: Tensor, extras: dict[str, Tensor], **more: Tensor) -> LossInputs:
    mask = more.pop("mask", torch.ones_like(labels))
    return LossInputs(logits_BTV=logits, labels_BT=labels, attention_mask_BT=mask, extras=extras, **more)


def assert_equal(loss: Tensor, expected: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (wanted,) = torch.autograd.grad(expected, leaf, allow_unused=True)
    torch.testing.assert_close(gradient, torch.zeros_like(leaf) if wanted is None else wanted, rtol=1e-9, atol=1e-11)


def small(rows: int = 4, length: int = 3, vocabulary: int = 5, hidden: int = 6) -> LossInputs:
    random = torch.Generator().manual_seed(1)
    ids = torch.arange(rows)
    return LossInputs(
        logits_BTV=torch.randn(rows, length, vocabulary, generator=random).requires_grad_(),
        labels_BT=torch.randint(vocabulary, (rows, length), generator=random),
        attention_mask_BT=torch.ones(rows, length, dtype=torch.int64),
        hidden_BTH=torch.randn(rows, length, hidden, generator=random).requires_grad_(),
        extras={
            "advantages": torch.randn(rows, generator=random),
            "old_logprobs": -torch.rand(rows, length, generator=random),
            "targets": torch.randn(rows, generator=random),
            "pair_ids": ids // 2,
            "chosen": ids % 2,
        },
    )


@settings(max_examples=25, deadline=None)
@given(batches())
def test_token_ce_equals_its_formula(batch: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    output = resolve_loss("token_ce")(inputs_of(*batch))
    assert_equal(output.loss, plain.token_ce(*batch), batch[0])
    for row, own in enumerate(output.per_example_B):
        alone = plain.token_ce(batch[0][row : row + 1], batch[1][row : row + 1], {})
        torch.testing.assert_close(own, alone, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(batches(pairs=True), st.floats(0, 5))
def test_margin_ranking_equals_its_formula(batch: tuple[Tensor, Tensor, dict[str, Tensor]], margin: float) -> None:
    output = resolve_loss("margin_ranking", options={"margin": margin})(inputs_of(*batch))
    assert_equal(output.loss, plain.margin_ranking(*batch, margin=margin), batch[0])
    torch.testing.assert_close(output.per_example_B.mean(), output.loss)


@settings(max_examples=25, deadline=None)
@given(batches())
def test_mse_equals_its_formula(batch: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    output = resolve_loss("mse")(inputs_of(*batch))
    assert_equal(output.loss, plain.mse(*batch), batch[0])


@pytest.mark.parametrize("name", plain.POLICY)
def test_each_objective_equals_its_sum(name: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(batches())
    def check(batch: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
        output = resolve_loss(name)(inputs_of(*batch))
        assert_equal(output.loss, plain.POLICY[name](*batch), batch[0])
        torch.testing.assert_close(output.per_example_B.sum(), output.loss)

    check()


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**20), st.floats(0.05, 2))
def test_contrastive_equals_its_formula(pairs: int, length: int, seed: int, temperature: float) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    hidden = torch.randn(rows, length, 5, generator=random, dtype=torch.float64).requires_grad_()
    mask = (torch.rand(rows, length, generator=random) < 0.6).long()
    mask[torch.arange(rows), torch.randint(length, (rows,), generator=random)] = 1
    ids = torch.arange(pairs).repeat(2)[torch.randperm(rows, generator=random)]
    logits, labels = torch.zeros(rows, length, 2), torch.zeros(rows, length, dtype=torch.int64)
    given_inputs = inputs_of(logits, labels, {"pair_ids": ids}, mask=mask, hidden_BTH=hidden)
    output = resolve_loss("contrastive", options={"temperature": temperature})(given_inputs)
    assert_equal(output.loss, plain.contrastive(hidden, mask, ids, temperature), hidden)
    torch.testing.assert_close(output.per_example_B.mean(), output.loss)


def test_every_built_in_loss_works_on_tensors() -> None:
    """Three of the original's four raise."""
    for name in [name for name in loss_names() if name.isidentifier()]:
        given_inputs = small()
        output = evaluate_loss(resolve_loss(name), given_inputs, name=name)
        output.loss.backward()
        leaf = given_inputs.hidden_BTH if name == "contrastive" else given_inputs.logits_BTV
        assert leaf.grad.abs().sum() > 0, name
        assert output.per_example_B.shape == (4,), name
        assert all(math.isfinite(value) for value in output.metrics.values()), name


@pytest.mark.parametrize("name", SEPARABLE)
def test_an_examples_own_loss_has_a_gradient_in_its_row_alone(name: str) -> None:
    """The original clips one scalar of the whole batch."""
    given_inputs = small()
    output = resolve_loss(name)(given_inputs)
    assert output.separable
    for row in range(4):
        (gradient,) = torch.autograd.grad(output.per_example_B[row], given_inputs.logits_BTV, retain_graph=True)
        touched = gradient.abs().sum((1, 2)) > 0
        assert not touched[torch.arange(4) != row].any()


@pytest.mark.parametrize("name", ["margin_ranking", "contrastive"])
def test_losses_of_pairs_say_that_rows_do_not_stand_alone(name: str) -> None:
    assert not resolve_loss(name)(small()).separable


@pytest.mark.parametrize("name", ["reinforce", "importance_sampling", "ppo", "cispo"])
def test_gradients_depend_on_the_advantages(name: str) -> None:
    """The original drops them: -A gave the gradient of A."""
    given_inputs = small()
    gradients = []
    for factor in (1.0, -1.0, 0.0):
        extras = {**given_inputs.extras, "advantages": factor * torch.tensor([1.0, 2.0, -1.0, 0.5])}
        extras["old_logprobs"] = (
            given_inputs.logits_BTV.detach().log_softmax(-1).gather(2, given_inputs.labels_BT.unsqueeze(2))[..., 0]
        )
        output = resolve_loss(name)(inputs_of(given_inputs.logits_BTV, given_inputs.labels_BT, extras))
        gradients.append(torch.autograd.grad(output.loss, given_inputs.logits_BTV)[0])
    assert gradients[0].abs().sum() > 0.1
    torch.testing.assert_close(gradients[1], -gradients[0])
    assert not gradients[2].any()
    missing = {key: value for key, value in given_inputs.extras.items() if key != "advantages"}
    with pytest.raises(UserError, match="no 'advantages'"):
        resolve_loss(name)(inputs_of(given_inputs.logits_BTV, given_inputs.labels_BT, missing))


def test_all_four_ratio_objectives_have_one_gradient_at_the_sampling_weights() -> None:
    """At r = 1 policy gradient, importance sampling, PPO and CISPO are the same step."""
    given_inputs = small()
    old = given_inputs.logits_BTV.detach().log_softmax(-1).gather(2, given_inputs.labels_BT.unsqueeze(2))[..., 0]
    inputs = inputs_of(given_inputs.logits_BTV, given_inputs.labels_BT, {**given_inputs.extras, "old_logprobs": old})
    names = ("reinforce", "importance_sampling", "ppo", "cispo")
    first, *others = [torch.autograd.grad(resolve_loss(name)(inputs).loss, inputs.logits_BTV)[0] for name in names]
    for other in others:
        torch.testing.assert_close(other, first)


def test_one_advantage_for_a_row_is_that_of_each_of_its_tokens() -> None:
    given_inputs = small()
    spread = {**given_inputs.extras, "advantages": given_inputs.extras["advantages"].unsqueeze(1).expand(4, 3)}
    whole = resolve_loss("ppo")(given_inputs).loss
    assert whole == resolve_loss("ppo")(inputs_of(given_inputs.logits_BTV, given_inputs.labels_BT, spread)).loss


def test_what_stands_at_unsupervised_positions_has_no_influence() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    logits[0, 1:] = torch.nan
    logits.requires_grad_()
    labels = torch.tensor([[1, IGNORED, IGNORED], [2, 0, 3]])
    old = torch.full((2, 3), -1.0).masked_fill(labels == IGNORED, torch.nan)
    extras = {"advantages": torch.ones(2), "old_logprobs": old, "targets": torch.ones(2)}
    for name in SEPARABLE:
        loss = resolve_loss(name)(inputs_of(logits, labels, extras)).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite(), name
        assert gradient.isfinite().all(), name
        assert not gradient[0, 1:].any(), name


@pytest.mark.parametrize("filler", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("left_out", [0, 1, 12])
def test_the_result_is_the_same_however_few_positions_are_unsupervised(filler, left_out) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 50, generator=random).requires_grad_()
    labels = torch.randint(50, (2, 12), generator=random)
    labels.view(-1)[24 - left_out :] = IGNORED
    where = labels != IGNORED
    with torch.no_grad():
        logits[~where] = filler
    loss = resolve_loss("token_ce")(inputs_of(logits, labels, {})).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    kept = logits.detach()[where].requires_grad_()
    plain = torch.nn.functional.cross_entropy(kept, labels[where])
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[where], torch.autograd.grad(plain, kept)[0], rtol=1e-5, atol=1e-9)
    assert not gradient[~where].any()


def test_half_precision_logits_are_summed_in_float32() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 500, generator=random).bfloat16()
    labels = torch.randint(500, (2, 3), generator=random)
    half = resolve_loss("token_ce")(inputs_of(logits, labels, {}))
    exact = resolve_loss("token_ce")(inputs_of(logits.double(), labels, {}))
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss.double(), exact.loss, rtol=1e-6, atol=0)


def test_a_uniform_model_has_the_logarithm_of_its_vocabulary() -> None:
    output = resolve_loss("token_ce")(inputs_of(torch.zeros(2, 3, 50), torch.ones(2, 3, dtype=torch.int64), {}))
    assert float(output.loss) == pytest.approx(math.log(50), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("token_ce", {"labels_BT": torch.tensor([[1, 2, 0]] * 2 + [[1, 5, 0]] * 2)}, "row 2, position 1 is 5.*of 5"),
        ("token_ce", {"labels_BT": torch.full((4, 3), -1)}, "row 0, position 0 is -1"),
        ("token_ce", {"labels_BT": torch.full((4, 3), IGNORED)}, "no token of the batch is supervised"),
        ("mse", {"labels_BT": torch.tensor([[1, 1, 1]] * 3 + [[IGNORED] * 3])}, "row 3 has no supervised token"),
        ("mse", {"targets": torch.ones(3)}, "targets has the shape .3.: give one value for each of 4 rows"),
        ("mse", {"targets": torch.ones(4, 3, 2)}, r"targets have the shape \[4, 3, 2\]"),
        ("mse", {"targets": torch.tensor([1, 1, torch.nan, 1])}, "targets: row 2 is not finite"),
        ("mse", {"targets": None}, "no 'targets'"),
        ("ppo", {"old_logprobs": None}, "no 'old_logprobs'"),
        ("ppo", {"old_logprobs": torch.zeros(4)}, r"old_logprobs has the shape \[4\]: give \[4, 3\]"),
        ("ppo", {"old_logprobs": torch.tensor([[0.0] * 3] * 2 + [[0, torch.inf, 0]] + [[0.0] * 3])},
         "old_logprobs: row 2, position 1 is inf"),
        ("reinforce", {"advantages": torch.ones(2, 3)}, r"advantages has the shape \[2, 3\]: give \[4\] or \[4, 3\]"),
        ("margin_ranking", {"pair_ids": torch.tensor([0, 0, 1, 2])}, "pair_ids: 1 stands in row 2"),
        ("margin_ranking", {"pair_ids": torch.tensor([0, 0, 0, 0])}, "rows 0, 1, 2, 3"),
        ("margin_ranking", {"chosen": torch.tensor([0, 1, 1, 1])}, "chosen: rows 2 and 3"),
        ("margin_ranking", {"chosen": None}, "no 'chosen'"),
        ("contrastive", {"hidden_BTH": None}, "output_hidden_states"),
        ("contrastive", {"attention_mask_BT": torch.tensor([[1] * 3, [0] * 3, [1] * 3, [1] * 3])},
         "row 1 of the batch"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(name: str, changed: dict[str, Tensor | None], message: str) -> None:
    given_inputs = small()
    fields = {key: getattr(given_inputs, key) for key in ("logits_BTV", "labels_BT", "attention_mask_BT", "hidden_BTH")}
    extras = dict(given_inputs.extras)
    for key, value in changed.items():
        if key in fields:
            fields[key] = value
        elif value is None:
            del extras[key]
        else:
            extras[key] = value
    with pytest.raises(UserError, match=message):
        resolve_loss(name)(LossInputs(**fields, extras=extras))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logits_BTV", torch.zeros(2, 3)),
        ("labels_BT", torch.zeros(2, 4, dtype=torch.int64)),
        ("labels_BT", torch.zeros(2, 3)),
        ("attention_mask_BT", torch.ones(3, 3)),
        ("hidden_BTH", torch.ones(2, 4, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(field: str, value: Tensor) -> None:
    fields = {
        "logits_BTV": torch.zeros(2, 3, 4),
        "labels_BT": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask_BT": torch.ones(2, 3),
    }
    with pytest.raises(UserError, match=r"shape|rows and tokens|whole numbers"):
        LossInputs(**{**fields, field: value})


@pytest.mark.parametrize("options", [{"clip_low": 1.3}, {"clip_high": 0.5}, {"clip_low": -1.0}])
def test_clip_bounds_in_the_wrong_order_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="clip_low"):
        resolve_loss("ppo", options=options)(small())
