"""Tokenising pairs with a byte tokenizer: what goes in is what can be decoded again."""

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from craft.collate import PER_TOKEN, CRAFTCollator
from craft.gradcache import SEQUENCE_KEYS
from craft.pairs import has_pairs, tokenize_pairs
from craft.trainers.encode import TEXT_KEYS


def words(row: Any, suffix: str, tokenizer: Any) -> str:
    ids = row[f"input_ids{suffix}"]
    assert row[f"attention_mask{suffix}"] == [1] * len(ids)
    return tokenizer.decode(ids)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("as_table", [False, True])
def test_texts_end_in_the_end_token_and_other_columns_stay(tokenizer, as_table):
    rows = [
        {"text": "a cat", "text_tgt": "un chat", "text_neg": "a dog", "text_neg_1": "an ox", "language": "fr"},
        {"text": "sky<|end|>", "text_tgt": "空", "text_neg": "sea", "text_neg_1": "sand", "language": "zh"},
    ]
    found = tokenize_pairs(Dataset.from_list(rows) if as_table else rows, tokenizer)
    assert [words(row, "", tokenizer) for row in found] == ["a cat<|end|>", "sky<|end|>"]
    assert [words(row, "_tgt", tokenizer) for row in found] == ["un chat<|end|>", "空<|end|>"]
    assert [words(row, "_neg", tokenizer) for row in found] == ["a dog<|end|>", "sea<|end|>"]
    assert [words(row, "_neg_1", tokenizer) for row in found] == ["an ox<|end|>", "sand<|end|>"]
    assert [row["language"] for row in found] == ["fr", "zh"]
    assert "text" not in found[0]


def test_conversations_go_through_the_chat_template(tokenizer):
    rows = [{"messages": turns("hi", "yo"), "messages_tgt": turns("salut", "ça va")}]
    [row] = tokenize_pairs(rows, tokenizer)
    assert words(row, "", tokenizer) == "<|user|>hi<|end|><|assistant|>yo<|end|>"
    assert words(row, "_tgt", tokenizer) == "<|user|>salut<|end|><|assistant|>ça va<|end|>"
    [row] = tokenize_pairs(rows, tokenizer, chat_template="{% for m in messages %}{{ m['content'] }};{% endfor %}")
    assert words(row, "", tokenizer) == "hi;yo;"


@pytest.mark.parametrize(
    ("prompt", "completion", "whole"),
    [
        ("1+1=", "2", "1+1=2<|end|>"),
        (turns("1+1"), turns("", "2")[1:], "<|user|>1+1<|end|><|assistant|>2<|end|>"),
    ],
)
def test_a_prompt_and_its_completion_are_one_text(tokenizer, prompt, completion, whole):
    rows = [{"prompt": prompt, "completion": completion, "text_tgt": "two"}]
    [row] = tokenize_pairs(rows, tokenizer)
    assert words(row, "", tokenizer) == whole
    assert words(row, "_tgt", tokenizer) == "two<|end|>"
    assert "prompt" not in row


def test_tokens_are_those_that_trl_trains_on(tokenizer, tiny_llama, tmp_path):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=9, dataset_num_proc=None)
    for anchor in ({"text": "a cat sat"}, {"messages": turns("hi", "yo")}, {"prompt": "1+", "completion": "1"}):
        rows = Dataset.from_list([anchor])
        trainer = SFTTrainer(tiny_llama, config, train_dataset=rows, processing_class=tokenizer)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        [pair] = tokenize_pairs([{**anchor, "text_tgt": "x"}], tokenizer, max_length=9)
        assert batch["input_ids"].tolist() == [pair["input_ids"]]


def test_tokens_that_are_there_get_a_mask_and_keep_what_belongs_to_them(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "input_ids_tgt": [8, 9], "attention_mask_tgt": [0, 1]}]
    [row] = tokenize_pairs(rows, tokenizer, max_length=2)
    assert row == {
        "input_ids": [5, 6],
        "labels": [-100, 6],
        "attention_mask": [1, 1],
        "input_ids_tgt": [8, 9],
        "attention_mask_tgt": [0, 1],
    }


@pytest.mark.parametrize("as_tensors", [False, True])
def test_every_column_of_tokens_is_cut_with_its_text(tokenizer, as_tensors):
    make = torch.tensor if as_tensors else list
    row = {f"{name}{end}": make([1] * length) for end, length in (("", 4), ("_tgt", 3)) for name in PER_TOKEN}
    [found] = tokenize_pairs([row], tokenizer, max_length=2)
    assert found == {name: [1, 1] for name in row}
    batch = CRAFTCollator()([found, tokenize_pairs([row], tokenizer, max_length=1)[0]])
    assert {tuple(values.shape) for values in batch.values()} == {(2, 2)}
    assert set(PER_TOKEN) <= set(SEQUENCE_KEYS)
    assert set(PER_TOKEN) <= set(TEXT_KEYS)


@pytest.mark.parametrize("rows", [[{"input_ids": [1, 2], "pos": [3, 4]}], [{"text": "a", "text_tgt": "b"}]])
def test_token_columns_may_have_names_of_their_own(tokenizer, rows):
    keys = {"positive_input_ids": "pos", "positive_attention_mask": "pos_mask"}
    [row] = tokenize_pairs(rows, tokenizer, contrastive_keys=keys, max_length=1)
    assert set(row) == {"input_ids", "attention_mask", "pos", "pos_mask"}
    assert len(row["pos"]) == len(row["pos_mask"]) == 1


def test_streams_are_tokenised_as_they_come(tokenizer):
    stream = Dataset.from_list([{"text": "a", "text_tgt": "b", "language": "fr"}]).to_iterable_dataset()
    [row] = tokenize_pairs(stream, tokenizer)
    assert (words(row, "_tgt", tokenizer), row["language"]) == ("b<|end|>", "fr")


def test_each_text_is_cut_by_itself_and_no_row_moves(tokenizer):
    rows = [{"text": "a" * i, "text_tgt": "b" * (9 - i), "id": i} for i in range(1, 9)]
    found = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=4)
    for i, row in enumerate(found, 1):
        assert words(row, "", tokenizer) == ("a" * i + "<|end|>" if i < 4 else "aaaa")
        assert words(row, "_tgt", tokenizer) == ("b" * (9 - i) + "<|end|>" if i > 5 else "bbbb")
        assert row["id"] == i


def test_a_text_field_by_another_name(tokenizer):
    [row] = tokenize_pairs([{"caption": "x", "caption_tgt": "y"}], tokenizer, text_field="caption")
    assert words(row, "_tgt", tokenizer) == "y<|end|>"


def test_columns_that_are_not_of_the_tokens_stay_as_they_are(tokenizer):
    rows = [
        {"text": "a", "text_tgt": "b", "labels": 1, "special_tokens_mask": "none"},
        {"src": [1, 2, 3], "input_ids_tgt": [1], "input_ids": [4, 5], "labels": [-100, 5]},
    ]
    [row] = tokenize_pairs(rows[:1], tokenizer, max_length=1)
    assert (row["labels"], row["special_tokens_mask"]) == (1, "none")
    [row] = tokenize_pairs(rows[1:], tokenizer, max_length=1, contrastive_keys={"anchor_input_ids": "src"})
    assert (row["src"], row["input_ids"], row["labels"]) == ([1], [4, 5], [-100, 5])


def test_a_text_field_of_the_trainer_leaves_texts_by_their_usual_name(tokenizer):
    [row] = tokenize_pairs([{"text": "x", "text_tgt": "y"}], tokenizer, text_field="content")
    assert words(row, "_tgt", tokenizer) == "y<|end|>"


def test_anchor_positive_and_negative_are_texts(tokenizer):
    [row] = tokenize_pairs([{"anchor": "x", "positive": turns("y"), "negative": "z"}], tokenizer)
    assert words(row, "", tokenizer) == "x<|end|>"
    assert words(row, "_tgt", tokenizer) == "<|user|>y<|end|>"
    assert words(row, "_neg", tokenizer) == "z<|end|>"
    assert row.keys() == {f"{name}{end}" for name in ("input_ids", "attention_mask") for end in ("", "_tgt", "_neg")}


class OwnRows(torch.utils.data.Dataset):
    """A data set of torch, which has no columns and no end but its length."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.read.append(index)
        return {"text": "a" * index, "text_tgt": "b", "id": index}


def test_rows_of_a_data_set_of_torch_are_tokenised_when_they_are_read(tokenizer):
    rows = OwnRows()
    found = tokenize_pairs(rows, tokenizer)
    rows.read.clear()
    assert (words(found[2], "", tokenizer), found[2]["id"], len(found)) == ("aa<|end|>", 2, 3)
    assert set(rows.read) == {2}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), r"DatasetDict of train.*pairs\['train'\]"),
        ({"text": ["a"], "text_tgt": ["b"]}, "dict of text, text_tgt.*from_dict"),
        (["a", "b"], "rows of the pairs .list. are str.*craft_collator"),
        ([("a", "b")], "rows of the pairs .list. are tuple.*'text_tgt'"),
        (iter([{"text": "a", "text_tgt": "b"}]), "list_iterator, which has no numbered rows.*IterableDataset"),
        ([], "no column of positives: found no column"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_data_set_of_rows_is_refused_with_the_remedy(tokenizer, pairs, message):
    assert not has_pairs(pairs)
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(pairs, tokenizer)


def test_texts_need_a_tokenizer_and_tokens_none():
    with pytest.raises(ValueError, match=r"texts \(text, text_tgt\) and there is no tokenizer. .*processing_class="):
        tokenize_pairs([{"text": "a", "text_tgt": "b"}], None)
    assert tokenize_pairs([{"input_ids": [1], "input_ids_tgt": [2]}], None)


def test_a_row_without_a_column_of_the_others_is_named(tokenizer):
    with pytest.raises(ValueError, match="row 1 has no text_tgt"):
        tokenize_pairs([{"text": "a", "text_tgt": "b"}, {"text": "a"}], tokenizer)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a"}, {}, "no column of positives: found text.*text_tgt"),
        ({"caption": "a", "text_tgt": "b"}, {}, "no column of anchors: found caption, text_tgt.*text_field="),
        ({"text": "a", "text_tgt": ""}, {}, "row 0: text_tgt has no token"),
        ({"text": "a", "text_tgt": None}, {}, "row 0 has no text_tgt"),
        ({"messages": [], "text_tgt": "b"}, {}, "row 0: messages has no token"),
        (
            {"input_ids": [1, 2], "attention_mask": [0, 1], "text_tgt": "b"},
            {"max_length": 1},
            "row 0: input_ids has no token within the first max_length=1 tokens",
        ),
        ({"input_ids": [1, 2], "labels": [1], "text_tgt": "b"}, {}, "row 0: labels has 1 entries for 2 tokens"),
        ({"text": 3, "text_tgt": "b"}, {}, "text must be text, or lists of messages"),
        ({"anchor": [3, 4], "positive": [5]}, {}, "anchor must be text, or lists of messages.*craft_contrastive_keys"),
        ({"content": "a"}, {"text_field": "content"}, "no column of positives: found content.*content_tgt"),
        ({"text": "a", "text_tgt": "b"}, {"max_length": 0}, "max_length=0 must be at least 1"),
    ],
)
def test_pairs_that_cannot_be_tokenised_are_named(tokenizer, row, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_pairs([row], tokenizer, **options)


def test_conversations_need_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenize_pairs([{"messages": turns("a"), "messages_tgt": turns("b")}], tokenizer)
