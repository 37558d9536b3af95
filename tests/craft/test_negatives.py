"""Ids of texts, the mask of duplicates, and the queue."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from craft.negatives import CachedEmbeddingBank, duplicates, hash_tokens

anything = settings(deadline=None, max_examples=50, derandomize=True)
tokens = st.lists(st.integers(0, 300_000), min_size=1, max_size=12)


def padded(text: list[int], before: int, after: int, filler: int = 0) -> tuple[Tensor, Tensor]:
    ids = [filler] * before + text + [filler] * after
    return torch.tensor([ids]), torch.tensor([[0] * before + [1] * len(text) + [0] * after])


@anything
@given(text=tokens, before=st.integers(0, 3), after=st.integers(0, 3), filler=st.integers(0, 99))
def test_a_hash_does_not_see_the_padding(text: list[int], before: int, after: int, filler: int) -> None:
    assert torch.equal(hash_tokens(*padded(text, before, after, filler)), hash_tokens(*padded(text, 0, 0)))


@anything
@given(one=tokens, other=tokens)
def test_other_tokens_have_another_hash(one: list[int], other: list[int]) -> None:
    same = hash_tokens(*padded(one, 0, 0)) == hash_tokens(*padded(other, 0, 0))
    assert bool(same) == (one == other)


def test_order_and_length_count_and_an_empty_row_is_unknown() -> None:
    texts = [[5, 6], [6, 5], [5, 6, 6], [0], [0, 0], [5]]
    hashes = [int(hash_tokens(*padded(text, 0, 2))) for text in texts]
    assert len({*hashes, 0}) == len(texts) + 1
    assert hash_tokens(torch.tensor([[5, 6]]), torch.tensor([[0, 0]])).tolist() == [0]


def test_a_hundred_thousand_texts_have_a_hundred_thousand_hashes() -> None:
    ids = torch.stack([torch.arange(100_000) % 317, torch.arange(100_000) // 317], 1)
    assert len(hash_tokens(ids, torch.ones(100_000, 2)).unique()) == 100_000


def duplicate_by_sets(row: list[int], column: list[int]) -> bool:
    texts = ({*row[1:]} & {*column[1:]}) - {0}
    return bool(texts) or (row[0] == column[0] != 0)


some_id = st.sampled_from([0, 1, 2, 3, 2**16, 2**16 + 1, 3 * 2**40, -(2**63), 2**63 - 1])  # low bits alike, too
few_ids = st.lists(st.lists(some_id, min_size=3, max_size=3), max_size=6)


@anything
@given(rows=few_ids, columns=few_ids)
def test_duplicates_are_what_the_definition_says(rows: list[list[int]], columns: list[list[int]]) -> None:
    found = duplicates(torch.tensor(rows).reshape(-1, 3).long(), torch.tensor(columns).reshape(-1, 3).long())
    assert found.shape == (len(rows), len(columns))
    assert found.tolist() == [[duplicate_by_sets(row, column) for column in columns] for row in rows]


def test_a_sample_id_is_not_taken_for_a_text_id() -> None:
    assert duplicates(torch.tensor([[7, 1, 2]]), torch.tensor([[1, 7, 9], [2, 3, 7]])).tolist() == [[False, False]]


def test_few_duplicates_are_found_in_a_long_queue() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-(2**62), 2**62, (64, 3), generator=generator)
    columns = torch.randint(-(2**62), 2**62, (65536, 3), generator=generator)
    columns[65535, 2], columns[7, 0], columns[9, 1] = rows[3, 1], rows[63, 0], 0
    assert duplicates(rows, columns).nonzero().tolist() == [[3, 65535], [63, 7]]


@anything
@given(batches=st.lists(st.integers(0, 9), max_size=8), capacity=st.integers(1, 6))
def test_the_queue_holds_the_newest_rows(batches: list[int], capacity: int) -> None:
    # failure 5
    queue, seen = CachedEmbeddingBank(2, capacity), 0
    for size in batches:
        rows = torch.arange(seen, seen + size)
        queue.enqueue(torch.stack([rows, -rows], 1).float(), rows[:, None] * torch.tensor([1, 2, 3]))
        seen += size
    newest = list(range(max(0, seen - capacity), seen))
    assert queue.size == len(newest)
    assert sorted(queue.get_negatives()[:, 0].int().tolist()) == newest
    assert torch.equal(queue.get_negatives()[:, 1], -queue.get_negatives()[:, 0])
    assert torch.equal(queue.get_ids(), queue.get_negatives()[:, :1].long() * torch.tensor([1, 2, 3]))


def test_the_queue_takes_no_graph_and_unknown_ids() -> None:
    queue = CachedEmbeddingBank(embedding_dim=3, bank_size=4)
    queue.enqueue(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    assert not queue.get_negatives().requires_grad
    assert queue.get_negatives().dtype == torch.float32
    assert queue.get_ids().tolist() == [[0, 0, 0]] * 2
    assert (queue.ptr, queue.is_full, queue.bank.shape) == (2, False, (4, 3))
    queue.clear()
    assert queue.size == 0


@pytest.mark.parametrize("rows", [3, 6])
def test_a_queue_comes_back_from_its_state_to_the_bit_and_the_place(rows: int) -> None:
    # failure 2
    queue, restored = CachedEmbeddingBank(2, 4), CachedEmbeddingBank(2, 4)
    queue.enqueue(
        torch.randn(rows, 2, generator=torch.Generator().manual_seed(0)), torch.arange(3 * rows).reshape(-1, 3)
    )
    state = queue.state_dict()
    assert all(isinstance(value, Tensor) and value.is_contiguous() for value in state.values())
    restored.enqueue(torch.zeros(3, 2))
    restored.load_state_dict(state)
    queue.enqueue(torch.ones(2, 2))
    restored.enqueue(torch.ones(2, 2))
    assert torch.equal(queue.bank, restored.bank)
    assert torch.equal(queue.ids, restored.ids)
    assert (queue.ptr, queue.size) == (restored.ptr, restored.size)
    assert len(state["bank"]) == min(rows, 4)  # a copy: what came later is not in it


def test_what_does_not_fit_the_queue_is_told() -> None:
    queue = CachedEmbeddingBank(3, 4)
    with pytest.raises(ValueError, match=r"\[rows, 3\].*craft_projection_dim"):
        queue.enqueue(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"ids \[1, 3\] do not fit 2 embeddings"):
        queue.enqueue(torch.zeros(2, 3), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"craft_negative_queue_size=8"):
        queue.load_state_dict(CachedEmbeddingBank(3, 8).state_dict())
    with pytest.raises(ValueError, match="at least 1"):
        CachedEmbeddingBank(3, 0)
