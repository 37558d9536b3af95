"""Pairs for the contrastive loss: translations among the rows to train on, and data sets of pairs."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.data.batches import load_samples
from inft.data.pairs import group_ids, load_pairs, read_pairs, refuse_no_pairs, translation_pairs
from inft.sample import Prompt, Sample
from params import MUNIChusLoadConfig, UserError

CONFIG = MUNIChusLoadConfig(max_bad_fraction=0.9)


def row(language, answer, *, picture="", title=""):
    meta = {"title": title, "where": "x", **({"picture": picture} if picture else {})}
    prompt = Prompt(instruction=f"Caption in {language}.", news="the news")
    return Sample(image=None, prompt=prompt, answer=answer, language=language, meta=meta)


def texts(pairs):
    return {(pair.anchor.answer, pair.positive.answer) for pair in pairs}


def write(path, rows):
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def read(path, rows, *, with_images=False, **changes):
    config = MUNIChusLoadConfig(**{"max_bad_fraction": 0.9, **changes})
    return read_pairs(write(path, rows), config, with_images=with_images)


def test_pairs_are_captions_of_one_picture_in_two_languages_in_both_directions():
    samples = [row("en", "a cat", picture="1"), row("ur", "billi", picture="1"), row("en", "a dog", picture="2")]
    pairs = translation_pairs(samples, seed=0)
    assert texts(pairs) == {("a cat", "billi"), ("billi", "a cat")}
    assert {side.prompt for pair in pairs for side in (pair.anchor, pair.positive)} == {
        Prompt(instruction="Caption in en."),
        Prompt(instruction="Caption in ur."),
    }
    assert all(side.image is None for pair in pairs for side in (pair.anchor, pair.positive))


def test_pictures_are_told_apart_by_themselves_and_not_by_a_title_that_several_share():
    samples = [
        row(language, f"{thing} in {language}", picture=thing, title="sport")
        for thing in ("tennis", "golf")
        for language in ("en", "ur")
    ]
    pairs = translation_pairs(samples, seed=0)
    assert len(pairs) == 4
    assert all(pair.anchor.answer.split()[0] == pair.positive.answer.split()[0] for pair in pairs)
    assert len(set(group_ids(samples))) == 2
    assert {pair.id for pair in pairs} == set(group_ids(samples))


def test_without_pictures_a_title_of_one_caption_a_language_stands_for_one():
    article = [row("en", "a", title="T"), row("fr", "b", title="T")]
    assert texts(translation_pairs(article, seed=0)) == {("a", "b"), ("b", "a")}
    ambiguous = [*article, row("en", "c", title="T")]
    with pytest.raises(UserError, match="no picture has captions in two languages"):
        translation_pairs(ambiguous, seed=0)
    assert len(set(group_ids(ambiguous))) == 1  # but none is a negative of another


def test_rows_without_picture_and_title_are_each_their_own_group():
    ids = group_ids([row("en", "a"), row("en", "b"), row("en", "a")])
    assert ids[0] == ids[2] != ids[1]
    assert all(0 < number < 2**63 for number in ids)


def test_a_group_keeps_its_id_whatever_other_rows_there_are():
    a, b = row("en", "a", picture="1"), row("en", "b", picture="2")
    assert group_ids([a, b]) == [*group_ids([a]), *group_ids([b])]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 4), max_size=5), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_every_language_is_as_often_anchor_as_positive_and_no_picture_has_too_many_pairs(pictures, seed):
    samples = [
        row(language, f"{number} {language} {k}", picture=str(number))
        for number, languages in enumerate(pictures)
        for language, count in languages.items()
        for k in range(count)
    ]
    if all(len(languages) < 2 for languages in pictures):
        with pytest.raises(UserError, match="--craft-pairs translations"):
            translation_pairs(samples, seed=seed)
        return
    pairs = translation_pairs(samples, seed=seed, per_picture=6)
    assert pairs == translation_pairs(samples, seed=seed, per_picture=6)
    anchors = Counter((pair.id, pair.anchor.language) for pair in pairs)
    assert anchors == Counter((pair.id, pair.positive.language) for pair in pairs)
    assert all(pair.anchor.language != pair.positive.language for pair in pairs)
    assert all(pair.anchor.answer.split()[0] == pair.positive.answer.split()[0] for pair in pairs)
    assert max(Counter(pair.id for pair in pairs).values()) <= 6


def test_another_seed_pairs_other_languages():
    samples = [row(language, language, picture="1") for language in "abcdefgh"]
    assert texts(translation_pairs(samples, seed=0)) != texts(translation_pairs(samples, seed=1))


def test_one_language_alone_gives_no_pairs_and_says_what_to_change():
    samples = [row("en", "a", picture="1"), row("en", "b", picture="2")]
    with pytest.raises(UserError, match=r"one language only .*2 in en.* --languages"):
        translation_pairs(samples, seed=0)
    with pytest.raises(UserError, match="name another with --languages"):
        refuse_no_pairs("translations", MUNIChusLoadConfig(languages=("en",)))
    refuse_no_pairs("translations", MUNIChusLoadConfig(languages=("en", "ur")))


@pytest.mark.parametrize("with_images", [True, False])
def test_loaded_rows_know_their_picture_so_that_held_out_captions_are_in_no_pair(write_jsonl, news_rows, with_images):
    rows = [{**entry, "title": "all the same"} for entry in news_rows(articles=6)]
    source = write_jsonl(rows)
    write_jsonl(news_rows(articles=2, first=50), name="validation.jsonl")
    config = MUNIChusLoadConfig(data=str(source), languages=("en", "ur"))
    loaded = load_samples(config, quarantine_file=None, with_images=with_images)
    pairs = load_pairs("translations", config, loaded.train, with_images=with_images, quarantine_file=None)
    assert len(pairs.pairs) == 12
    answers = {side.answer for pair in pairs.pairs for side in (pair.anchor, pair.positive)}
    assert answers == {sample.answer for sample in loaded.train}
    assert len(set(group_ids(loaded.train))) == 6
    again = load_pairs("translations", config, loaded.train, with_images=with_images, quarantine_file=None)
    assert again == pairs


def test_the_drawn_scenes_have_translations_with_and_without_their_images():
    for with_images, rows in ((True, 60), (False, None)):
        config = MUNIChusLoadConfig(data="sample", languages=("ur", "si", "yue"), max_rows_per_lang=rows)
        loaded = load_samples(config, quarantine_file=None, with_images=with_images)
        pairs = translation_pairs(loaded.train, seed=0)
        assert all(pair.anchor.meta["title"] == pair.positive.meta["title"] for pair in pairs)
    assert len(pairs) == len(loaded.train) == 3 * 1152


def test_a_file_of_pairs_is_read_with_its_languages_and_the_runs_instruction(tmp_path):
    found = read(
        tmp_path / "pairs.jsonl",
        [
            {"text": "a  cat ", "text_tgt": "un chat", "language": "en", "language_tgt": "FR"},
            {"anchor": "a dog", "positive": "one dog", "id": 7},
        ],
    )
    first, second = found.pairs
    assert (first.anchor.answer, first.positive.answer) == ("a cat", "un chat")
    assert "English" in first.anchor.prompt.text
    assert (first.positive.language, second.positive.language) == ("fr", "en")
    assert "French" in first.positive.prompt.text
    assert first.id != second.id
    assert not found.bad


def test_pairs_of_one_id_of_one_image_or_of_one_anchor_share_an_id(tmp_path, write_jsonl):
    write_jsonl([{"image": 1}, {"image": 2}])
    two = {"text_tgt": "b"}
    rows = [
        {"text": "a", "id": "x", **two},
        {"text": "c", "id": "x", **two},
        {"text": "d", "image": "images/1.png", **two},
        {"text": "e", "image": "images/1.png", **two},
        {"text": "d", "image": "images/2.png", **two},
        {"text": "d", **two},
        {"text": "d", "text_tgt": "g"},
    ]
    ids = [pair.id for pair in read(tmp_path / "pairs.jsonl", rows, with_images=True).pairs]
    assert [ids.index(number) for number in ids] == [0, 0, 2, 2, 4, 5, 5]


def test_images_of_pairs_are_kept_for_models_that_take_them_and_left_out_for_text_models(tmp_path, write_jsonl):
    write_jsonl([{"image": 1}, {"image": 2}])
    rows = [{"text": "a", "text_tgt": "b", "image": "images/1.png", "image_tgt": "images/2.png"}]
    (pair,) = read(tmp_path / "pairs.jsonl", rows, with_images=True).pairs
    assert pair.anchor.image.load().getpixel((0, 0)) == (1, 0, 40)
    assert pair.positive.image.load().getpixel((0, 0)) == (2, 0, 40)
    (pair,) = read(tmp_path / "pairs.jsonl", rows).pairs
    assert pair.anchor.image is None
    assert pair.positive.image is None


def test_a_row_that_is_no_pair_is_named_with_its_line_and_reason(tmp_path):
    good = {"text": "a", "text_tgt": "b"}
    rows = [
        good,
        "{",
        {"text": "a"},
        {"text": "a", "text_tgt": " \u200b"},
        {"text": 5, "text_tgt": "b"},
        {**good, "language": "xx"},
        {**good, "language_tgt": 3},
        {**good, "image": "gone.png"},
    ]
    found = read(tmp_path / "pairs.jsonl", rows, with_images=True)
    assert len(found.pairs) == 1
    reasons = {bad.where: bad.reason for bad in found.bad}
    assert sorted(reasons) == [f"pairs.jsonl line {number}" for number in range(2, 9)]
    told = [reasons[f"pairs.jsonl line {number}"] for number in range(2, 9)]
    for reason, words in zip(
        told,
        (
            "not JSON",
            "no column text_tgt or positive",
            "its text_tgt is empty",
            "its text is int",
            "--set data.language_names.xx=NAME",
            "its language is int",
            "does not exist",
        ),
        strict=True,
    ):
        assert words in reason


def test_too_many_bad_rows_stop_a_run_and_are_listed(tmp_path):
    rows = [{"text": "a", "text_tgt": "b"}, {"text": "", "text_tgt": "b"}]
    file = tmp_path / "quarantine.jsonl"
    location = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=r"1 bad rows, about 50\.0%"):
        read_pairs(location, MUNIChusLoadConfig(), with_images=False, quarantine_file=file)
    assert "pairs.jsonl line 2" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"text": "a", "target": "b"}], "has no column text_tgt or positive. It has text, target"),
        ([], "no pairs are left"),
    ],
)
def test_a_file_without_pairs_says_what_to_change(tmp_path, rows, complaint):
    with pytest.raises(UserError) as error:
        read(tmp_path / "pairs.jsonl", rows)
    assert complaint in str(error.value)


@pytest.mark.parametrize("location", ["absent.jsonl", "translation", ""])
def test_a_place_without_a_data_set_is_told_before_anything_is_read(location):
    with pytest.raises(UserError, match="neither translations nor a data set of pairs"):
        refuse_no_pairs(location, CONFIG)


@pytest.mark.parametrize("saved", [True, False])
def test_tables_of_pairs_are_read_with_their_images(tmp_path, picture, own_cache, saved):
    from datasets import Dataset, Features, Image, Value

    columns = {"text": ["a", "b"], "text_tgt": ["c", "d"], "image": [{"bytes": picture(3), "path": None}, None]}
    features = Features({"text": Value("string"), "text_tgt": Value("string"), "image": Image()})
    table = Dataset.from_dict(columns, features=features)
    place = tmp_path / ("saved" if saved else "pairs.parquet")
    if saved:
        table.save_to_disk(place)
    else:
        table.to_parquet(place)
    first, second = read_pairs(str(place), CONFIG, with_images=True).pairs
    assert first.anchor.image.load().getpixel((0, 0)) == (3, 0, 40)
    assert (second.anchor.image, second.positive.answer) == (None, "d")
