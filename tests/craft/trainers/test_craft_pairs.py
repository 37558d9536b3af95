"""Which pairs a trainer reads, in whatever form they come, and what it says of those that it cannot read."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from craft import CRAFTCollator
from craft.collate import PER_TOKEN, TOKEN_INPUTS
from craft.fields import ContrastiveKeys
from craft.trainers.encode import anchor_rows, split_sides

TEXTS = [{"text": f"cat {i}", "text_tgt": f"chat {i}"} for i in range(12)]


def renamed(**names: str) -> list[dict[str, str]]:
    return [{names.get(name, name): text for name, text in row.items()} for row in TEXTS]


def tagged(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """With a column that is no number before the others."""
    return [{"language": "fr", **row} for row in rows]


class OwnRows(torch.utils.data.Dataset[dict[str, str]]):
    """Pairs of texts as a data set of torch."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict[str, str]:
        return TEXTS[index]


PAIRS_AS_THEY_COME: dict[str, Any] = {
    "anchor and positive": Dataset.from_list(renamed(text="anchor", text_tgt="positive")),
    "list of texts": TEXTS,
    "data set of torch": OwnRows(),
    "field of the trainer": Dataset.from_list(renamed(text="content", text_tgt="content_tgt")),
    "stream": Dataset.from_list(TEXTS).to_iterable_dataset(),
    "stream with another column": Dataset.from_list(tagged(TEXTS)).to_iterable_dataset(),
    "list with another column": tagged(TEXTS),
}


@pytest.mark.parametrize("collator", [{}, {"craft_collator": CRAFTCollator()}], ids=["default", "CRAFTCollator"])
@pytest.mark.parametrize("form", PAIRS_AS_THEY_COME)
def test_pairs_train_in_whatever_form_they_come(make_trainer, form, collator):
    sft = Dataset.from_list([{"content": f"a cat {i}"} for i in range(24)])
    trainer = make_trainer(sft, PAIRS_AS_THEY_COME[form], trainer=dict(collator), dataset_text_field="content")
    trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] > 0


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (Dataset.from_list([{"premise": "a", "hypothesis": "b"}] * 4), "found premise, hypothesis.*Rename the column"),
        ([{"text": "a"}] * 4, "no column of positives: found text.*text_tgt"),
        (
            [{"conversations": "a", "text_tgt": "b"}] * 4,
            "no column of anchors: found conversations, text_tgt.*messages",
        ),
        (["a", "b"], "rows of the pairs .list. are str"),
        (iter(TEXTS), "list_iterator, which has no numbered rows"),
    ],
    ids=["other names", "one text", "ShareGPT", "no columns", "iterator"],
)
def test_pairs_that_cannot_be_read_are_refused_with_their_columns_and_the_remedy(make_trainer, rows, pairs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(rows(8), pairs)


class TextStream(torch.utils.data.IterableDataset[dict[str, str]]):
    """Pairs of texts as a stream of torch."""

    def __iter__(self) -> Any:
        return iter(TEXTS)


def test_a_stream_of_texts_that_shows_no_columns(make_trainer, rows):
    trainer = make_trainer(rows(8), TextStream())
    with pytest.raises(ValueError, match=r"no column of tokens: found text, text_tgt. .*tokenize_pairs"):
        trainer.train()


def test_rows_of_any_kind_go_to_a_collator_of_their_own_as_they_are(make_trainer, rows, tokenizer):
    seen: list[Any] = []

    def collate(pairs: list[Any]) -> Any:
        seen.extend(pairs)
        ids = [tokenizer(pair if isinstance(pair, str) else pair["text"])["input_ids"] for pair in pairs]
        return CRAFTCollator()([{"input_ids": row, "input_ids_tgt": row[::-1]} for row in ids])

    for pairs in (["a cat", "a dog", "the sea", "the sky"], Dataset.from_list(TEXTS)):
        make_trainer(rows(16), pairs, trainer={"craft_collator": collate}).train()
    assert "a cat" in seen
    assert TEXTS[0] in seen


def test_pairs_of_a_kind_of_their_own_beside_a_factory(make_trainer, rows, pairs):
    def loaders(trainer: Any) -> Any:
        return [
            DataLoader(each, batch_size=2, collate_fn=CRAFTCollator()) for each in (trainer.train_dataset, pairs(8))
        ]

    trainer = make_trainer(rows(8), ["a", "b"], trainer={"craft_loader_factory": lambda own: tuple(loaders(own))})
    trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] > 0


KEYS = ContrastiveKeys({"anchor_input_ids": "src"})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(2, 3)}, "no column 'src'; it has x. .*tokenize_pairs.*craft_contrastive_keys"),
        ({"src": [[1], [2]]}, "column 'src' of a contrastive batch is a list.*CRAFTCollator"),
    ],
)
def test_a_batch_without_anchors(batch, message):
    with pytest.raises(ValueError, match=message):
        anchor_rows(batch, KEYS)


def test_anchors_are_counted_by_the_name_they_have():
    ids = torch.ones(2, 3, dtype=torch.int64)
    assert anchor_rows({"src": ids[:1], "input_ids": ids, "input_ids_tgt": ids}, KEYS) == 1
    assert anchor_rows({"input_ids": ids, "input_ids_tgt": ids}, KEYS) == 2


def test_no_mark_of_a_token_goes_to_the_model():
    ids = torch.ones(2, 3, dtype=torch.int64)
    ends = ("", "_tgt", "_neg", "_neg_1")
    batch = {f"{name}{end}": ids for name in PER_TOKEN for end in ends}
    anchor, positive, negatives = split_sides({**batch, "src": 2 * ids}, KEYS)
    assert len(negatives) == 2
    for side in (anchor, positive, *negatives):
        assert set(side.inputs) == set(TOKEN_INPUTS)
        assert side.ids_B.all()  # a text and nothing else
    assert (anchor.inputs["input_ids"] == 2).all()
    with pytest.raises(ValueError, match="no column 'input_ids_neg_2'"):
        split_sides({**batch, "attention_mask_neg_2": ids}, KEYS)


def test_a_custom_loader_of_pairs_that_are_no_tokens(make_trainer, rows, pairs):
    loader = DataLoader(pairs(8).rename_column("input_ids", "src"), batch_size=2, collate_fn=CRAFTCollator())
    trainer = make_trainer(rows(8), pairs(8), trainer={"craft_contrastive_loader": loader})
    with pytest.raises(ValueError, match=r"no column 'input_ids'; it has src.*craft_contrastive_keys"):
        trainer.train()
