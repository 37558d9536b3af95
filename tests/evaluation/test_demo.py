"""The demo: figures that mean what they say, tables of every script, and captions learned from pictures."""

import io
import json
from collections import Counter

import pytest
import torch
from rich.console import Console

from inft.data.batches import load_samples
from inft.evaluation import demo
from inft.evaluation.demo import (
    chance,
    exact_shares,
    gallery_table,
    run_demo,
    shares_table,
    write_shares,
)
from inft.evaluation.shuffle import with_shuffled_images
from inft.sample import Prompt, Sample
from params import MUNIChusLoadConfig
from params.resolve import resolve_train

LANGUAGES = ("ar", "en", "fr", "hi", "id", "ja", "si", "ur", "yue", "zh")
NEW = {"ur", "si", "yue"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def heldout():
    """Twelve held-out scenes in each of the ten languages."""
    config = MUNIChusLoadConfig(
        data="sample", split="test", languages=LANGUAGES, max_rows_per_lang=12, eval_fraction=0.0
    )
    return load_samples(config, quarantine_file=None, with_images=True).train


def row(answer, language="en", picture=None, news=""):
    return Sample(image=picture, prompt=Prompt(instruction="?", news=news), answer=answer, language=language)


def printed(table, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_shares_are_of_exact_captions_language_by_language():
    samples = [row("a red star"), row("a blue star"), row("ستارہ", "ur"), row("රතු", "si")]
    shares = exact_shares(samples, ["a red star ", "a blue circle", "ستارہ", "රත"])
    assert shares == {"en": 0.5, "ur": 1.0, "si": 0.0}


def test_an_empty_caption_is_wrong():
    assert exact_shares([row("a red star"), row("a star")], ["", "  "]) == {"en": 0.0}


def test_a_missing_caption_is_no_share():
    with pytest.raises(ValueError, match="shorter"):
        exact_shares([row("a"), row("b")], ["a"])


def test_chance_counts_pairs_of_rows_of_one_language():
    assert chance([row("a"), row("a"), row("b"), row("a", "ur")]) == pytest.approx(2 / 6)
    assert chance([row("a"), row("b")]) == 0
    assert chance([row("a"), row("a")]) == 1
    assert chance([row("a")]) == 0


def test_chance_is_what_captions_of_other_pictures_score(heldout):
    # Over all ways to shift the rows of a language by one or more, exactly the share of equal pairs.
    english = [sample.answer for sample in heldout if sample.language == "en"]
    shifts = [english[n:] + english[:n] for n in range(1, len(english))]
    hits = [a == b for shifted in shifts for a, b in zip(english, shifted, strict=True)]
    assert chance([row(answer) for answer in english]) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_gives_every_row_the_input_of_another_row_of_its_language(heldout, seed):
    mixed = with_shuffled_images(heldout, seed=seed)
    for before, after in zip(heldout, mixed, strict=True):
        assert after.image is not before.image
        assert (after.answer, after.language, after.meta) == (before.answer, before.language, before.meta)
    for language in LANGUAGES:
        used = Counter(id(sample.image) for sample in mixed if sample.language == language)
        assert used == Counter(id(sample.image) for sample in heldout if sample.language == language)


def test_shuffling_text_rows_swaps_their_descriptions():
    rows = [row(str(i), language, news=f"{language} {i}") for language in ("en", "ur") for i in range(4)]
    for before, after in zip(rows, with_shuffled_images(rows, seed=0), strict=True):
        assert after.prompt.news != before.prompt.news
        assert after.prompt.news.startswith(before.language)


def test_the_seed_settles_the_shuffling(heldout):
    first, again, other = (with_shuffled_images(heldout, seed=seed) for seed in (1, 1, 2))
    assert all(a.image is b.image for a, b in zip(first, again, strict=True))
    assert any(a.image is not b.image for a, b in zip(first, other, strict=True))


def test_the_gallery_shows_the_first_rows_of_each_language_in_every_script(heldout):
    captions = [sample.answer for sample in heldout]
    text = printed(gallery_table(heldout, ["wrong"] * len(heldout), captions), width=200)
    by_language = {language: [s for s in heldout if s.language == language] for language in LANGUAGES}
    for samples in by_language.values():
        for sample in samples[: demo.SHOWN]:
            assert sample.answer in text
    assert text.count("wrong") == demo.SHOWN * len(LANGUAGES)
    order = [line.split("│")[2].strip() for line in text.splitlines() if "wrong" in line]
    assert order == sorted(order, key=order.index)


def test_the_shares_stand_under_their_headings():
    shares = {"before": {"ur": 0.0, "si": 0.05}, "after": {"ur": 0.9, "si": 1.0}, "shuffled": {"ur": 0.1, "si": 0.15}}
    text = printed(shares_table(shares, {"ur": "Urdu"}, expected=0.021, shuffled_word="images"))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "%" in line]
    assert cells[:2] == [["Urdu (ur)", "0%", "90%", "10%"], ["si (si)", "5%", "100%", "15%"]]
    assert "after, images shuffled" in text
    assert "chance: 2.1%" in text


def test_figures_are_written_as_json(tmp_path):
    shares = {"before": {"ur": 0.0}, "after": {"ur": 0.975}, "shuffled": {"ur": 0.025}}
    write_shares(tmp_path / "demo.json", shares)
    assert json.loads((tmp_path / "demo.json").read_text()) == shares


def demo_params(name, mode, root, *overrides):
    return resolve_train(
        name,
        training_mode=mode,
        demo=True,
        flags={"output_dir": str(root / "run")},
        overrides=[f"basic.logs_dir={root}/logs", *overrides],
    )


@pytest.mark.parametrize(("name", "word"), [("text", "descriptions"), ("aya", "images")])
def test_a_short_demo_shows_its_tables_and_writes_its_figures(tmp_path, monkeypatch, name, word):
    monkeypatch.setattr(demo, "SCENES", 4)
    short = ("sft.max_steps=2", "sft.per_device_train_batch_size=4", "data.max_rows_per_lang=12")
    params = demo_params(name, "advanced", tmp_path, *short, "basic.gen_max_new_tokens=6")
    console = Console(file=io.StringIO(), width=120)
    result = run_demo(params, console, resume=None, overwrite=False)
    assert result.status == "finished"
    figures = json.loads((tmp_path / "run" / "demo.json").read_text())
    assert list(figures) == ["before", "after", "shuffled"]
    assert all(set(shares) == NEW for shares in figures.values())
    assert all(0 <= share <= 1 for shares in figures.values() for share in shares.values())
    text = console.file.getvalue()
    assert text.count("(ur)") == 1
    assert f"after, {word} shuffled" in text
    assert str(tmp_path / "run" / "demo.json") in text


def test_an_interrupted_run_shows_nothing(tmp_path, monkeypatch):
    class Interrupted:
        status = "interrupted"

    monkeypatch.setattr("inft.training.run.fit", lambda *args, **kwargs: Interrupted())
    params = demo_params("text", "basic", tmp_path)
    assert run_demo(params, Console(quiet=True), resume=None, overwrite=False).status == "interrupted"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("llama32", "advanced"), ("aya", "advanced"), ("text", "basic")])
def test_the_demo_teaches_three_languages_from_what_it_is_shown(tmp_path, name, mode):
    run_demo(demo_params(name, mode, tmp_path), Console(quiet=True), resume=None, overwrite=False)
    figures = json.loads((tmp_path / "run" / "demo.json").read_text())
    assert set(figures["after"]) == NEW
    assert min(figures["after"].values()) >= 0.8, figures
    assert max(figures["before"].values()) <= 0.05, figures
    assert max(figures["shuffled"].values()) <= 0.15, figures
