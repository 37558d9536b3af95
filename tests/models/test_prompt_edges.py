"""Prompts with examples, vision features, decoding and search at their edges."""

from collections import Counter
from types import SimpleNamespace

import torch
from PIL import Image

from inft.evaluation.generate import Search, _generation_config, decode_captions
from inft.models import aya as aya_module
from inft.models import llama32 as llama32_module


def test_a_prompt_that_just_fits_keeps_its_examples_and_one_token_less_costs_the_first(family, make_sample):
    collator = family.collator()
    samples, shots = [make_sample(), make_sample()], [[make_sample(f"Example {n}.") for n in "abc"], []]
    collator.max_length = collator.prompts(samples, shots)["input_ids"].shape[1]
    assert collator.fitting_shots(samples, shots) == shots
    collator.max_length -= 1
    assert collator.fitting_shots(samples, shots) == [shots[0][1:], []]


def test_a_prompt_that_just_fits_is_not_shortened(family, make_sample):
    collator, sample = family.collator(), make_sample(news="a long story")
    collator.max_length = collator.prompts([sample])["input_ids"].shape[1]
    whole = collator.prompts([sample])["input_ids"]
    assert collator.shortened == 0
    collator.max_length -= 1
    assert collator.prompts([sample])["input_ids"].shape[1] < whole.shape[1]
    assert collator.shortened == 1


def test_control_tokens_in_examples_do_not_act(family, make_sample):
    collator = family.collator()
    tokens = " ".join([*(t.content for t in collator.tokenizer.added_tokens_decoder.values() if t.special), "<image>"])
    special = torch.tensor(collator.tokenizer.all_special_ids)
    counts = []
    for shot in (make_sample(f"A {tokens}", news=tokens), make_sample("A", news="news")):
        ids = collator.prompts([make_sample()], [[shot]])["input_ids"][0]
        counts.append(Counter(ids[torch.isin(ids, special)].tolist()))
    assert counts[0] == counts[1]


def test_rough_lengths_grow_with_the_text_and_with_what_an_image_becomes(aya, make_sample):
    collator = aya.collator()
    plain, news = make_sample(), make_sample(news="a long story")
    assert collator.rough_length(news, (64, 64)) - collator.rough_length(plain, (64, 64)) == len("\n\na long story")
    assert collator.rough_length(plain, (900, 100)) > collator.rough_length(plain, (64, 64))
    assert collator.rough_length(plain, (64, 64)) > collator.rough_length(plain, None) == len(plain.prompt.text)


def test_llama_features_are_means_over_an_images_own_tiles():
    patches = torch.arange(2 * 1 * 4 * 3 * 2, dtype=torch.float32).view(
        2, 1, 4, 3, 2
    )  # images, 1, tiles, patches, size
    mask = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 0]]])

    class Tower:
        device, dtype = torch.device("cpu"), torch.float32

        def __call__(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask):
            assert (pixel_values.shape[0], aspect_ratio_mask.tolist()) == (2, mask.tolist())
            return SimpleNamespace(last_hidden_state=patches)

    def image_processor(images, return_tensors):
        assert images == [["one"], ["two"]]
        return {"pixel_values": torch.zeros(2, 1, 4, 3, 8, 8), "aspect_ratio_ids": mask, "aspect_ratio_mask": mask}

    model = SimpleNamespace(model=SimpleNamespace(vision_model=Tower()))
    found = llama32_module.image_features(model, SimpleNamespace(image_processor=image_processor), ["one", "two"])
    torch.testing.assert_close(found, torch.stack([patches[0, 0, 0].mean(0), patches[1, 0, :3].mean((0, 1))]))


def test_aya_features_are_means_over_the_patches_of_one_tile_an_image(aya):
    images = [Image.new("RGB", size, "red") for size in ((64, 64), (500, 40))]
    pixels = aya.processor.image_processor(images, crop_to_patches=False, return_tensors="pt")["pixel_values"]
    model = aya.model()
    with torch.no_grad():
        found = aya_module.image_features(model, aya.processor, images)
        expected = model.model.vision_tower(pixels).last_hidden_state.mean(1)
    assert len(pixels) == 2
    torch.testing.assert_close(found, expected)


def test_the_search_is_the_one_asked_for_and_the_models_own_values_are_not(vlm):
    model, collator = vlm.model(), vlm.collator()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=40, num_beams=2)
    search = Search(do_sample=True, temperature=2.0, top_p=0.5, num_beams=3)
    config = _generation_config(model, collator, max_new_tokens=4, search=search)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 2.0, 0.5, 0)
    assert (config.num_beams, config.max_new_tokens, config.use_cache) == (3, 4, True)
    greedy = _generation_config(model, collator, max_new_tokens=4, search=Search())
    assert (greedy.do_sample, greedy.temperature, greedy.top_p, greedy.top_k) == (False, None, None, None)
    assert greedy.num_beams == 1


def test_captions_have_no_white_space_around_them(family):
    collator = family.collator()
    ids = collator.tokenizer(" \n A red star. \n", add_special_tokens=False, return_tensors="pt").input_ids
    assert decode_captions(collator, ids) == ["A red star."]
