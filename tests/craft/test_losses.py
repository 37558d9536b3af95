"""InfoNCE against the loops, its golden values, the head, the temperature, and the module around them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_infonce import info_nce_by_loops
from torch import Tensor

import craft.infonce
import craft.losses
from craft.losses import InfoNCELoss, ProjectionHead, combine_craft_losses, info_nce

anything = settings(deadline=None, max_examples=50, derandomize=True)


def units(rows: int, generator: torch.Generator, size: int = 5) -> Tensor:
    return F.normalize(torch.randn(rows, size, dtype=torch.float64, generator=generator), dim=-1)


@anything
@given(
    rows=st.integers(1, 4),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    queued=st.integers(0, 9),
    hard=st.integers(0, 3),
    weight=st.sampled_from([1.0, 0.2, 7.0]),
    share_excluded=st.sampled_from([None, 0.0, 0.4, 1.0]),
    symmetric=st.booleans(),
    own_way_back=st.booleans(),
    temperature=st.sampled_from([0.005, 0.05, 1.0]),
    block=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 99),
)
def test_info_nce_equals_the_loops_in_value_and_every_gradient(
    rows: int,
    before: int,
    after: int,
    queued: int,
    hard: int,
    weight: float,
    share_excluded: float | None,
    symmetric: bool,
    own_way_back: bool,
    temperature: float,
    block: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = before + rows + after
    all_anchors, positives, negatives = (units(n, generator) for n in (columns, columns, hard))
    queue = units(queued, generator)

    def excluded(width: int) -> Tensor | None:
        return None if share_excluded is None else torch.rand(rows, width, generator=generator) < share_excluded

    masks = [excluded(width) for width in (columns, queued, hard)]
    masks.append(excluded(columns) if symmetric and own_way_back else None)

    def run(fast: bool) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in (all_anchors, positives, negatives)]
        log_temperature = torch.tensor(math.log(temperature), dtype=torch.float64, requires_grad=True)
        tau = log_temperature.exp()
        anchors = leaves[0][before : before + rows]
        back = leaves[0] if symmetric else None
        if fast:
            losses = info_nce(
                anchors, leaves[1], temperature=tau, offset=before, excluded_BM=masks[0], queue_KD=queue,
                excluded_BK=masks[1], negatives_ND=leaves[2], excluded_BN=masks[2], negative_weight=weight,
                all_anchors_MD=back, excluded_back_BM=masks[3],
            ).losses_B  # fmt: skip
        else:
            losses = info_nce_by_loops(
                anchors, leaves[1], temperature=tau, offset=before, excluded=masks[0], queue=queue,
                excluded_queue=masks[1], negatives=leaves[2], excluded_negatives=masks[2], negative_weight=weight,
                all_anchors=back, excluded_back=masks[3],
            )  # fmt: skip
        weights = torch.arange(1, rows + 1, dtype=torch.float64)
        inputs = [*leaves, log_temperature]
        gradients = torch.autograd.grad((losses * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        return losses, list(gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(craft.infonce, "QUEUE_BLOCK", block)
        losses, gradients = run(fast=True)
    expected_losses, expected_gradients = run(fast=False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-12)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-11)


def test_golden_two_orthogonal_pairs() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    assert info_nce(eye, eye, temperature=0.5).losses_B.tolist() == pytest.approx([0.1269280110429725] * 2, abs=1e-15)


def test_golden_four_identical_pairs_and_twelve_identical_queue_entries() -> None:
    same = torch.tensor([[1.0, 0]], dtype=torch.float64).expand(4, 2)
    plain = info_nce(same, same, temperature=0.05)
    queued = info_nce(same, same, temperature=0.05, queue_KD=same.repeat(3, 1))
    assert plain.losses_B.tolist() == pytest.approx([math.log(4)] * 4, abs=1e-14)
    assert queued.losses_B.tolist() == pytest.approx([math.log(16)] * 4, abs=1e-14)
    assert not plain.correct_B.any()  # a tie is not a hit


def test_golden_one_hard_negative_that_counts_twice() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    alone = info_nce(eye[:1], eye[:1], temperature=0.5, negatives_ND=eye[1:], negative_weight=2.0)
    assert alone.losses_B.tolist() == pytest.approx([math.log1p(2 * math.exp(-2))], abs=1e-15)
    assert alone.correct_B.all()  # the weight is the loss's, not the similarity's
    with pytest.raises(ValueError, match="negative_weight is 0"):
        info_nce(eye, eye, temperature=0.5, negatives_ND=eye, negative_weight=0)


def test_golden_symmetric() -> None:
    anchors = torch.eye(2, dtype=torch.float64)
    positives = torch.tensor([[0.5, math.sqrt(0.75)]] * 2, dtype=torch.float64)
    one_way = info_nce(anchors, positives, temperature=0.1).losses_B.mean()
    both = info_nce(anchors, positives, temperature=0.1, all_anchors_MD=anchors).losses_B.mean()
    assert one_way.item() == pytest.approx(0.6931471805599454, abs=1e-13)
    assert both.item() == pytest.approx(1.2743374155739458, abs=1e-13)


def test_correct_and_contrasted_say_whether_the_positive_wins_and_against_anything() -> None:
    eye = torch.eye(3)
    everything = torch.ones(3, 3, dtype=torch.bool)
    mask = torch.tensor([[False, False, False], [True, True, True], [False, True, True]])
    found = info_nce(eye, eye, temperature=0.05, excluded_BM=mask)
    assert found.contrasted_B.tolist() == [True, False, True]
    assert found.losses_B[1] == 0
    beaten = info_nce(eye, -eye, temperature=0.05)
    assert not beaten.correct_B.any()
    queued = info_nce(eye, eye, temperature=0.05, excluded_BM=everything, queue_KD=eye[:1])
    assert queued.correct_B.tolist() == [False, True, True]  # the queue holds the first anchor's own vector
    assert queued.contrasted_B.all()
    alone = info_nce(eye, eye, temperature=0.05, excluded_BM=everything, queue_KD=eye, excluded_BK=everything)
    assert not alone.contrasted_B.any()


def test_an_anchor_without_negatives_has_a_loss_and_a_gradient_of_0() -> None:
    anchors, positives = torch.eye(2).requires_grad_(), torch.eye(2).requires_grad_()
    everything = torch.ones(2, 2, dtype=torch.bool)
    found = info_nce(
        anchors, positives, temperature=0.005, excluded_BM=everything, queue_KD=torch.eye(2), excluded_BK=everything,
        negatives_ND=torch.eye(2), excluded_BN=everything, all_anchors_MD=anchors,
    )  # fmt: skip
    found.losses_B.sum().backward()
    assert found.losses_B.tolist() == [0, 0]
    assert not anchors.grad.any()
    assert not positives.grad.any()


def test_a_rank_without_rows_still_backs_the_others_columns() -> None:
    positives = torch.eye(2).requires_grad_()
    found = info_nce(torch.zeros(0, 2), positives, temperature=0.05, offset=2, queue_KD=torch.eye(2))
    found.losses_B.sum().backward()
    assert positives.grad.tolist() == [[0, 0], [0, 0]]


def test_the_mask_of_the_caller_is_left_alone() -> None:
    mask = torch.zeros(2, 2, dtype=torch.bool)
    info_nce(torch.eye(2), torch.eye(2), temperature=0.05, excluded_BM=mask)
    assert not mask.any()


def test_a_tiny_loss_keeps_its_digits_in_float32() -> None:
    anchors = torch.eye(2)
    loss = info_nce(anchors, anchors, temperature=0.05).losses_B
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-20))] * 2, rel=1e-6)


def test_float32_is_near_float64_over_a_long_queue() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, positives, queue = (units(n, generator, 32) for n in (4, 4, 5000))
    results = []
    for dtype in (torch.float32, torch.float64):
        a, p = anchors.to(dtype).requires_grad_(), positives.to(dtype).requires_grad_()
        losses = info_nce(a, p, temperature=0.05, queue_KD=queue.to(dtype)).losses_B
        losses.mean().backward()
        results.append([losses.double(), a.grad.double(), p.grad.double()])
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_loss_and_half_inputs_change_nothing(dtype: torch.dtype) -> None:
    # failure 15: bfloat16 similarities move the logits by more than a tenth
    generator = torch.Generator().manual_seed(0)
    a, p, q = (units(n, generator, 64).to(dtype) for n in (6, 6, 50))
    plain = info_nce(a.float(), p.float(), temperature=0.05, queue_KD=q.float(), all_anchors_MD=a.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(a, p, temperature=0.05, queue_KD=q, all_anchors_MD=a)
    assert found.losses_B.dtype == torch.float32
    assert torch.equal(found.losses_B, plain.losses_B)


def test_a_queue_waits_for_the_backward_pass_with_nothing_of_its_size() -> None:
    saved: list[int] = []
    anchors, queue = torch.eye(4).requires_grad_(), torch.eye(4).repeat(500, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        info_nce(anchors, torch.eye(4), temperature=0.05, queue_KD=queue)
    assert max(saved) <= 16


def test_columns_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="2 anchors from column 1 on"):
        info_nce(torch.eye(2), torch.eye(2), temperature=0.05, offset=1)
    with pytest.raises(ValueError, match="there are 0"):
        info_nce(torch.zeros(1, 2), torch.zeros(0, 2), temperature=0.05)


def test_no_anchors_have_no_losses_and_a_graph() -> None:
    anchors = torch.zeros(0, 2, requires_grad=True)
    found = info_nce(anchors, anchors, temperature=0.05, all_anchors_MD=anchors, queue_KD=torch.eye(2))
    assert found.losses_B.shape == found.correct_B.shape == found.contrasted_B.shape == (0,)
    found.losses_B.sum().backward()
    assert anchors.grad.shape == (0, 2)


# The head


def test_the_head_gives_unit_vectors_in_float32_whatever_comes_in() -> None:
    # failure 15: a bfloat16 model met a float32 head
    head = ProjectionHead(8, output_dim=4)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    out = head(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(3))
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(x), out)


def test_the_head_has_the_layers_and_names_of_before() -> None:
    assert list(ProjectionHead(8, 6, 4, 0.1).state_dict()) == [
        "net.0.weight",
        "net.0.bias",
        "net.3.weight",
        "net.3.bias",
    ]
    assert [tuple(p.shape) for p in ProjectionHead(8, output_dim=4).parameters()] == [(8, 8), (8,), (4, 8), (4,)]
    head = ProjectionHead(8, 64, 4, dropout=0.5)  # of six units, the same ones fall away once in 64 times
    x = torch.ones(1, 8)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


# The module


def pair(rows: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchor, positive = torch.randn(rows, 5, 8, generator=generator), torch.randn(rows, 3, 8, generator=generator)
    return anchor, positive, torch.ones(rows, 5), torch.ones(rows, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("pooling", ["last_token", "mean", "cls", "weighted_mean"])
def test_the_module_is_pooling_head_and_info_nce(pooling: Any, symmetric: bool, reduction: str) -> None:
    loss = InfoNCELoss(0.1, reduction, 8, 4, pooling, symmetric=symmetric).double()
    anchor, positive, mask_a, mask_p = (x.double() for x in pair())
    pooled = [craft.losses.pool_hidden_states(x, m, pooling) for x, m in ((anchor, mask_a), (positive, mask_p))]
    a, p = (loss._project(x) for x in pooled)
    expected = info_nce_by_loops(a, p, temperature=0.1, all_anchors=a if symmetric else None)
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(loss(anchor, positive, mask_a, mask_p), expected)
    torch.testing.assert_close(loss.forward_from_pooled(*pooled), expected)


def test_additional_negatives_enter_with_gradient_when_they_have_one() -> None:
    loss = InfoNCELoss(hidden_size=8, projection_dim=4)
    negatives = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    constant, details = loss(*pair(), additional_negatives=negatives, return_details=True)
    trained = loss(*pair(), additional_negatives=negatives.requires_grad_())
    trained.backward()
    torch.testing.assert_close(constant, trained)
    torch.testing.assert_close(constant, F.cross_entropy(details["logits"], torch.arange(4)))
    assert negatives.grad.abs().sum() > 0
    assert not any(value.requires_grad for value in details.values())
    assert set(details) == {"anchor_embeddings", "positive_embeddings", "logits", "temperature"}


def test_rows_of_one_sample_are_no_negatives_of_each_other() -> None:
    loss = InfoNCELoss(hidden_size=8, projection_dim=4, reduction="none").double()
    anchor, positive, *masks = (x.double() for x in pair())
    a, p = (loss._project(x[:, -1]) for x in (anchor, positive))
    same = torch.tensor([[False, True, False, False], [True, False, False, False], [False] * 4, [False] * 4])
    expected = info_nce_by_loops(a, p, temperature=0.05, excluded=same)
    found = loss(anchor, positive, *masks, sample_ids=torch.tensor([7, 7, 0, 0]))  # 0 is unknown and equals nothing
    torch.testing.assert_close(found, expected)


def test_a_single_pair_is_warned_about_and_costs_nothing() -> None:
    loss = InfoNCELoss(hidden_size=8)
    with pytest.warns(UserWarning, match="nothing to contrast"):
        found = loss(*pair(1))
    found.backward()
    assert found.item() == 0


def test_the_head_is_made_at_the_first_forward_when_no_size_was_given() -> None:
    loss = InfoNCELoss(projection_dim=4)
    with pytest.raises(RuntimeError, match="hidden_size"):
        loss._project(torch.zeros(1, 8))
    assert loss(*pair()).requires_grad
    assert loss._project(torch.zeros(1, 8)).shape == (1, 4)


def test_a_fixed_temperature_is_used_exactly_as_given() -> None:
    # failure 19: .005 became .01
    loss = InfoNCELoss(0.005, hidden_size=8, projection_dim=4, reduction="none").double()
    anchor, positive, *masks = (x.double() for x in pair())
    a, p = (loss._project(x[:, -1]) for x in (anchor, positive))
    expected = info_nce_by_loops(a, p, temperature=0.005)
    torch.testing.assert_close(loss(anchor, positive, *masks), expected, rtol=1e-12, atol=1e-12)
    loss.clamp_temperature()
    assert loss.temperature.item() == 0.005
    assert InfoNCELoss(0.005).temperature.item() == torch.tensor(0.005).item()
    assert not any(name == "log_temperature" for name, _ in loss.named_parameters())
    assert "log_temperature" in loss.state_dict()


@pytest.mark.parametrize("far", [-20.0, 5.0])
def test_a_learnable_temperature_out_of_range_keeps_its_gradient_and_is_brought_back(far: float) -> None:
    # failure 19: a clamp in the forward left it without gradient for good
    loss = InfoNCELoss(0.05, hidden_size=8, projection_dim=4, learnable_temperature=True)
    with torch.no_grad():
        loss.log_temperature.fill_(far)
        for layer in (loss.projector.net[0], loss.projector.net[3]):
            layer.weight.copy_(torch.eye(*layer.weight.shape))
    anchor, positive = torch.eye(8)[:4].unsqueeze(1), (-torch.eye(8)[:4]).unsqueeze(1)
    mask = torch.ones(4, 1)
    loss(anchor, positive, mask, mask).backward()
    assert loss.log_temperature.grad.isfinite()
    assert loss.log_temperature.grad != 0
    parameter = loss.log_temperature
    loss.clamp_temperature()
    assert loss.log_temperature is parameter
    assert loss.temperature.item() == pytest.approx(0.01 if far < 0 else 1.0)
    loss.zero_grad()
    loss(anchor, positive, mask, mask).backward()
    assert loss.log_temperature.grad != 0


def test_a_learnable_temperature_is_a_float32_parameter_of_log_tau() -> None:
    loss = InfoNCELoss(0.07, learnable_temperature=True)
    assert isinstance(loss.log_temperature, torch.nn.Parameter)
    assert loss.log_temperature.dtype == torch.float32
    assert loss.log_temperature.item() == pytest.approx(math.log(0.07))
    assert loss.temperature.item() == pytest.approx(0.07)


def test_the_temperature_learns_to_separate() -> None:
    loss = InfoNCELoss(0.5, hidden_size=8, projection_dim=8, learnable_temperature=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    anchor, _, mask, _ = pair()
    for _ in range(100):
        optimizer.zero_grad()
        loss(anchor, anchor, mask, mask).backward()
        optimizer.step()
        loss.clamp_temperature()
    assert 0.01 <= round(loss.temperature.item(), 6) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": math.nan}, "above 0"),
        ({"temperature": 0.005, "learnable_temperature": True}, "learnable_temperature=False"),
        ({"reduction": "avg"}, "mean, sum, none"),
        ({"pooling": "max"}, "choose one of"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    # failure 20
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(**arguments)


def test_losses_are_combined_by_alpha() -> None:
    found = combine_craft_losses(sft_loss=torch.tensor(2.0), contrastive_loss=torch.tensor(4.0), alpha=0.75)
    assert (found.total_loss, found.sft_loss, found.contrastive_loss) == (2.5, 2, 4)
    with pytest.raises(ValueError, match="from 0 to 1"):
        combine_craft_losses(sft_loss=torch.tensor(2.0), contrastive_loss=torch.tensor(4.0), alpha=1.5)
