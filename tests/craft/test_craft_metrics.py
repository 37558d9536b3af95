"""Contrastive accuracy, consistency of the representations and their reference."""

import pytest
import torch

from craft.metrics import (
    compute_contrastive_accuracy,
    compute_representation_consistency,
    update_representation_reference,
)


def test_accuracy_is_the_share_of_anchors_nearest_to_their_own_positive() -> None:
    anchors = torch.eye(3)
    positives = torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0, 0, -1]])
    assert compute_contrastive_accuracy(anchors, positives).item() == pytest.approx(2 / 3)
    assert compute_contrastive_accuracy(anchors, torch.eye(3)).item() == 1
    extra = torch.cat([torch.eye(3), torch.tensor([[2.0, 0, 0]])])
    assert compute_contrastive_accuracy(anchors, extra).item() == pytest.approx(2 / 3)


def test_a_collapsed_encoder_scores_0() -> None:
    assert compute_contrastive_accuracy(torch.ones(4, 2), torch.ones(4, 2)).item() == 0


def test_a_single_pair_scores_1() -> None:
    assert compute_contrastive_accuracy(torch.ones(1, 2), -torch.ones(1, 2)).item() == 1


def test_accuracy_is_not_rounded_by_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.nn.functional.normalize(
        torch.ones(32, 64) + 0.01 * torch.randn(32, 64, generator=generator), dim=-1
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_contrastive_accuracy(anchors, anchors).item() == 1


def test_the_first_consistency_is_1() -> None:
    # failure 21
    assert compute_representation_consistency(torch.randn(3, 2), None).item() == 1


def test_consistency_is_the_mean_cosine_similarity() -> None:
    current = torch.tensor([[2.0, 0], [0, 3]])
    assert compute_representation_consistency(current, torch.tensor([5.0, 0])).item() == pytest.approx(0.5)
    assert compute_representation_consistency(current, current * 7).item() == pytest.approx(1)
    assert compute_representation_consistency(current, -current).item() == pytest.approx(-1)
    assert compute_representation_consistency(current.bfloat16(), torch.zeros(2)).item() == 0  # not NaN


def test_the_reference_is_a_moving_average_of_the_mean_embedding_without_graph() -> None:
    current = torch.tensor([[1.0, 3], [3, 5]], requires_grad=True)
    first = update_representation_reference(None, current)
    assert first.tolist() == [2, 4]
    second = update_representation_reference(first, torch.zeros(1, 2, dtype=torch.bfloat16), momentum=0.75)
    assert second.tolist() == [1.5, 3]
    assert not first.requires_grad
    assert second.dtype == torch.float32


def test_a_batch_without_rows_is_an_error_and_never_a_nan() -> None:
    empty = torch.zeros(0, 2)
    with pytest.raises(ValueError, match="no anchors"):
        compute_contrastive_accuracy(empty, empty)
    with pytest.raises(ValueError, match="no embeddings"):
        compute_representation_consistency(empty, None)
    with pytest.raises(ValueError, match="no embeddings"):
        update_representation_reference(torch.zeros(2), empty)
