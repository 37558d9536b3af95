"""Few-shot examples: of the row's language, never of its own article or picture, the nearest ones by their images."""

from dataclasses import replace

import pytest
from rich.console import Console
from tiny_captioners import captioner_of, eval_params

from inft.data.batches import load_samples
from inft.evaluation.evaluate import evaluate
from inft.evaluation.fewshot import random_shots, similar_shots
from inft.evaluation.generate import generate_captions
from inft.evaluation.rows import load_rows
from params import MUNIChusLoadConfig, UserError

CONFIG = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en", "ur"), eval_fraction=0.0)


@pytest.fixture(scope="module")
def examples():
    return load_samples(
        replace(CONFIG, split="train", max_rows_per_lang=60), quarantine_file=None, with_images=True
    ).train


@pytest.fixture(scope="module")
def rows():
    return load_rows(CONFIG, limit=8, with_images=True).rows


def test_examples_are_of_the_rows_own_language(examples, rows):
    shots = random_shots(examples, count=3, seed=1)
    for row in rows:
        assert [sample.language for sample in shots(row)] == [row.sample.language] * 3
        assert len({sample.meta["title"] for sample in shots(row)}) == 3


def test_random_examples_follow_the_seed_and_the_row_alone(examples, rows):
    first, again, other = (random_shots(examples, count=2, seed=seed) for seed in (1, 1, 2))
    assert [first(row) for row in rows] == [again(row) for row in reversed(rows)][::-1]
    assert any(first(row) != other(row) for row in rows)


def test_a_rows_own_article_and_picture_are_no_example(examples, rows):
    row = rows[0]
    twin = replace(examples[0], image=row.sample.image, language=row.sample.language)
    same_article = replace(examples[0], meta={**examples[0].meta, "title": row.sample.meta["title"]})
    pool = [twin, replace(same_article, language=row.sample.language)]
    with pytest.raises(UserError, match="has 0 rows in language 'en' to take 1 examples"):
        random_shots(pool, count=1, seed=0)(row)


@pytest.mark.parametrize("name", ["llama32", "aya"])
def test_similar_examples_are_nearest_in_the_models_own_vision_features(name, examples, rows):
    captioner = captioner_of(name)
    shots = similar_shots(captioner, examples, count=3)

    def alike(samples, row):  # of figure, colour, size and place
        seen = row.sample.meta["scene"].items()
        return sum(sample.meta["scene"][key] == value for sample in samples for key, value in seen) / len(samples)

    near = [alike(shots(row), row) for row in rows]
    chance = [alike([s for s in examples if s.language == row.sample.language], row) for row in rows]
    assert sum(near) > sum(chance) + 0.75 * len(rows)  # attributes a picture


def test_the_nearest_example_stands_next_to_the_prompt(examples, rows):
    captioner = captioner_of("aya")
    row = rows[0]
    three, one = (similar_shots(captioner, examples, count=count)(row) for count in (3, 1))
    assert three[-1] == one[0]


def test_text_models_have_no_similar_images(examples):
    with pytest.raises(UserError, match=r"text models take none: use --shot-choice random"):
        similar_shots(captioner_of("text"), examples, count=1)


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_examples_are_answered_turns_before_the_prompt(name, examples, rows):
    collator = captioner_of(name).collator
    shots = random_shots(examples, count=2, seed=1)
    batch = collator.prompts([row.sample for row in rows[:2]], [shots(row) for row in rows[:2]])
    for row, ids in zip(rows, batch["input_ids"], strict=False):
        text = collator.tokenizer.decode(ids)
        places = [text.index(sample.answer) for sample in shots(row)]
        assert places == sorted(places)
        assert text.rindex(row.sample.prompt.instruction) > places[-1]
        assert row.sample.answer not in text
    if name != "text":
        images = {"llama32": "aspect_ratio_ids", "aya": "pixel_values"}[name]
        assert batch[images].shape[-1 if name == "llama32" else 0] >= 3


def test_prompts_that_are_too_long_lose_examples_and_no_row(examples, rows):
    captioner = captioner_of("llama32")
    samples, shots = [row.sample for row in rows[:3]], random_shots(examples, count=4, seed=1)
    before = [shots(row) for row in rows[:3]]
    room = int(captioner.collator.prompts(samples, [b[:2] for b in before])["attention_mask"].sum(1).max())
    captioner.collator.max_length = room
    kept = captioner.collator.fitting_shots(samples, before)
    batch = captioner.collator.prompts(samples, kept)
    assert int(batch["attention_mask"].sum(1).max()) <= room
    assert len(batch["input_ids"]) == 3
    for whole, left in zip(before, kept, strict=True):
        assert 1 <= len(left) < 4
        assert left == whole[-len(left) :]  # the nearest ones, which stand last, stay


def test_the_examples_that_had_room_are_counted_and_none_at_all_is_refused(adapter_dir, tmp_path):
    def asked(**changes):
        flags = {"languages": "en,ur", **changes.pop("flags", {})}
        return eval_params(adapter=adapter_dir, shots=6, limit=4, flags=flags, **changes)

    whole = evaluate(asked(), tmp_path / "whole", console=Console(quiet=True))
    assert [prediction.shots for prediction in whole.predictions] == [6] * 4
    short = evaluate(asked(overrides=["basic.max_length=180"]), tmp_path / "short", console=Console(quiet=True))
    assert all(0 < prediction.shots < 6 for prediction in short.predictions)
    with pytest.raises(UserError, match=r"no room for a single example within basic\.max_length=40"):
        evaluate(asked(overrides=["basic.max_length=40"]), tmp_path / "none", console=Console(quiet=True))


def test_without_examples_prompts_are_as_ever(rows):
    collator = captioner_of("llama32").collator
    plain = collator.prompts([row.sample for row in rows])
    empty = collator.prompts([row.sample for row in rows], [[] for _ in rows])
    assert all(plain[name].equal(empty[name]) for name in plain)


@pytest.mark.parametrize("name", ["llama32", "aya"])
def test_a_batch_of_few_shot_prompts_gives_the_captions_of_one_by_one(name, examples, rows):
    captioner = captioner_of(name)
    shots = random_shots(examples, count=2, seed=3)
    samples, before = [row.sample for row in rows[:5]], [shots(row) for row in rows[:5]]
    options = {"max_new_tokens": 12, "shots": before}
    together = generate_captions(captioner.model, captioner.collator, samples, batch_size=5, **options)
    alone = generate_captions(captioner.model, captioner.collator, samples, batch_size=1, **options)
    assert together == alone
