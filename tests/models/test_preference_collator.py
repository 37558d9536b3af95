"""PreferenceCollator: both answers of a row in one batch of the family's own collator, in DPO's and in ORPO's words."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from inft.models.preferences import ORPOCollator, PreferenceCollator, sides
from inft.sample import Sample
from params import UserError

Make = Callable[..., Sample]


@pytest.fixture
def rows(make_sample: Make) -> list[Sample]:
    """Two preferences with images of different colours."""
    first = replace(make_sample("A red circle."), rejected="A blue circle, and it is very large.")
    second = replace(make_sample("Un rond.", colour="blue", size=(64, 96)), rejected="Une étoile.")
    return [first, second]


def test_a_batch_is_what_the_collator_makes_of_the_chosen_and_then_the_rejected(
    family: Any, rows: list[Sample]
) -> None:
    batch = PreferenceCollator(family.collator())(rows)
    rejected = [replace(row, answer=row.rejected) for row in rows]  # type: ignore[arg-type]
    own = family.collator()([*rows, *rejected])
    labels = own.pop("labels")
    assert batch.keys() == {*own, "completion_mask"}
    for name, tensor in own.items():
        assert torch.equal(batch[name], tensor)
    assert torch.equal(batch["completion_mask"], (labels != -100).long())
    for ids, mask, text in zip(
        batch["input_ids"],
        batch["completion_mask"],
        [*(row.answer for row in rows), *(row.rejected for row in rows)],
        strict=True,
    ):
        assert family.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip() == text


def test_orpos_batch_is_dpos_in_other_words(family: Any, rows: list[Sample]) -> None:
    dpo, orpo = PreferenceCollator(family.collator())(rows), ORPOCollator(family.collator())(rows)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([orpo.pop(f"chosen_{name}"), orpo.pop(f"rejected_{name}")]), dpo[name])
    labels = torch.cat([orpo.pop("chosen_labels"), orpo.pop("rejected_labels")])
    assert torch.equal(labels, dpo["input_ids"].masked_fill(dpo["completion_mask"] == 0, -100))
    assert orpo.keys() == dpo.keys() - {"input_ids", "attention_mask", "completion_mask"}
    assert all(torch.equal(orpo[name], dpo[name]) for name in orpo)


def test_rows_with_and_without_an_image_share_a_batch(vlm: Any, rows: list[Sample], make_sample: Make) -> None:
    mixed = [rows[0], replace(make_sample("A star.", image=False), rejected="A tree.")]
    batch = PreferenceCollator(vlm.collator())(mixed)
    assert len(batch["input_ids"]) == 4
    assert "pixel_values" in batch


def test_an_image_is_decoded_once_for_both_answers(vlm: Any, rows: list[Sample]) -> None:
    decoded = []

    class Counting:
        def load(self) -> Any:
            decoded.append(1)
            return rows[0].image.load()  # type: ignore[union-attr]

    PreferenceCollator(vlm.collator())([replace(rows[0], image=Counting())])
    assert len(decoded) == 1


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_news_text_is_shortened_alike_for_both_answers(text: Any, make_sample: Make, longer: str) -> None:
    short, long = "A star.", "A star and a tree and a fish and a heart, and then a circle and one more square."
    answers = (long, short) if longer == "chosen" else (short, long)
    row = replace(make_sample(answers[0], news="word " * 60, image=False), rejected=answers[1])
    other = replace(make_sample("A tree.", news="few words", image=False), rejected="A fish.")
    whole = max(text.collator().lengths(list(sides(row))))
    collator = text.collator(max_length=whole - 20)
    batch = PreferenceCollator(collator)([row, other])
    assert int(batch["attention_mask"].sum(1).max()) <= whole - 20
    names = ("input_ids", "attention_mask", "completion_mask")
    prompts = [
        ids[(mask == 1) & (answer == 0)].tolist()
        for ids, mask, answer in zip(*(batch[name] for name in names), strict=True)
    ]
    assert prompts[0] == prompts[2]
    assert prompts[1] == prompts[3]
    assert "few words" in text.tokenizer.decode(prompts[1])
    assert text.tokenizer.decode(prompts[0]).count("word") < 60


def test_a_row_without_a_rejected_answer_is_named(text: Any, make_sample: Make) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl line 17 has no rejected answer"):
        PreferenceCollator(text.collator())([make_sample(image=False)])
