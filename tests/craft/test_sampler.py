"""TaskBatchSampler over random lengths and ranks, and inside accelerate's and torch's loaders."""

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from craft.data import CRAFTCollator, MixedCollator, MixedRows
from craft.sampler import TaskBatchSampler, mixed_seed, shuffled

FAST = settings(deadline=None, max_examples=50, derandomize=True)
SETTINGS = st.fixed_dictionaries(
    {
        "sft_rows": st.integers(1, 90),
        "contrastive_rows": st.integers(1, 90),
        "sft_batch_size": st.integers(1, 5),
        "contrastive_batch_size": st.integers(1, 5),
        "beta": st.floats(0.05, 0.95),
        "gradient_accumulation_steps": st.integers(1, 6),
        "length_strategy": st.sampled_from(["oversample", "cap", "auto_beta"]),
        "seed": st.integers(0, 2**31),
    }
)


def sampler(rank: int = 0, world_size: int = 1, **options: Any) -> TaskBatchSampler:
    given_ = {
        "sft_rows": 23,
        "contrastive_rows": 17,
        "sft_batch_size": 2,
        "contrastive_batch_size": 4,
        "beta": 0.6,
        "gradient_accumulation_steps": 4,
        **options,
    }
    rows = given_["sft_rows"]
    return TaskBatchSampler(
        lambda epoch: shuffled(rows, seed=5, round_=epoch), rank=rank, world_size=world_size, **given_
    )


def epoch_of(ranks: list[TaskBatchSampler], epoch: int) -> list[list[list[int]]]:
    for one in ranks:
        one.set_epoch(epoch)
    return [list(one) for one in ranks]


@FAST
@given(SETTINGS, st.integers(1, 4), st.integers(0, 3))
def test_ranks_agree_on_kinds_and_each_has_rows_of_its_own(options, world_size, epoch):
    """# failure 8: every rank of the published package draws the same contrastive rows."""
    ranks = [sampler(rank, world_size, **options) for rank in range(world_size)]
    batches = epoch_of(ranks, epoch)
    rows, kinds = options["sft_rows"], list(ranks[0].plan.kinds())
    assert {len(mine) for mine in batches} == {len(kinds)} == {len(ranks[0])}
    for kind, *at_once in zip(kinds, *batches, strict=True):
        assert all(at_once), "no rank is without a row"
        assert all((index < rows) == (kind == "sft") for batch in at_once for index in batch)
        together = [index for batch in at_once for index in batch]
        repeated = len(together) - len(set(together))
        assert repeated == 0 or len(together) == world_size  # only what fills a batch with fewer rows than ranks
        assert max(map(len, at_once)) <= options[f"{'sft' if kind == 'sft' else 'contrastive'}_batch_size"]


@FAST
@given(SETTINGS, st.integers(1, 4))
def test_an_epoch_under_oversample_sees_every_sft_row(options, world_size):
    """# failure 13."""
    options = {**options, "length_strategy": "oversample"}
    batches = epoch_of([sampler(rank, world_size, **options) for rank in range(world_size)], 1)
    seen = Counter(i for mine in batches for batch in mine for i in batch if i < options["sft_rows"])
    assert set(seen) == set(range(options["sft_rows"]))
    assert sum(seen.values()) < options["sft_rows"] + world_size


@FAST
@given(SETTINGS, st.integers(1, 3))
def test_the_contrastive_stream_passes_over_all_rows_before_it_repeats_one(options, world_size):
    ranks = [sampler(rank, world_size, **options) for rank in range(world_size)]
    rows, first = options["contrastive_rows"], options["sft_rows"]
    stream: list[int] = []
    for epoch in range(4):
        kinds = ranks[0].plan.kinds()
        for kind, *at_once in zip(kinds, *epoch_of(ranks, epoch), strict=True):
            if kind == "craft":
                stream += dict.fromkeys(index - first for batch in at_once for index in batch)
    if rows >= world_size * (-(-rows // (options["contrastive_batch_size"] * world_size))):  # no batch is filled up
        for begin in range(0, len(stream) - rows + 1, rows):
            assert sorted(stream[begin : begin + rows]) == list(range(rows))
        rest = stream[len(stream) // rows * rows :]
        assert len(rest) == len(set(rest))


@FAST
@given(SETTINGS, st.integers(0, 5))
def test_the_order_is_a_function_of_seed_and_epoch_alone(options, epoch):
    """# failure 22: the published package draws contrastive rows from the global random state."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    [one] = epoch_of([sampler(**options)], epoch)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    other = sampler(**options)
    epoch_of([other], 7)
    assert epoch_of([other], epoch) == [one]


def test_contrastive_batches_differ_by_one_row_at_most():
    one = sampler(contrastive_rows=17, contrastive_batch_size=8)
    sizes = [len(batch) for batch in one if batch[0] >= 23]
    assert set(sizes) <= {5, 6}


def test_dropping_the_last_batch_leaves_full_ones():
    one = sampler(drop_last=True, contrastive_batch_size=4, sft_batch_size=4)
    assert {len(batch) for batch in one} == {4}
    with pytest.raises(ValueError, match="the contrastive data set gives no batch"):
        sampler(drop_last=True, contrastive_batch_size=18)


def test_an_order_that_leaves_rows_out_is_refused():
    one = TaskBatchSampler(
        lambda epoch: [0, 1],
        3,
        sft_rows=4,
        sft_batch_size=1,
        contrastive_batch_size=1,
        beta=0.5,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(ValueError, match="2 entries for 4 SFT rows"):
        list(one)


def test_neighbouring_seeds_are_unrelated():
    seeds = {mixed_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)


def loader(workers: int = 0) -> Any:
    sft = [{"input_ids": [i] * (i % 3 + 1)} for i in range(23)]
    pairs = [{"input_ids": [i], "input_ids_tgt": [i] * (i % 4 + 1)} for i in range(100, 117)]
    made = DataLoader(
        MixedRows(sft, pairs),
        batch_sampler=sampler(),
        collate_fn=MixedCollator(CRAFTCollator(), CRAFTCollator()),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return prepare_data_loader(made, num_processes=1, process_index=0)


def content(batches: Any) -> list[tuple[str, Any]]:
    return [(batch["craft_batch_type"], batch["input_ids"].tolist()) for batch in batches]


def trainers_epoch(prepared: Any, epoch: int) -> list[tuple[str, Any]]:
    """An epoch as transformers' Trainer._run_epoch begins it."""
    prepared.set_epoch(epoch)
    return content(prepared)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_accelerate_prepared_yields_the_epochs_of_the_sampler(workers):
    prepared, plain = loader(workers), sampler()
    assert len(prepared) == len(plain) == len(plain.plan)
    for epoch in (0, 1, 3):
        [rows] = epoch_of([plain], epoch)
        found = trainers_epoch(prepared, epoch)
        assert [kind for kind, _ in found] == list(plain.plan.kinds())
        assert [len(ids) for _, ids in found] == [len(batch) for batch in rows]
        firsts = [[ids[0] - 77 * (kind == "craft") for ids in batch] for kind, batch in found]
        assert firsts == rows
    assert trainers_epoch(prepared, 0) != trainers_epoch(prepared, 1)


@pytest.mark.parametrize(("epoch", "done"), [(0, 5), (2, 9), (1, 1)])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(epoch, done):
    """# failure 3: resuming within an epoch crashes in the published package."""
    whole = trainers_epoch(loader(), epoch)
    skipping = skip_first_batches(loader(), done)
    assert len(skipping) == len(whole) - done
    assert trainers_epoch(skipping, epoch) == whole[done:]


def test_epochs_go_on_by_themselves_without_set_epoch():
    prepared = loader()
    first, second = content(prepared), content(prepared)
    assert [first, second] == [trainers_epoch(loader(), 0), trainers_epoch(loader(), 1)]
