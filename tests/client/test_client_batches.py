"""Batches for the model: padding that changes nothing, images as a plain call has them, refusals with the row."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from embedded_bases import absolute_base, embedded_base
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from inft.client.bases import Base
from inft.client.batches import ModelBatch, model_inputs, prepare_batch
from inft.client.errors import InvalidRequest
from inft.client.images import encode_image
from inft.client.losses.inputs import IGNORED
from inft.client.losses.token_ce import token_ce
from inft.models.templates import tokenizer_of
from inft.sample import Prompt, Sample

FAMILIES = ("text", "llama32", "aya")
VLMS = ("llama32", "aya")


def disc(colour: str, size: tuple[int, int] = (96, 64)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=colour)
    return image


RED, BLUE = disc("red"), disc("blue", (64, 128))


def base_of(family: str) -> Base:
    return absolute_base() if family == "absolute" else embedded_base(family)


def prepared(family: str, batch: Mapping[str, Any], *, max_length: int = 512, batch_size: int = 8) -> ModelBatch:
    return prepare_batch(base_of(family), batch, max_length=max_length, batch_size=batch_size)


@torch.no_grad()
def logits(family: str, model_batch: ModelBatch) -> Tensor:
    base = base_of(family)
    found: Tensor = base.model(**model_inputs(base, model_batch)).logits
    return found


def row_losses(family: str, model_batch: ModelBatch) -> Tensor:
    losses = token_ce(model_batch.batch.loss_inputs(logits(family, model_batch))).per_example_B
    assert losses is not None
    return losses


@pytest.mark.parametrize("family", [*FAMILIES, "absolute"])
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 12), st.integers(0, 5)), min_size=1, max_size=4), seed=st.integers(0, 9)
)
def test_a_padded_row_reads_as_it_does_alone(family: str, lengths: Sequence[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 1100, (length,), generator=generator).tolist() for length, _ in lengths]
    width = max(length + left for length, left in lengths) + 1
    padded = [[9] * left + row + [9] * (width - left - len(row)) for row, (_, left) in zip(rows, lengths, strict=True)]
    mask = [[0] * left + [1] * length + [0] * (width - left - length) for length, left in lengths]
    together = row_losses(family, prepared(family, {"input_ids": padded, "attention_mask": mask}))
    alone = torch.cat([row_losses(family, prepared(family, {"input_ids": [row]})) for row in rows])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "absolute"])
def test_left_padding_changes_no_logit(family: str) -> None:
    row = list(range(20, 32))
    batch = {"input_ids": [[9, 9, 9, *row], list(range(40, 55))], "attention_mask": [[0, 0, 0, *[1] * 12], [1] * 15]}
    found = logits(family, prepared(family, batch))[0, 3:]
    torch.testing.assert_close(found, logits(family, prepared(family, {"input_ids": [row]}))[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "absolute"])
def test_right_padded_rows_are_a_plain_call_of_the_model_bit_by_bit(family: str) -> None:
    base = base_of(family)
    ids = torch.arange(20, 40).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        plain = base.model(input_ids=ids, attention_mask=mask).logits
    found = logits(family, prepared(family, {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}))
    assert torch.equal(found, plain)


def test_texts_of_a_text_model_are_raw() -> None:
    batch = prepared("text", {"prompt": ["a cat", "a long dog"], "completion": [" sat", " ran"]}).batch
    tokenizer = embedded_base("text").tokenizer
    rows = [ids[mask.bool()] for ids, mask in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)]
    assert tokenizer.batch_decode(rows) == [
        "<|begin_of_text|>a cat sat<|eot_id|>",
        "<|begin_of_text|>a long dog ran<|eot_id|>",
    ]
    answers = [labels[labels != IGNORED] for labels in batch.labels_BT]
    assert tokenizer.batch_decode(answers) == [" sat<|eot_id|>", " ran<|eot_id|>"]


@pytest.mark.parametrize("family", VLMS)
def test_texts_of_a_vision_language_model_are_turns_with_an_image_and_without(family: str) -> None:
    texts = {"prompt": ["What is it?"] * 2, "completion": ["A disc.", "Nothing."]}
    mixed = prepared(family, {**texts, "images": [encode_image(RED), None]})
    bare = prepared(family, texts)
    tokenizer = tokenizer_of(embedded_base(family).processor)
    answers = [[labels[labels != IGNORED] for labels in found.batch.labels_BT] for found in (mixed, bare)]
    assert tokenizer.batch_decode(answers[0]) == tokenizer.batch_decode(answers[1])
    assert "A disc." in tokenizer.decode(answers[0][0])
    torch.testing.assert_close(row_losses(family, mixed)[1], row_losses(family, bare)[1], atol=1e-5, rtol=1e-5)
    assert abs(float(row_losses(family, mixed)[0] - row_losses(family, bare)[0])) > 1e-3


@pytest.mark.parametrize("family", VLMS)
def test_the_loss_of_image_rows_is_that_of_a_plain_transformers_call(family: str) -> None:
    base = embedded_base(family)
    prompts, answers, pictures = ["What is it?", "And this, in some more words?"], ["A disc.", "Blue"], [RED, BLUE]
    images = [encode_image(image) for image in pictures]
    found = prepared(family, {"prompt": prompts, "completion": answers, "images": images})
    loss = token_ce(found.batch.loss_inputs(logits(family, found))).loss
    losses, counts = [], []
    for prompt, answer, image in zip(prompts, answers, pictures, strict=True):
        turns = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        asked = base.processor.apply_chat_template(turns[:1], add_generation_prompt=True, **options)["input_ids"]
        plain = base.processor.apply_chat_template(turns, **options)
        labels = plain["input_ids"].clone()
        labels[:, : asked.shape[1]] = IGNORED
        with torch.no_grad():
            losses.append(base.model(**plain, labels=labels).loss)
        counts.append(int((labels != IGNORED).sum()))
    expected = sum(each * count for each, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", VLMS)
def test_the_picture_counts(family: str) -> None:
    texts = {"prompt": ["What is it?"], "completion": ["A disc."]}
    red, blue = (
        row_losses(family, prepared(family, {**texts, "images": [encode_image(image)]}))
        for image in (RED, disc("blue"))
    )
    assert float((red - blue).abs()) > 1e-4


@pytest.mark.parametrize("family", VLMS)
def test_extras_go_with_images(family: str) -> None:
    batch = {
        "prompt": ["a", "b"],
        "completion": ["c", "d"],
        "images": [None, encode_image(RED)],
        "advantages": [1.5, -2],
        "pair_ids": [3, 3],
    }
    extras = prepared(family, batch).batch.extras
    assert extras["advantages"].tolist() == [1.5, -2.0]
    assert extras["pair_ids"].tolist() == [3, 3]


def test_the_collator_of_the_base_keeps_its_bound() -> None:
    base = embedded_base("llama32")
    before = base.collator.max_length, base.collator.shortened, base.collator.dropped
    prepared("llama32", {"prompt": "a " * 300, "completion": "b", "images": [encode_image(RED)]}, max_length=4096)
    assert (base.collator.max_length, base.collator.shortened, base.collator.dropped) == before


@pytest.mark.parametrize("family", VLMS)
def test_an_image_row_above_the_bound_is_refused_with_its_number_not_cut(family: str) -> None:
    batch = {"prompt": ["a", "word " * 60], "completion": ["c", "d"], "images": [None, encode_image(RED)]}
    length = int(prepared(family, batch).batch.attention_mask_BT[1].sum())
    assert prepared(family, batch, max_length=length).batch.tokens > length
    with pytest.raises(InvalidRequest, match=r"row 1 has \d+ tokens, more than the 512 allowed"):
        prepared(family, {**batch, "prompt": ["a", "word " * 5000], "images": [encode_image(RED), None]})
    with pytest.raises(InvalidRequest, match=f"row 1 has {length} tokens.*more than the {length - 1} allowed"):
        prepared(family, batch, max_length=length - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": [[1, 2]] * 9}, "input_ids has 9 rows, more than the client's batch_size of 8"),
        ({"input_ids": torch.ones(9, 2, dtype=torch.int64)}, "input_ids has 9 rows"),
        ({"prompt": ["a"] * 9, "completion": ["b"] * 9}, "prompt has 9 rows"),
        ({"input_ids": torch.tensor(3)}, "input_ids: expected a list of rows"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "prompt has 2 rows and completion 1"),
        ({"prompt": ["a", 5], "completion": ["c", "d"]}, "prompt: row 1 is int"),
        ({"prompt": ["a"], "completion": ["\ud800"]}, "completion: row 0 has half"),
        ({"prompt": ["a", "b"], "completion": ["c", ""]}, "row 1.*empty"),
        ({"prompt": ["a"]}, "neither input_ids nor both"),
        ({"prompt": ["a"], "completion": ["b"], "image": [None]}, "did you mean 'images'"),
        ({"prompt": ["a"], "completion": ["b"], "label": [[1]]}, "did you mean 'labels'"),
        ({"prompt": ["a"], "completion": ["b"], "advantages": [1.0, 2.0]}, "advantages: 2 entries for 1 rows"),
        ({"input_ids": [[1, 2], [3]]}, "row 1 has 1 values"),
        ({"input_ids": [[1, 70000]]}, "row 0, position 1 is 70000"),
        ([1], "a batch is a mapping"),
        ({}, "neither input_ids nor both"),
    ],
)
def test_a_wrong_batch_is_refused_with_its_place(family: str, batch: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        prepared(family, batch)


def test_an_image_on_a_text_model_is_refused() -> None:
    batch = {"prompt": ["a", "b"], "completion": ["c", "d"], "images": [None, encode_image(RED)]}
    with pytest.raises(InvalidRequest, match="embedded/text is a text model"):
        prepared("text", batch)
    assert prepared("text", {**batch, "images": [None, None]}).batch.tokens > 0


def test_the_message_of_a_row_too_long_names_the_row_of_a_text_model() -> None:
    with pytest.raises(InvalidRequest, match=r"row 1 has .* tokens in prompt"):
        prepared("text", {"prompt": ["a", "a b c d e f"], "completion": ["c", "d"]}, max_length=5)


@pytest.mark.parametrize("family", VLMS)
def test_control_tokens_in_a_user_s_text_are_plain_text(family: str) -> None:
    base = embedded_base(family)
    token = base.processor.image_token
    found = prepared(family, {"prompt": [f"a {token} b"], "completion": ["c"], "images": [encode_image(RED)]})
    plain = base.collator([Sample(image=None, prompt=Prompt(instruction="a"), answer="c", language="")])
    count = int((found.batch.input_ids_BT == base.processor.image_token_id).sum())
    one = prepared(family, {"prompt": ["a b"], "completion": ["c"], "images": [encode_image(RED)]})
    assert count == int((one.batch.input_ids_BT == base.processor.image_token_id).sum()) > 0
    assert not bool((plain["input_ids"] == base.processor.image_token_id).any())


@pytest.mark.parametrize("family", VLMS)
def test_token_rows_with_images_are_the_chat_rows_they_came_from(family: str) -> None:
    texts = {"prompt": ["a", "And this, in some more words?", "b"], "completion": ["A disc.", "Blue", "c d"]}
    images = [encode_image(RED), encode_image(BLUE), None]
    chat = prepared(family, {**texts, "images": images})
    mask = chat.batch.attention_mask_BT
    # The same rows, moved to the right where they are shorter: padded on the left.
    moves = (mask == 0).sum(1).tolist()
    assert max(moves) > 0
    tokens = {
        name: torch.stack([row.roll(move) for row, move in zip(rows, moves, strict=True)]).tolist()
        for name, rows in {
            "input_ids": chat.batch.input_ids_BT,
            "attention_mask": mask,
            "labels": chat.batch.labels_BT,
        }.items()
    }
    again = prepared(family, {**tokens, "images": images})
    assert again.vision.keys() == chat.vision.keys()
    torch.testing.assert_close(row_losses(family, again), row_losses(family, chat), atol=2e-5, rtol=1e-5)
    for row in range(3):
        ids = chat.batch.input_ids_BT[row][mask[row].bool()].tolist()
        alone = prepared(family, {"input_ids": [ids], "images": [images[row]]}).batch
        placeholders = alone.input_ids_BT == embedded_base(family).processor.image_token_id
        assert bool((alone.labels_BT[placeholders] == IGNORED).all())
        assert bool((alone.labels_BT[~placeholders] != IGNORED).all())


@pytest.mark.parametrize("family", VLMS)
def test_token_rows_whose_placeholders_do_not_fit_their_images_are_refused(family: str) -> None:
    image = encode_image(RED)
    row = prepared(family, {"prompt": ["a"], "completion": ["b"], "images": [image]}).batch.input_ids_BT[0].tolist()
    bare = prepared(family, {"prompt": ["a"], "completion": ["b"]}).batch.input_ids_BT[0].tolist()
    for rows, images in (([row], [None]), ([row], None), ([bare], [image])):
        with pytest.raises(InvalidRequest, match=r"row 0 has \d+ image tokens"):
            prepared(family, {"input_ids": rows, **({} if images is None else {"images": images})})
    with pytest.raises(InvalidRequest, match="images has 2 entries for 1 rows"):
        prepared(family, {"input_ids": [row], "images": [image, image]})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
NEARLY = {
    "input_ids": st.lists(st.lists(st.integers(-1, 1170), max_size=3), max_size=3),
    "attention_mask": st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=3),
    "labels": st.lists(st.lists(st.integers(-100, 1170), max_size=3), max_size=3),
    "prompt": st.lists(st.text(max_size=4), max_size=3),
    "completion": st.lists(st.text(max_size=4), max_size=3),
    "images": st.lists(st.none() | st.just(encode_image(RED)) | st.text(max_size=8), max_size=3),
    "advantages": st.lists(st.floats(), max_size=3),
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=120, deadline=None)
@given(
    batch=st.fixed_dictionaries({}, optional={name: nearly | ANYTHING for name, nearly in NEARLY.items()})
    | st.dictionaries(st.sampled_from([*NEARLY, "image", "x"]), ANYTHING)
)
def test_whatever_a_batch_is_it_is_taken_or_refused(family: str, batch: dict[str, Any]) -> None:
    try:
        found = prepared(family, batch)
    except InvalidRequest:
        return
    assert bool(logits(family, found).isfinite().all())
