"""Prompts: their order in a run, how rows become inputs, and which rows are refused."""

import pytest
import torch
from datasets import Dataset
from PIL import Image

from craft.ppo.prompts import ChatPromptCollator, RolloutSampler, check_inputs, check_rows


def sampler(rows, *, group, repeats=1, epoch=0, **options):
    return RolloutSampler(rows, group=group, repeats=repeats, seed=3, epoch=lambda: epoch, **options)


def test_each_group_of_rows_comes_back_for_its_ppo_epochs():
    order = list(sampler(10, group=4, repeats=3))
    assert len(order) == len(sampler(10, group=4, repeats=3)) == 36
    groups = [order[k : k + 4] for k in range(0, 36, 4)]
    assert groups[0] == groups[1] == groups[2]
    assert groups[3] == groups[4] == groups[5]
    seen = groups[0] + groups[3] + groups[6]
    assert set(seen) == set(range(10))
    assert seen[10:] == seen[:2]  # filled up with the first rows


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, second = (list(sampler(20, group=5, epoch=epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    assert list(sampler(6, group=3, shuffle=False)) == list(range(6))


def test_a_last_rollout_that_is_not_full_is_left_out_with_drop_last():
    assert len(sampler(10, group=4, drop_last=True)) == 8
    with pytest.raises(ValueError, match="train_dataset has 3 rows and a rollout 4"):
        sampler(3, group=4, drop_last=True)


def test_fewer_rows_than_a_rollout_are_repeated():
    assert sorted(sampler(2, group=5)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_texts_are_tokenised_as_they_are_and_padded_on_the_left(tokenizer):
    inputs = ChatPromptCollator(tokenizer)([{"prompt": "ab"}, {"prompt": "abcd"}])
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert tokenizer.decode(inputs["input_ids"][0, 2:]) == "ab"


def test_chat_messages_end_in_the_generation_prompt(tokenizer):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("hi", "hello")]
    inputs = ChatPromptCollator(tokenizer)(rows)
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("<|user|>hi<|end|><|assistant|>")
    assert inputs["attention_mask"].sum(1).tolist() == [5, 8]


def test_images_stand_before_the_first_user_text_or_at_their_places(vlm):
    image = Image.new("RGB", (32, 32), "red")
    collate = ChatPromptCollator(vlm.processor)
    plain = {"prompt": [{"role": "user", "content": "What?"}], "image": image}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    placed = {"prompt": [{"role": "user", "content": parts}], "images": [image]}
    first, second = collate([plain]), collate([placed])
    assert "pixel_values" in first
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert plain["prompt"] == [{"role": "user", "content": "What?"}]  # the row itself is as it was
    with pytest.raises(ValueError, match=r"'What\?' has 1 places for images, and its row has 2"):
        collate([{**placed, "images": [image, image]}])


def test_an_image_beside_plain_text_and_mixed_forms_are_refused(tokenizer):
    collate = ChatPromptCollator(tokenizer)
    with pytest.raises(ValueError, match="must be chat messages"):
        collate([{"prompt": "What?", "image": Image.new("RGB", (8, 8))}])
    with pytest.raises(ValueError, match="the processing_class is a tokenizer, which takes none"):
        collate([{"prompt": [{"role": "user", "content": "What?"}], "image": Image.new("RGB", (8, 8))}])
    with pytest.raises(ValueError, match="some prompts are text and some are chat messages"):
        collate([{"prompt": "What?"}, {"prompt": [{"role": "user", "content": "What?"}]}])


@pytest.mark.parametrize(
    "empty", ["", "  \n", [], [{"role": "user", "content": ""}], [{"role": "user", "content": None}]]
)
def test_an_empty_prompt_is_named_by_its_row(empty):
    good = "fine" if isinstance(empty, str) else [{"role": "user", "content": "fine"}]
    rows = [{"prompt": good}, {"prompt": good}, {"prompt": empty}]
    with pytest.raises(ValueError, match="row 2 of train_dataset has an empty prompt"):
        check_rows(rows, "train_dataset")
    with pytest.raises(ValueError, match="row 2 of eval_dataset has an empty prompt"):
        check_rows(Dataset.from_list(rows), "eval_dataset")


def test_data_sets_without_prompts_rows_or_length_are_refused():
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt'; it has question, answer"):
        check_rows(Dataset.from_list([{"question": "a", "answer": "b"}]), "train_dataset")
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        check_rows([], "train_dataset")
    streamed = Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset()
    with pytest.raises(TypeError, match="train_dataset is a IterableDataset, which has no length"):
        check_rows(streamed, "train_dataset")


def test_prompts_that_nothing_can_follow_are_refused():
    rows = [{"prompt": "short"}, {"prompt": "a long one"}]
    ids = torch.ones(2, 6, dtype=torch.long)
    check_inputs({"input_ids": ids, "attention_mask": torch.tensor([[0] * 4 + [1] * 2, [1] * 6])}, rows, 6)
    with pytest.raises(ValueError, match=r"prompt 'a long one' has 6 tokens; .* leaves 5"):
        check_inputs({"input_ids": ids, "attention_mask": torch.tensor([[0] * 4 + [1] * 2, [1] * 6])}, rows, 5)
    with pytest.raises(ValueError, match="prompt 'short' has no token"):
        check_inputs({"input_ids": ids, "attention_mask": torch.tensor([[0] * 6, [1] * 6])}, rows, 6)
    with pytest.raises(ValueError, match="not left-padded"):
        check_inputs({"input_ids": ids, "attention_mask": torch.tensor([[1] * 2 + [0] * 4, [1] * 6])}, rows, 6)
