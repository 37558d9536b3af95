"""The demo of pretraining: its text, its tokenizer, its baseline and, slow, its run."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from transformers import AutoTokenizer

from inft.data.sample import combinations
from inft.data.scene_captions import GRAMMARS, caption
from inft.encoders.demo import (
    ALL,
    CAPTIONS,
    DEMO,
    FIGURES,
    Share,
    demo_overrides,
    demo_report,
    demo_run,
    demo_table,
    unigram_baseline,
)
from inft.encoders.demo_text import PAIR, PROSE, demo_data, demo_texts, docstrings, markdown_sections, read_texts
from inft.encoders.demo_tokenizer import SPECIAL, demo_tokenizer
from params.encoder_resolve import resolve_encoder
from params.errors import UserError

IDEOGRAPHS = ("ja", "yue", "zh")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    demo_data(place, 42)
    demo_tokenizer(place / "tokenizer", [row.text for row in read_texts(place, "train")], 2048)
    return place


def test_rows_are_in_ten_languages_in_two_at_a_time_and_prose(directory: Path):
    for split in ("train", "validation"):
        counts = Counter(row.language for row in read_texts(directory, split))
        assert set(counts) == {*GRAMMARS, PAIR, PROSE}
        assert len({counts[language] for language in GRAMMARS}) == 1
        assert min(counts.values()) >= 50


def test_no_held_out_text_is_trained_on(directory: Path):
    trained = {row.text for row in read_texts(directory, "train")}
    assert not trained & {row.text for row in read_texts(directory, "validation")}


def test_held_out_captions_show_combinations_that_no_trained_text_holds(directory: Path):
    trained = "\n".join(row.text for row in read_texts(directory, "train"))
    held_out = [row.text for row in read_texts(directory, "validation") if row.language in GRAMMARS]
    assert len(set(held_out)) == 72 * len(GRAMMARS)
    assert not [text for text in held_out if text in trained]


def test_both_captions_of_a_pair_are_of_one_scene(directory: Path):
    said = {
        caption(scene, code): scene
        for part in ("validation", "test")
        for scene in combinations(part)
        for code in GRAMMARS
    }
    pairs = [row.text for row in read_texts(directory, "validation") if row.language == PAIR]
    for text in pairs:
        shown = {scene for sentence, scene in said.items() if text.startswith(sentence) or text.endswith(sentence)}
        assert len(shown) == 1, text


def test_the_seed_decides_the_bytes(directory: Path, tmp_path: Path):
    demo_data(tmp_path / "same", 42)
    demo_data(tmp_path / "other", 43)
    same, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("same", "other"))
    assert (directory / "train.jsonl").read_bytes() == same != other
    assert sorted(same.splitlines()) == sorted(other.splitlines())  # another order of the same rows


def test_held_out_prose_is_of_other_files_and_repeats_nothing():
    trained = {row.text for row in demo_texts("train", 0) if row.language == PROSE}
    held_out = [row.text for row in demo_texts("validation", 0) if row.language == PROSE]
    assert len(held_out) == len(set(held_out))
    assert len(held_out) < len(trained) / 5
    assert not trained & set(held_out)


def test_docstrings_of_modules_classes_and_functions_are_read_as_single_lines():
    source = '"""A module that says\n\nquite a lot about what it holds."""\nclass A:\n    """Short."""\n'
    source += 'async def f():\n    """What a function does, and what it returns to whom."""\n'
    assert docstrings(source) == [
        "A module that says quite a lot about what it holds.",
        "What a function does, and what it returns to whom.",
    ]


def test_code_and_tables_of_markdown_are_left_out():
    source = "# Title\n\nA paragraph that is long enough\nto be worth reading.\n\n"
    source += "```python\nprint('no prose at all, but code')\n```\n\n| a table | with cells | of no use here |\n\n"
    source += "## Next\n\nToo short.\n"
    assert markdown_sections(source) == [
        ("", []),
        ("Title", ["A paragraph that is long enough to be worth reading."]),
        ("Next", []),
    ]


def test_the_tokenizer_knows_every_held_out_text(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    assert len(tokenizer) == 2048
    assert {name: getattr(tokenizer, name) for name in SPECIAL} == SPECIAL
    for row in read_texts(directory, "validation"):
        ids = tokenizer(row.text, split_special_tokens=True)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.decode(ids[1:-1]) == row.text


def test_captions_have_few_tokens_in_every_script_and_ideographs_stand_alone(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    scene = combinations("test")[0]
    for language in GRAMMARS:
        text = caption(scene, language)
        assert len(tokenizer.tokenize(text)) <= (len(text) if language in IDEOGRAPHS else len(text) / 3)
    for number in tokenizer("左边有一颗紫色的小星星。", add_special_tokens=False)["input_ids"]:
        assert len(tokenizer.decode([number])) == 1


class Batch(NamedTuple):
    labels_T: Any
    cu_seqlens: Any
    languages: tuple[str | None, ...]


def test_the_baseline_is_each_languages_most_frequent_token():
    train = [(np.array([5, 5, 6]), "en"), (np.array([7, 7, 7]), "fr"), (np.array([5]), "en")]
    labels = np.array([-100, 5, 6, -100, 7, 5, -100, 9])
    batch = Batch(labels, np.array([0, 3, 6, 8, 8]), ("en", "fr", None))
    shares = unigram_baseline(train, [batch, batch])
    assert shares == {"en": Share(correct=2, masked=4), "fr": Share(correct=2, masked=4), None: Share(masked=2)}


def test_the_report_weighs_groups_by_masked_tokens():
    baseline = {
        "en": Share(correct=1, masked=10),
        "fr": Share(correct=6, masked=30),
        PAIR: Share(correct=0, masked=5),
        PROSE: Share(correct=1, masked=5),
    }
    before = {"accuracies": dict.fromkeys(baseline, 0.1)}
    after = {"accuracies": {"en": 0.5, "fr": 0.9, PAIR: 1.0, PROSE: 0.2}}
    rows = {row.name: row for row in demo_report(baseline, before, after)}
    assert list(rows) == ["en", "fr", CAPTIONS, PAIR, PROSE, ALL]
    assert rows[CAPTIONS].unigram == pytest.approx(7 / 40)
    assert rows[CAPTIONS].after == pytest.approx((0.5 * 10 + 0.9 * 30) / 40)
    assert rows[ALL].after == pytest.approx((0.5 * 10 + 0.9 * 30 + 5 + 1) / 50)
    assert rows[ALL].before == pytest.approx(0.1)
    assert demo_table(rows.values()).row_count == 6


def test_the_demos_parameters_hold_together():
    params = resolve_encoder("pretraining", base=demo_overrides())
    assert params.datacollator.pack_sequences
    assert params.dataset.language_column == "language"


@pytest.mark.parametrize(("section", "field"), [("dataset", "path"), ("tokenizer", "name")])
def test_data_of_ones_own_and_the_demo_are_refused(section: str, field: str):
    params = resolve_encoder("pretraining", base=demo_overrides())
    params = replace(params, **{section: replace(getattr(params, section), **{field: "mine"})})
    with pytest.raises(UserError, match=rf"leave {section}\.{field} out"):
        demo_run(params, None, None, overwrite=False, console=None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_demo_beats_the_most_frequent_token_in_every_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from inft.__main__ import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "neobert", "--demo"])
    assert not ended.value.code
    figures = tmp_path / demo_overrides()["trainer.output_dir"] / DEMO / FIGURES
    rows = {row["name"]: row for row in json.loads(figures.read_text())}
    for row in rows.values():
        assert row["after"] >= 2 * row["unigram"], row
    assert rows[CAPTIONS]["after"] > 0.6
    assert rows[PAIR]["after"] > 0.6
    assert rows[ALL]["before"] < 0.2
