"""Columns that a trainer would drop come into the batches of self_align."""

from typing import Any

import pytest
import torch

from craft import CRAFTCollator, CRAFTConfigMixin
from craft.trainers.columns import KeepingCollator, own_columns

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "assistant_mask": [0, 0, 1, 1], "answers": [-100, 6, 7, 8], "sample_id": 4},
    {"input_ids": [8], "assistant_mask": [1], "answers": [8], "sample_id": "a"},
]


@pytest.mark.parametrize(
    ("side", "keep_end", "mask", "answers"),
    [
        ("right", False, [[0, 0, 1], [1, 0, 0]], [[-100, 6, 7], [8, -100, -100]]),
        ("right", True, [[0, 1, 1], [1, 0, 0]], [[6, 7, 8], [8, -100, -100]]),
        ("left", False, [[0, 0, 1], [0, 0, 1]], [[-100, 6, 7], [-100, -100, 8]]),
    ],
)
def test_they_are_cut_and_padded_as_their_texts_are(side, keep_end, mask, answers):
    collator = KeepingCollator(
        CRAFTCollator(padding_side=side),
        ["assistant_mask", "answers", "sample_id"],
        label_key="answers",
        keep_end=keep_end,
    )
    batch = collator(ROWS)
    assert batch["assistant_mask"].tolist() == mask
    assert batch["answers"].tolist() == answers
    assert batch["craft_sample_ids"][0] == 4
    assert batch["craft_sample_ids"][1] != 0
    assert "sample_id" not in batch


def test_the_other_collator_sees_none_of_them_and_may_give_no_mask():
    seen = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.extend(rows)
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    keeping = KeepingCollator(collate, ["assistant_mask", "sample_id"], label_key="labels", keep_end=False)
    batch = keeping([{"input_ids": [5, 6], "assistant_mask": [False, True]}] * 2)
    assert seen == [{"input_ids": [5, 6]}] * 2
    assert batch["assistant_mask"].tolist() == [[0, 1]] * 2
    assert "craft_sample_ids" not in batch


def test_own_names_come_first_and_labels_are_the_models():
    assert "labels" not in own_columns(CRAFTConfigMixin())
    keys = {"anchor_labels": "answers"}
    assert own_columns(CRAFTConfigMixin(craft_assistant_mask_key="mine", craft_contrastive_keys=keys))[:2] == [
        "mine",
        "answers",
    ]
