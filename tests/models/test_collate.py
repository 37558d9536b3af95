"""Collators: what is supervised, what is cut, what is passed on."""

from collections import Counter
from copy import copy

import pytest
import torch
from torch.utils.data import DataLoader

from inft.models.collate import IGNORED, CaptionCollator, character_ends
from params import UserError

LONG_NEWS = "The harbour was closed on Monday. " * 40
END = {"llama32": "<|eot_id|>", "aya": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "text": "<|eot_id|>"}
LEAD = {"llama32": "", "aya": "<|START_RESPONSE|>", "text": ""}


def supervised(collator, batch, row):
    return collator.tokenizer.decode(batch["labels"][row][batch["labels"][row] != IGNORED])


def real(batch, row, key="input_ids"):
    return batch[key][row][batch["attention_mask"][row].bool()]


def length(batch, row=0):
    return int(batch["attention_mask"][row].sum())


@pytest.fixture(params=["marked template", "template of its own"])
def collator_of(request):
    """Collators of each kind of template: one that marks the answer, and one that has to be taken apart."""

    def make(family, **options):
        collator = family.collator(**options)
        if request.param == "template of its own" and family.spec.takes_images:
            processor = family.spec.collator(family.processor).processor
            own = type("Foreign", (family.spec.collator,), {"family_template": None})
            collator = own(processor, **options)
            assert collator.frame is not None
        return collator

    return make


def test_the_answer_and_its_end_of_turn_are_supervised(family, collator_of, make_sample):
    collator = collator_of(family)
    batch = collator([make_sample("A red circle."), make_sample("دائرة حمراء")])
    name = family.spec.name
    assert supervised(collator, batch, 0) == f"{LEAD[name]}A red circle.{END[name]}"
    assert supervised(collator, batch, 1) == f"{LEAD[name]}دائرة حمراء{END[name]}"


def test_prompt_and_supervised_tokens_make_the_whole_row(family, collator_of, make_sample):
    collator = collator_of(family)
    samples = [make_sample("Un cercle rouge.", news="Il fait beau."), make_sample("x"), make_sample("红", image=False)]
    batch, prompts = collator(samples), collator.prompts(samples)
    for row in range(len(samples)):
        whole, prompt = real(batch, row), real(prompts, row)
        learned = batch["labels"][row][batch["labels"][row] != IGNORED]
        assert torch.equal(whole[: len(prompt) + len(learned)], torch.cat([prompt, learned]))


def test_prompts_end_where_generation_begins(family, make_sample):
    batch = family.collator().prompts([make_sample(), make_sample(news="longer than the other")])
    assert bool(batch["attention_mask"][:, -1].all()), "padded on the left"
    assert "labels" not in batch


def test_the_end_token_is_the_last_supervised_one(family, collator_of, make_sample):
    collator = collator_of(family)
    labels = collator([make_sample()])["labels"][0]
    assert collator.end_token_id == labels[labels != IGNORED][-1]


SIZES = ((1, 1), (64, 64), (65, 64), (96, 64), (64, 200), (500, 40), (3, 300), (128, 128), (1000, 700))


def test_lengths_are_those_of_collated_rows_whatever_the_image_size(family, collator_of, make_sample):
    collator = collator_of(family)
    samples = [make_sample(news="news " * (5 * i), size=size) for i, size in enumerate(SIZES)]
    samples += [make_sample("රතු රවුමක්", image=False), make_sample(" <|image|> <image> ", news="TILE_1")]
    assert collator.lengths(samples) == [length(collator([sample])) for sample in samples]
    assert len(set(collator.lengths(samples))) > 2


def test_lengths_are_found_without_processing_an_image(family, make_sample, monkeypatch):
    collator, samples = family.collator(max_length=12), [make_sample(news=LONG_NEWS)]
    monkeypatch.setattr(collator, "_process", None)  # the way to the processor
    monkeypatch.setattr(collator, "_encode", None)
    assert collator.lengths(samples)[0] > 200


def test_lengths_of_a_processor_that_must_see_the_pixels_are_exact_too(vlm, make_sample):
    own = type("Unknowing", (vlm.spec.collator,), {"_image_text": CaptionCollator._image_text})
    for samples in ([make_sample(), make_sample(image=False), make_sample(news="news")], [make_sample()], []):
        assert own(vlm.processor).lengths(samples) == vlm.collator().lengths(samples)


def test_rows_are_measured_in_portions(text, make_sample, monkeypatch):
    monkeypatch.setattr("inft.models.collate.MEASURED", 2)
    samples = [make_sample(news="news " * count) for count in range(5)]
    assert text.collator().lengths(samples) == [length(text.collator()([sample])) for sample in samples]


def test_a_marked_template_that_prompts_for_something_else_is_refused(vlm):
    processor, generation = copy(vlm.processor), "{%- if add_generation_prompt -%}{{- "
    processor.chat_template = vlm.spec.chat_template.replace(generation, f"{generation}'<think> think long ' + ")
    with pytest.raises(UserError, match="does not begin with the tokens of the chat template's generation prompt"):
        vlm.spec.collator(processor)


def test_the_processor_is_called_once(vlm, make_sample, monkeypatch):
    collator, calls = vlm.collator(), Counter()
    original = type(vlm.processor).__call__

    def counted(self, *args, **kwargs):
        calls["processor"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(vlm.processor), "__call__", counted)
    collator([make_sample(), make_sample(image=False)])
    assert calls["processor"] == 1


def test_every_tensor_of_the_processor_is_passed_on(vlm, make_sample):
    batch = vlm.collator()([make_sample()])
    extra = {"llama32": {"aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"}, "aya": set()}
    expected = {"input_ids", "attention_mask", "labels", "pixel_values"} | extra[vlm.spec.name]
    assert set(batch) == expected
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_image_tiles_are_laid_out_channels_last(vlm, make_sample):
    batch = vlm.collator()([make_sample(), make_sample(colour="blue")])
    pixels = batch["pixel_values"]
    tiles = pixels.flatten(end_dim=-4)
    assert tiles.data_ptr() == pixels.data_ptr(), "merging rows, images and tiles copies nothing"
    assert tiles.is_contiguous(memory_format=torch.channels_last)
    plain = {**batch, "pixel_values": pixels.contiguous()}
    with torch.no_grad():
        model = vlm.model()
        torch.testing.assert_close(model(**batch).logits, model(**plain).logits, atol=1e-5, rtol=1e-5)


def test_rows_may_come_wrapped_in_a_dict(family, make_sample):
    collator = family.collator()
    plain, wrapped = collator([make_sample()]), collator([{"sample": make_sample()}])
    assert torch.equal(plain["labels"], wrapped["labels"])


def test_control_tokens_in_user_text_do_not_act(family, make_sample):
    collator = family.collator()
    tokens = [t.content for t in collator.tokenizer.added_tokens_decoder.values() if t.special]
    tokens += ["<image>", "<|image|>", "<|IMG_PATCH|>"]
    hostile = make_sample("A " + " ".join(tokens), news=" ".join(tokens), instruction="Do it. " + tokens[-1])
    plain = make_sample("A circle", news="news", instruction="Do it.")
    special = torch.tensor(collator.tokenizer.all_special_ids)
    counts = [
        Counter(real(collator([sample]), 0)[torch.isin(real(collator([sample]), 0), special)].tolist())
        for sample in (hostile, plain)
    ]
    assert counts[0] == counts[1]


def test_image_tokens_match_image_features(vlm, make_sample):
    batch = vlm.collator()([make_sample(news="<image> <|image|>"), make_sample(image=False), make_sample()])
    tokens, features = vlm.spec.image_token_count(vlm.processor, batch)
    assert tokens == features > 0


def test_a_pad_token_that_is_the_end_token_stays_supervised(text, make_sample):
    collator = text.collator()
    pad = collator.tokenizer.pad_token
    try:
        collator.tokenizer.pad_token = collator.tokenizer.eos_token
        batch = collator([make_sample("A"), make_sample("A much longer answer than the other")])
    finally:
        collator.tokenizer.pad_token = pad
    assert supervised(collator, batch, 0) == "A<|eot_id|>"
    assert (batch["labels"][0] == collator.tokenizer.eos_token_id).sum() == 1


def test_news_text_is_shortened_to_fit_exactly(family, collator_of, make_sample):
    sample = make_sample("A red circle.", news=LONG_NEWS)
    whole = collator_of(family)([sample])
    collator = collator_of(family, max_length=length(whole) - 100)
    batch = collator([sample])
    assert collator.max_length - 3 < length(batch) <= collator.max_length
    assert collator.shortened == 1
    assert supervised(collator, batch, 0) == supervised(collator, whole, 0)
    text = collator.tokenizer.decode(real(batch, 0))
    assert sample.prompt.instruction in text
    assert LONG_NEWS[:100] in text


def test_shortening_leaves_the_other_rows_alone(family, make_sample):
    short, long = make_sample("B", news="a word"), make_sample("A", news=LONG_NEWS)
    limit = length(family.collator()([long])) - 50
    together = family.collator(max_length=limit)([short, long])
    assert torch.equal(real(together, 0), real(family.collator()([short]), 0))


def test_prompts_are_shortened_too_and_never_dropped(family, make_sample):
    collator = family.collator(max_length=length(family.collator()([make_sample()])) + 20, over_length="drop")
    prompts = collator.prompts([make_sample(news=LONG_NEWS), make_sample()])
    assert len(prompts["input_ids"]) == 2
    assert prompts["attention_mask"].sum(1).max() <= collator.max_length


def test_a_row_that_cannot_fit_is_named_with_the_remedy(family, make_sample):
    collator = family.collator(max_length=12)
    remedy = r"train.jsonl line 17 has \d+ tokens, above max_length=12. Raise basic.max_length"
    with pytest.raises(UserError, match=remedy + r".* does not fit even without its news text"):
        collator([make_sample("A red circle on the left.", news=LONG_NEWS)])


def test_long_rows_are_dropped_and_counted(family, make_sample):
    rows = [make_sample("A", news=LONG_NEWS), make_sample("B")]
    collator = family.collator(max_length=length(family.collator()(rows[:1])) - 1, over_length="drop")
    batch = collator(rows)
    assert len(batch["labels"]) == 1
    assert supervised(collator, batch, 0).removeprefix(LEAD[family.spec.name]).startswith("B")
    assert (collator.dropped, collator.shortened) == (1, 0)


def test_a_batch_that_lost_every_row_is_an_error(family, make_sample):
    collator = family.collator(max_length=20, over_length="drop")
    with pytest.raises(UserError, match=r"every row of a batch was dropped: train.jsonl line 17"):
        collator([make_sample(news=LONG_NEWS)])


def test_long_rows_can_be_errors(family, make_sample):
    collator = family.collator(max_length=20, over_length="error")
    with pytest.raises(UserError, match=r"line 17 has .* or set sft.over_length to shorten or drop"):
        collator([make_sample(news=LONG_NEWS)])


def test_an_empty_answer_is_named(family, make_sample):
    with pytest.raises(UserError, match="line 3: the answer is empty"):
        family.collator()([make_sample(), make_sample("  \n", where="line 3")])


def test_workers_count_too(text, make_sample):
    collator = text.collator(max_length=length(text.collator()([make_sample()])) + 5)
    rows = [make_sample(news=LONG_NEWS) for _ in range(4)]
    assert len(list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=collator))) == 2
    assert collator.shortened == 4


def test_a_text_only_batch_has_no_image_tensors(vlm, make_sample):
    batch = vlm.collator()([make_sample(image=False), make_sample("B", image=False)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert torch.isfinite(vlm.model()(**batch).loss)


def test_a_mixed_batch_gives_each_row_the_logits_it_has_alone(vlm, make_sample):
    model, collator = vlm.model(), vlm.collator()
    rows = [
        make_sample("A red circle."),
        make_sample("Text.", image=False),
        make_sample("B", news="news", colour="blue"),
    ]
    batch = collator(rows)
    with torch.no_grad():
        together = model(**batch).logits
        for i, row in enumerate(rows):
            alone = model(**collator([row])).logits[0]
            torch.testing.assert_close(real({**batch, "logits": together}, i, "logits"), alone, atol=2e-5, rtol=1e-4)


def test_texts_are_cut_between_characters_only():
    family_emoji, conjunct = "👩\u200d👩\u200d👧", "ක්\u200dෂ"
    assert character_ends(f"a{family_emoji}b") == [1, 6, 7]
    assert character_ends(f"{conjunct}ේ") == [5]
    assert character_ends("e\u0301x") == [2, 3]
    assert character_ends("") == []
