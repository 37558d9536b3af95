"""inft evaluate and inft caption at their edges."""

import csv
import io
import json
import shutil

import pytest
from PIL import Image
from rich.console import Console
from stored_adapters import store_adapter

from inft.cli.adapted import recorded, resolve
from inft.cli.caption import read_news
from inft.cli.evaltext import drift_table, forgetting_table
from inft.data.sample import scenes
from inft.evaluation.metrics import ALL, METRICS, Score
from inft.evaluation.records import Drift, Forgetting
from params.munichus import LANGUAGE_NAMES


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "best"
    store_adapter(directory, "llama32")
    return directory


BASE = ("evaluate", "llama32", "--base", "--demo", "--languages", "en", "--limit", "2", "--max-new-tokens", "4")


def test_what_is_printed_beside_stands_before_it(inft):
    inft(*BASE, "--data", "sample", "--output-dir", "first")
    shown = inft(
        *BASE, "--data", "sample", "--shots", "1", "--output-dir", "own", "--beside", "first", "--format", "csv"
    )
    systems = dict.fromkeys(row["system"] for row in csv.DictReader(io.StringIO(shown.out)))
    assert list(systems) == ["first", "own"]


def test_unreadable_rows_are_told_below_the_scores(inft, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    rows = [{"image": name, "caption": "c", "language": "en"} for name in ("a.png", "gone.png")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = inft(*BASE, "--data", str(tmp_path), "--set", "data.context=none", "--output-dir", "m")
    assert done.status == 0, done.err
    assert "1 rows have no caption and count as wrong, the first: test.jsonl line 2: image" in done.out


@pytest.mark.parametrize("args", [("--model", "./nowhere"), ("--model", "a/b/c"), ("--data", "no/where")])
def test_a_place_that_is_not_there_is_told_before_a_directory_is_made(inft, tmp_path, args, monkeypatch):
    monkeypatch.setattr("inft.evaluation.splits.settled_split", lambda _: pytest.fail("told too late"))
    done = inft("evaluate", "llama32", "--base", "--data", "sample", *args)
    assert done.status == 2
    assert "no model directory" in done.err or "neither a source nor a path" in done.err
    assert not (tmp_path / "metrics").exists()


def test_forgetting_is_asked_in_every_language_whatever_is_evaluated(adapter):
    params = resolve("llama32", adapter, {"data": "sample", "languages": "si"}, forgetting=("sample", None))
    assert params.data.languages == ("si",)
    assert params.forgetting.languages == tuple(LANGUAGE_NAMES)
    assert (params.forgetting.data, params.forgetting.split) == ("sample", "test")
    other = resolve("llama32", adapter, {"data": "sample"}, forgetting=("sample", "validation"))
    assert other.forgetting.split == "validation"


def test_an_adapter_without_a_record_names_its_base_by_its_config(adapter, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare)
    (bare / "best.json").unlink()
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/model"}))
    assert recorded(bare, "llama32") == {"adapter": str(bare), "model_name": "someone/model"}


def test_a_line_of_json_says_why_an_image_has_no_caption(inft, tmp_path):
    next(iter(scenes("test", rounds=1))).image.load().save(tmp_path / "s.png")
    done = inft("caption", "llama32", "--demo", "gone.png", "s.png", "--language", "en", "--json")
    gone, good = map(json.loads, done.out.splitlines())
    assert done.status == 1
    assert (gone["image"], gone["caption"], gone["error"]) == ("gone.png", "", "image gone.png does not exist")
    assert "error" not in good


@pytest.mark.parametrize("news", ["A story. " * 100, "x" * 300, "", "no file of this name"])
def test_a_long_story_is_no_file(news):
    assert read_news(news) == news


def shown(table):
    console = Console(file=io.StringIO(), width=250)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_the_table_of_forgetting_has_each_figure_in_its_column():
    def scores(value):
        return {code: {name: Score(value, value - 1, value + 1) for name in METRICS} for code in ("en", "ur", ALL)}

    losses = {"base": 1, "adapter": 2, "difference": 1, "base_text_only": 3, "adapter_text_only": 4}
    found = Forgetting(
        data="d",
        split="t",
        rows=3,
        fingerprint="f",
        loss_rows=3,
        language_names={"en": "English", "ur": "Urdu"},
        could_do=("en",),
        base=scores(90),
        adapter=scores(50),
        difference=scores(-40),
        base_shuffled=scores(10),
        adapter_shuffled=scores(20),
        loss={"en": {name: Score(value, value, value) for name, value in losses.items()}},
    )
    english, urdu, _ = shown(forgetting_table(found))
    figures = ["90.0", "50.0", "-40.0 (-41.0 to -39.0)", "20.0", "90.0%", "50.0%"]
    assert english == ["English (en) *", *figures, "1.00", "2.00", "3.00", "4.00"]
    assert urdu == ["Urdu (ur)", *figures, "", "", "", ""]


def test_the_table_of_drift_names_the_embeddings_and_counts_the_layers():
    found = Drift(
        data="d", split="t", rows=4, fingerprint="f", layers=(0, 1, 2), cka=(1.0, 0.5, 0.25), cosine=(1.0, 0.75, -0.5)
    )
    assert shown(drift_table(found)) == [
        ["embeddings", "1.000", "1.000"],
        ["1", "0.500", "0.750"],
        ["2", "0.250", "-0.500"],
    ]


def test_a_language_with_a_name_of_its_own_need_not_be_in_every_data_set(inft):
    tamil = ("--set", "data.language_names.ta=Tamil")
    done = inft(*BASE, "--data", "sample", "--languages", "all", *tamil, "--output-dir", "out")
    assert done.status == 0, done.err


def test_rows_of_languages_without_a_name_are_told(inft, tmp_path):
    Image.new("RGB", (64, 48), "blue").save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "caption": f"c {code}", "language": code, "title": code} for code in ("en", "ta", "zh-TW")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = inft(*BASE, "--data", str(tmp_path), "--set", "data.context=none", "--output-dir", "out")
    assert "rows in other languages are left out: 1 in ta, 1 in zh-TW" in done.out


def test_a_row_that_was_mended_is_captioned_by_the_same_command(inft, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    row = {"image": "a.png", "caption": "a blue field", "language": "en"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    command = (*BASE, "--data", str(tmp_path), "--set", "data.context=none", "--output-dir", "out")
    assert "Mend them, and the same command tries them again" in inft(*command).out
    Image.new("RGB", (64, 48), "blue").save(tmp_path / "a.png")
    assert "Mend them" not in inft(*command).out
    [line] = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["generated_caption"]


def test_news_that_the_prompt_would_not_quote_is_refused(inft):
    scene = next(iter(scenes("test", rounds=1)))
    scene.image.load().save("s.png")
    done = inft("caption", "llama32", "--demo", "s.png", "--news", "the king")
    assert done.status == 2
    assert "--news would have no effect" in done.err
