"""Bundles, the collator of pairs, and two loaders mixed into one."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from craft.data import (
    CRAFTCollator,
    CRAFTMixedDataLoader,
    MixedCollator,
    MixedRows,
    make_craft_datasets,
    may_pack,
)

FAST = settings(deadline=None, max_examples=50, derandomize=True)
PAIRS = Dataset.from_dict({"input_ids": [[1]], "input_ids_tgt": [[2]]})


@pytest.mark.parametrize(
    ("pairs", "strategy", "message"),
    [
        (None, "paired_dataset", "needs a contrastive_dataset"),
        (PAIRS, "self_align", "leave contrastive_dataset out"),
        (PAIRS, "paired_datasets", "did you mean 'paired_dataset'"),
        (PAIRS.remove_columns("input_ids_tgt"), "paired_dataset", "no column of positives: found input_ids.*text_tgt"),
    ],
)
def test_a_bundle_that_cannot_work_is_refused_with_the_remedy(pairs, strategy, message):
    with pytest.raises(ValueError, match=message):
        make_craft_datasets([1], pairs, strategy)


def test_a_bundle_holds_what_it_was_made_of():
    rows = [1]
    assert vars(make_craft_datasets(rows, PAIRS)) == {
        "sft_dataset": rows,
        "contrastive_dataset": PAIRS,
        "strategy": "paired_dataset",
    }
    assert make_craft_datasets(rows, strategy="self_align").contrastive_dataset is None
    renamed = PAIRS.rename_column("input_ids_tgt", "positives")  # named by craft_contrastive_keys
    assert make_craft_datasets(rows, renamed).contrastive_dataset is renamed
    assert make_craft_datasets(rows, iter([])).strategy == "paired_dataset"  # a stream shows no columns


@FAST
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["left", "right"]), st.booleans())
def test_ragged_rows_are_padded_and_masked_on_either_side(lengths, side, as_tensors):
    """# failure 14: the published package's collator cannot pad."""
    make = torch.tensor if as_tensors else list
    rows = [
        {"input_ids": make([7] * n), "labels": make([8] * n), "input_ids_tgt": make([9] * (10 - n))} for n in lengths
    ]
    batch = CRAFTCollator(pad_token_id=3, padding_side=side)(rows)
    for i, n in enumerate(lengths):
        for name, length, real, fill in (
            ("input_ids", n, 7, 3),
            ("attention_mask", n, 1, 0),
            ("labels", n, 8, -100),
            ("input_ids_tgt", 10 - n, 9, 3),
            ("attention_mask_tgt", 10 - n, 1, 0),
        ):
            width = batch[name].shape[1]
            blank = [fill] * (width - length)
            assert batch[name][i].tolist() == (blank + [real] * length if side == "left" else [real] * length + blank)
    assert all(batch[name].dtype == torch.int64 for name in batch)


def test_masks_that_are_there_stay_and_hard_negatives_are_padded_too():
    rows = [
        {
            "input_ids": [1, 2],
            "attention_mask": [0, 1],
            "input_ids_tgt": [3],
            "input_ids_neg": [4, 5],
            "input_ids_neg_1": [6],
        },
        {
            "input_ids": [1],
            "attention_mask": [1],
            "input_ids_tgt": [3, 3],
            "input_ids_neg": [4],
            "input_ids_neg_1": [6],
        },
    ]
    batch = CRAFTCollator(pad_token_id=9)(rows)
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 0]]
    assert batch["input_ids_neg"].tolist() == [[4, 5], [4, 9]]
    assert batch["attention_mask_neg"].tolist() == [[1, 1], [1, 0]]
    assert batch["attention_mask_neg_1"].tolist() == [[1], [1]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "text_tgt": "b"}, "no column of tokens: found text, text_tgt.*tokenize_pairs"),
        (("a", "b"), "row 0 of the batch is a tuple.*collator of your own"),
    ],
)
def test_rows_without_tokens_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        CRAFTCollator()([row])


def test_labels_are_never_made_up():
    """A row without labels and masks must reach self_align's check as it is, not as one that is learned whole."""
    batch = CRAFTCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_columns_by_other_names_are_padded_as_what_they_are():
    keys = {"anchor_input_ids": "src", "anchor_attention_mask": "src_mask", "anchor_labels": "answers"}
    batch = CRAFTCollator(pad_token_id=3, contrastive_keys=keys)(
        [{"src": [1, 2], "answers": [1, 2], "input_ids_tgt": [1]}, {"src": [1], "answers": [1], "input_ids_tgt": [1]}]
    )
    assert batch["src"].tolist() == [[1, 2], [1, 3]]
    assert batch["src_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["answers"].tolist() == [[1, 2], [1, -100]]


def test_other_values_stay_and_tensors_of_any_shape_are_stacked():
    image = torch.ones(3, 2, 2)
    rows = [
        {
            "input_ids": np.array([1]),
            "language": "en",
            "score": 0.5,
            "pixel_values": image,
            "weights": [0.5],
            "none": None,
        },
        {
            "input_ids": np.array([1, 2]),
            "language": "fr",
            "score": 1.5,
            "pixel_values": image,
            "weights": [1.5],
            "none": None,
        },
    ]
    batch = CRAFTCollator()(rows)
    assert (batch["language"], batch["score"]) == (["en", "fr"], [0.5, 1.5])
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["weights"].tolist() == [[0.5], [1.5]]
    assert batch["input_ids"].tolist() == [[1, 0], [1, 2]]
    assert CRAFTCollator()([]) == {}


def test_sample_ids_are_numbers_that_equal_samples_share():
    def ids(name: str, *values: Any) -> list[int]:
        return CRAFTCollator()([{"input_ids": [1], name: value} for value in values])["craft_sample_ids"].tolist()

    assert ids("id", 5, 6, 5) == [5, 6, 5]
    a, b, again = ids("sample_id", "a", "b", "a")
    assert a == again != b
    assert ids("craft_sample_id", None, "a") == [0, a]
    assert 0 not in ids("id", 0, "", 2**64)  # 0 stands for unknown
    assert ids("craft_sample_ids", torch.tensor(4), np.int64(3)) == [4, 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [1]}, {"input_ids_tgt": [1]}],
            "row 1 of the batch and row 0 differ in the columns input_ids, ",
        ),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1], "labels": [1, 2]}],
            "row 1.*labels has 2 .* input_ids has 1",
        ),
        ([{"input_ids_neg": [1]}, {"input_ids_neg": None}], "row 1 of the batch has no input_ids_neg"),
        ([{"x": [[1], [2]]}, {"x": [[1]]}], r"column x has rows of shapes \(1, 1\), \(2, 1\)"),
    ],
)
def test_rows_that_make_no_batch_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        CRAFTCollator()(rows)


def test_a_padding_side_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="padding_side='middle'"):
        CRAFTCollator(padding_side="middle")


@pytest.mark.parametrize(
    ("collator", "packs"),
    [
        (type("DataCollatorWithFlattening", (), {})(), True),
        (type("MyPackingCollator", (), {})(), True),
        (SimpleNamespace(return_position_ids=True), True),
        (SimpleNamespace(separator_id=-100), True),
        (SimpleNamespace(padding_free=True), True),
        (SimpleNamespace(padding_free=False), False),
        (CRAFTCollator(), False),
    ],
)
def test_packing_collators_are_recognised(collator, packs):
    assert may_pack(collator) is packs


def test_both_data_sets_as_one_read_batches_at_once_and_are_tagged():
    rows = MixedRows(Dataset.from_dict({"input_ids": [[1], [2]]}), [{"input_ids": [3], "input_ids_tgt": [4]}])
    assert (len(rows), rows[1], rows[2][0]) == (3, ("sft", {"input_ids": [2]}), "craft")
    collate = MixedCollator(CRAFTCollator(), CRAFTCollator())
    assert collate(rows.__getitems__([1, 0]))["craft_batch_type"] == "sft"
    batch = collate(rows.__getitems__([2]))
    assert (batch["craft_batch_type"], batch["input_ids_tgt"].tolist()) == ("craft", [[4]])


# Two loaders


def batches(rows: Any, size: int = 1, **options: Any) -> DataLoader:
    return DataLoader(rows, batch_size=size, collate_fn=lambda found: {"input_ids": torch.tensor(found)}, **options)


def mixed(
    sft: int = 9, contrastive: int = 4, window: int = 4, beta: float = 0.75, **options: Any
) -> CRAFTMixedDataLoader:
    shuffle = options.pop("shuffle", False)
    return CRAFTMixedDataLoader(
        batches(range(sft), shuffle=shuffle),
        batches(range(100, 100 + contrastive), shuffle=shuffle),
        beta=beta,
        gradient_accumulation_steps=window,
        **options,
    )


def content(loader: Any) -> list[tuple[str, list[int]]]:
    return [(batch["craft_batch_type"], batch["input_ids"].tolist()) for batch in loader]


def test_the_pattern_is_three_sft_batches_and_a_contrastive_one():
    assert [kind for kind, _ in content(mixed(6))] == ["sft", "sft", "sft", "craft"] * 2


@FAST
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 5),
    st.floats(0.1, 0.9),
    st.sampled_from(["oversample", "cap"]),
)
def test_the_mixed_loader_yields_its_plan_and_its_length(sft, contrastive, window, beta, strategy):
    loader = mixed(sft, contrastive, window, beta, length_strategy=strategy)
    found = content(loader)
    assert [kind for kind, _ in found] == list(loader.plan.kinds())
    assert len(loader) == len(found)
    assert [ids for kind, ids in found if kind == "sft"] == [[i] for i in range(loader.plan.sft_batches)]


def test_the_contrastive_loader_goes_on_over_epochs():
    loader = mixed(6, 5)
    stream = [ids[0] - 100 for _ in range(4) for kind, ids in content(loader) if kind == "craft"]
    assert stream == [0, 1, 2, 3, 4, 0, 1, 2]


def test_shuffling_loaders_give_the_same_order_with_a_seed_and_leave_the_global_state():
    """# failure 22."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    loader = mixed(shuffle=True, seed=3)
    epochs = [content(loader) for _ in range(3)]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    other = mixed(shuffle=True, seed=3)
    other.set_epoch(2)
    assert content(other) == epochs[2]
    assert epochs[0] != epochs[1]
    assert content(mixed(shuffle=True, seed=4)) != epochs[0]


def test_workers_do_not_change_the_order():
    def loader(workers: int) -> CRAFTMixedDataLoader:
        both = [batches(range(start, start + 6), shuffle=True, num_workers=workers) for start in (0, 100)]
        return CRAFTMixedDataLoader(*both, beta=0.5, gradient_accumulation_steps=2, seed=7)

    assert content(loader(1)) == content(loader(0))


@pytest.mark.parametrize(("epoch", "done"), [(0, 3), (2, 7)])
def test_a_resumed_epoch_of_two_loaders_is_the_rest_of_the_whole_one(epoch, done):
    """# failure 3."""
    whole = mixed(shuffle=True, seed=3)
    whole.set_epoch(epoch)
    resumed = mixed(shuffle=True, seed=3)
    resumed.set_epoch(epoch)
    assert content(skip_first_batches(resumed, done)) == content(whole)[done:]


def test_an_epoch_that_was_left_early_does_not_shift_the_next():
    whole, left = mixed(shuffle=True, seed=3), mixed(shuffle=True, seed=3)
    content(whole)
    list(itertools.islice(left, 5))
    left.set_epoch(1)
    assert content(left) == content(whole)


class Stream(IterableDataset):
    def __init__(self, rows: range) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [("oversample", ["sft", "sft", "craft"] * 4 + ["sft"]), ("cap", ["sft", "sft", "craft"] * 3 + ["sft", "sft"])],
)
def test_streams_without_a_length_follow_the_pattern(strategy, kinds):
    loader = CRAFTMixedDataLoader(
        batches(Stream(range(9))),
        batches(Stream(range(100, 103))),
        beta=0.66,
        gradient_accumulation_steps=3,
        length_strategy=strategy,
    )
    assert loader.plan is None
    assert [kind for kind, _ in content(loader)] == kinds
    assert (loader.sft_share, loader.contrastive_share) == (1, 1)
    with pytest.raises(TypeError, match="total_sft_batches"):
        len(loader)


def test_streams_with_announced_lengths_have_a_plan():
    streams = batches(Stream(range(9))), batches(Stream(range(100, 103)))
    loader = CRAFTMixedDataLoader(
        *streams, beta=0.5, gradient_accumulation_steps=1, total_sft_batches=9, total_craft_batches=3
    )
    assert len(loader) == len(content(loader)) == 18
    assert (loader.sft_share, loader.contrastive_share) == (0.5, 0.5)
    short = CRAFTMixedDataLoader(
        *streams, beta=0.5, gradient_accumulation_steps=2, total_sft_batches=10, total_craft_batches=3
    )
    with pytest.raises(ValueError, match="ended after 9 batches; 10 were planned"):
        content(short)


def test_what_needs_lengths_is_refused_without_them():
    streams = batches(Stream(range(9))), batches(Stream(range(3)))
    for options in ({"beta_mode": "auto"}, {"length_strategy": "auto_beta"}, {"length_strategy": "error"}):
        with pytest.raises(ValueError, match="Give total_sft_batches"):
            CRAFTMixedDataLoader(*streams, **options)
    with pytest.raises(ValueError, match=r"9 SFT batches and 4 contrastive ones"):
        mixed(length_strategy="error")


def test_a_loader_alone_gives_sft_batches():
    loader = CRAFTMixedDataLoader(batches(range(5)), gradient_accumulation_steps=2)
    assert [kind for kind, _ in content(loader)] == ["sft"] * 5
    assert (loader.plan.windows, loader.sft_share, loader.contrastive_share) == (((2, 0), (2, 0), (1, 0)), 1, 0)
    stream = CRAFTMixedDataLoader(batches(Stream(range(5))))
    assert [kind for kind, _ in content(stream)] == ["sft"] * 5


def test_loaders_that_cannot_be_mixed_are_told():
    with pytest.raises(ValueError, match="the contrastive loader yields no batch"):
        content(CRAFTMixedDataLoader(batches(Stream(range(5))), batches(Stream(range(0)))))
    tuples = DataLoader(range(4), collate_fn=tuple)
    with pytest.raises(ValueError, match="a custom loader yields tuple"):
        content(CRAFTMixedDataLoader(tuples, batches(range(4)), gradient_accumulation_steps=2))
