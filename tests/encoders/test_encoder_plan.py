"""The order of reading: every document once an epoch, processes apart, shuffled, and the same for equal seeds."""

from collections import Counter
from itertools import pairwise, takewhile

import numpy as np
import pytest
from encoder_batches import TOKENIZER, data_params, documents, loader, take, token_ids
from encoder_data import sentences, write_jsonl, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from inft.encoders.data import blocks as plan
from inft.encoders.data.blocks import Cursor, blocks, window_edges
from inft.encoders.data.documents import open_data

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows: many of them in tiny data."""
    monkeypatch.setattr(plan, "BLOCK_ROWS", 16)


@pytest.fixture
def data(tmp_path):
    texts = sentences(300)
    for i, (start, stop) in enumerate([(0, 70), (70, 71), (71, 300)]):
        write_jsonl(tmp_path / f"train-{i}.jsonl", texts[start:stop])
    return tmp_path


def epoch_rows(source, seed: int, epoch: int = 0) -> list[tuple[int, int]]:
    """(shard, row) of one epoch in the order of the plan."""
    found: list[tuple[int, int]] = []
    for block in takewhile(lambda block: block.cursor.epoch == epoch, blocks(source, seed, Cursor(epoch=epoch))):
        rows = {}
        for read in block.reads:
            rows.update({at: (read.part, row) for at, row in zip(read.order.tolist(), read.rows.tolist(), strict=True)})
        found += [rows[at] for at in range(len(rows))]
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("streaming", [True, False])
def test_an_epoch_reads_every_row_once_in_an_order_of_its_own(data, streaming):
    source = open_data(data_params(data, dataset__streaming=streaming), TOKENIZER).train
    orders = [epoch_rows(source, 1), epoch_rows(source, 1, epoch=1), epoch_rows(source, 2)]
    for order in orders:
        assert sorted(order) == [(0, i) for i in range(70)] + [(1, 0)] + [(2, i) for i in range(229)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch_rows(source, 1) == orders[0]


@pytest.mark.usefixtures("small_blocks")
def test_streaming_shuffles_within_windows_and_not_at_all_with_a_buffer_of_one(data):
    source = open_data(data_params(data, dataset__streaming=True, dataset__shuffle_buffer_size=40), TOKENIZER).train
    rows = [row for shard, row in epoch_rows(source, 1) if shard == 2]
    windows = [{row // 40 for row in rows[start:stop]} for start, stop in _runs(rows, 40)]
    assert all(len(window) == 1 for window in windows)
    assert len(windows) == 6
    assert rows != sorted(rows)
    plain = open_data(data_params(data, dataset__streaming=True, dataset__shuffle_buffer_size=1), TOKENIZER).train
    assert epoch_rows(plain, 1) == sorted(epoch_rows(plain, 1))


def _runs(rows: list[int], size: int) -> list[tuple[int, int]]:
    """Where runs of rows of the same window begin and end."""
    cuts = [0, *(i for i in range(1, len(rows)) if rows[i] // size != rows[i - 1] // size), len(rows)]
    return list(pairwise(cuts))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_documents_of_every_epoch(data, streaming, world_size):
    params = data_params(data, dataset__streaming=streaming, trainer__per_device_train_batch_size=1)
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        batches = loader(params, rank=rank, world_size=world_size)
        while True:
            batch = next(batches)
            if batches.state().cursor.epoch == 3:
                break
            seen.update(batch.keys)
    assert len(seen) == 300
    assert set(seen.values()) == {3}  # every document once in each epoch, in one process


def test_one_block_goes_to_the_processes_in_turn(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", sentences(8))
    params = data_params(tmp_path, trainer__per_device_train_batch_size=8)
    first, second = (loader(params, rank=rank, world_size=2) for rank in (0, 1))
    keys = [sorted(batch.keys) for batch in (*take(first, 3), *take(second, 3))]
    assert keys == [keys[0]] * 6
    assert [batches.state().cursor.epoch for batches in (first, second)] == [4, 5]


def test_a_documents_key_and_masks_are_the_same_streamed_or_not(data):
    found = []
    for streaming in (True, False):
        params = data_params(data, dataset__streaming=streaming, trainer__per_device_train_batch_size=1)
        batches = take(loader(params), 300)
        found.append({batch.keys[0]: (documents(batch)[0], batch.input_ids_T.tolist()) for batch in batches})
    assert found[0] == found[1]
    assert len(found[0]) == 300


def test_the_documents_are_the_texts_with_their_special_tokens(data):
    texts = sentences(300)
    batches = take(loader(data_params(data, dataset__max_seq_length=128)), 75)
    assert sorted(ids for batch in batches for ids in documents(batch)) == sorted(map(token_ids, texts))


@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 60), st.lists(st.integers(1, 70), max_size=8))
def test_windows_cover_all_rows_and_keep_row_groups_whole(start, count, size, groups):
    bounds = np.cumsum([*groups, start + count])
    for kept in (None, bounds):
        edges = list(window_edges(start, start + count, size, kept))
        assert [edge[0] for edge in edges] == [start, *(edge[1] for edge in edges[:-1])]
        assert edges[-1][1] == start + count
        assert all(end - begin <= (size if kept is None else 4 * size) for begin, end in edges)
    # A cut is where a group ends, or a whole window after the last one within a group that is too large.
    for begin, end in edges[:-1]:
        assert end in bounds or end == begin + size


def test_parquet_windows_hold_whole_row_groups(tmp_path):
    write_parquet(tmp_path / "train.parquet", sentences(90))  # three groups of 30
    params = data_params(tmp_path, dataset__streaming=True, dataset__shuffle_buffer_size=20)
    rows = [row for _, row in epoch_rows(open_data(params, TOKENIZER).train, 1)]
    assert sorted(rows) == list(range(90))
    assert all(len({row // 30 for row in rows[i : i + 30]}) == 1 for i in (0, 30, 60))
