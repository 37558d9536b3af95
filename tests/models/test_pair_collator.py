"""PairCollator: two sides through the family's own collator, the answer as what is pooled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from inft.models.pairs import PairCollator
from inft.sample import Pair, Sample

Make = Callable[..., Sample]


@pytest.fixture
def pairs(make_sample: Make) -> list[Pair]:
    """Two translations without images, as translation_pairs makes them."""
    texts = [("A red circle.", "Un rond rouge, et il est grand."), ("A large blue star.", "Une étoile.")]
    return [
        Pair(anchor=make_sample(a, image=False), positive=make_sample(b, image=False), id=number)
        for number, (a, b) in enumerate(texts, start=5)
    ]


def test_both_sides_are_what_the_collator_makes_of_them(family: Any, pairs: list[Pair]) -> None:
    collator = family.collator()
    batch = PairCollator(collator)(pairs)
    for side, suffix in (("anchor", ""), ("positive", "_tgt")):
        own = collator([getattr(pair, side) for pair in pairs])
        labels = own.pop("labels")
        for name, tensor in own.items():
            assert torch.equal(batch[name + suffix], tensor)
        assert torch.equal(batch[f"craft_pooling_mask{suffix}"], labels != -100)
    assert batch["craft_sample_ids"].tolist() == [5, 6]
    assert not any(name.startswith("labels") for name in batch)


def test_what_is_pooled_is_the_answer_and_its_end(family: Any, pairs: list[Pair]) -> None:
    batch = PairCollator(family.collator())(pairs)
    for pair, ids, mask in zip(pairs, batch["input_ids_tgt"], batch["craft_pooling_mask_tgt"], strict=True):
        text = family.tokenizer.decode(ids[mask], skip_special_tokens=True)
        assert text.strip() == pair.positive.answer


def test_a_side_may_have_an_image_and_the_other_none(vlm: Any, make_sample: Make) -> None:
    pair = Pair(anchor=make_sample("A red circle."), positive=make_sample("Un rond.", image=False), id=1)
    batch = PairCollator(vlm.collator())([pair, pair])
    assert "pixel_values" in batch
    assert "pixel_values_tgt" not in batch


def test_ids_of_the_whole_range_survive(text: Any, make_sample: Make) -> None:
    sample = make_sample(image=False)
    batch = PairCollator(text.collator())([Pair(anchor=sample, positive=sample, id=2**63 - 1)])
    assert batch["craft_sample_ids"].dtype == torch.int64
    assert batch["craft_sample_ids"].item() == 2**63 - 1


def test_the_length_of_a_pair_is_that_of_its_longer_side(family: Any, pairs: list[Pair]) -> None:
    collator = PairCollator(family.collator())
    batch = collator(pairs)
    sides = torch.stack([batch["attention_mask"].sum(1), batch["attention_mask_tgt"].sum(1)])
    assert collator.lengths(pairs) == sides.amax(0).tolist()


def test_every_family_encodes_a_text_only_batch_with_adapters_in_training(family: Any, pairs: list[Pair]) -> None:
    model = family.model().train()
    batch = PairCollator(family.collator())(pairs)
    for suffix in ("", "_tgt"):
        inputs = {name: batch[name + suffix] for name in ("input_ids", "attention_mask")}
        alone = {name: tensor[:1, : int(inputs["attention_mask"][0].sum())] for name, tensor in inputs.items()}
        hidden = model.base_model(**inputs).last_hidden_state
        assert torch.isfinite(hidden).all()
        expected = model.base_model(**alone).last_hidden_state[0]
        assert torch.allclose(hidden[0, : len(expected)], expected, atol=1e-4)
