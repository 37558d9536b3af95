from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.data.batches import load_samples
from inft.data.sample import ROUNDS, combinations, rows, scenes, split_of, wrong_caption
from inft.data.scene_captions import GRAMMARS, caption
from inft.data.scenes import COMBINATIONS, differing, near_misses
from params.munichus import MUNIChusLoadConfig

SCENES = {split: list(scenes(split, rounds=ROUNDS[split])) for split in ROUNDS}
LANGUAGES = st.sampled_from(sorted(GRAMMARS))
ANY_SCENE = st.sampled_from([scene for found in SCENES.values() for scene in found])


def attributes_of(text: str, language: str):
    """The one combination whose caption this is."""
    (found,) = [attributes for attributes in COMBINATIONS if caption(attributes, language) == text]
    return found


@given(ANY_SCENE, LANGUAGES, st.integers(0, 10**6))
def test_a_wrong_caption_is_a_training_sentence_with_exactly_one_wrong_attribute(scene, language, seed):
    wrong = wrong_caption(scene, language, seed=seed)
    assert wrong != caption(scene.attributes, language)
    said = attributes_of(wrong, language)
    assert len(differing(scene.attributes, said)) == 1
    assert split_of(said) == "train"
    assert wrong == wrong_caption(scene, language, seed=seed)


def test_near_misses_differ_in_one_attribute_and_are_all_of_them():
    for attributes in islice(COMBINATIONS, 0, None, 17):
        found = near_misses(attributes)
        assert len(set(found)) == len(found) == 5 + 5 + 1 + 4
        assert attributes not in found


def test_wrong_captions_vary_with_seed_and_language_and_over_the_attributes():
    scene = SCENES["train"][0]
    assert len({wrong_caption(scene, "en", seed=seed) for seed in range(30)}) > 5
    wrong = Counter(
        differing(scene.attributes, attributes_of(wrong_caption(scene, "en", seed=1), "en"))[0]
        for scene in SCENES["train"][:400]
    )
    assert set(wrong) == {"figure", "colour", "size", "place"}
    assert min(wrong.values()) > 50
    others = [attributes_of(wrong_caption(scene, language, seed=1), language) for language in GRAMMARS]
    assert len(set(others)) > 1


def test_no_held_out_sentence_is_ever_trained_on():
    config = MUNIChusLoadConfig(data="sample", languages=("en", "si"), eval_fraction=0.1)
    loaded = load_samples(config, quarantine_file=None, with_images=False, kind="preferences")
    held_out = {caption(attributes, "en") for split in ("validation", "test") for attributes in combinations(split)}
    trained = {text for sample in loaded.train for text in (sample.answer, sample.rejected)}
    assert not held_out & trained
    assert {sample.answer for sample in loaded.heldout if sample.language == "en"} <= held_out


@pytest.mark.parametrize("kind", ["captions", "references", "prompts"])
def test_only_preferences_have_a_wrong_caption(kind):
    config = MUNIChusLoadConfig(data="sample", languages=("ur",))
    assert all(row.rejected is None for row in rows(config, location="", split="validation", kind=kind))
    preferences = list(rows(config, location="", split="validation", kind="preferences"))
    assert all(row.rejected and row.rejected != row.caption for row in preferences)
    captions = rows(config, location="", split="validation")
    assert [row.caption for row in captions] == [row.caption for row in preferences]
