"""inft evaluate and inft caption as they are typed."""

import csv
import io
import json

import pytest
from PIL import Image

from inft.data.sample import scenes
from inft.data.scene_captions import caption


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each command line runs in an empty directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(tmp_path):
    """Two drawn scenes as files, and what they show."""
    found = list(scenes("test", rounds=1))[:2]
    for number, scene in enumerate(found):
        scene.image.load().save(tmp_path / f"s{number}.png")
    return [scene.attributes for scene in found]


def evaluated(inft, *args, model="llama32"):
    common = ("--base", "--demo", "--data", "sample", "--languages", "en", "--limit", "4", "--max-new-tokens", "16")
    return inft("evaluate", model, *common, *args)


def test_evaluate_prints_a_row_per_language_and_where_the_files_are(inft, tmp_path):
    done = evaluated(inft)
    assert done.status == 0, done.err
    assert "English" in done.out
    assert "BLEU-4" in done.out
    assert "captions, scores and tables: metrics/llama32_base_demo-sample-test" in done.out
    names = {path.name for path in (tmp_path / "metrics/llama32_base_demo-sample-test").iterdir()}
    assert names >= {"evaluation.json", "predictions.jsonl", "scores.json", "scores.csv", "scores.tex", "gallery"}


def test_other_formats_print_nothing_but_themselves(inft):
    as_json = json.loads(evaluated(inft, "--format", "json").out)
    rows = list(csv.DictReader(io.StringIO(evaluated(inft, "--format", "csv").out)))
    latex = evaluated(inft, "--format", "latex").out
    assert set(as_json["scores"]) == {"en", "all"}
    assert {row["language"] for row in rows} == {"en", "all"}
    assert latex.strip().startswith("%") or "\\begin{table" in latex


def test_evaluations_stand_beside_one_another_in_one_table(inft):
    evaluated(inft)
    done = evaluated(inft, "--shots", "1", "--beside", "metrics/llama32_base_demo-sample-test")
    assert done.status == 0, done.err
    assert "llama32_base_demo-sample-test-random1" in done.out
    rows = list(
        csv.DictReader(
            io.StringIO(
                evaluated(
                    inft, "--shots", "1", "--beside", "metrics/llama32_base_demo-sample-test", "--format", "csv"
                ).out
            )
        )
    )
    assert {row["system"] for row in rows} == {
        "llama32_base_demo-sample-test",
        "llama32_base_demo-sample-test-random1",
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["llama32"], "what is to be evaluated? Give --adapter DIR, or --base"),
        (["llama32", "--adapter", "nowhere"], "there is no directory nowhere"),
        (["llama32", "--base", "--demo", "--data", "no/where"], "--data 'no/where' is neither a source nor a path"),
        (["llama32", "--base", "--demo", "--forgetting", "sample"], "--forgetting and --drift compare a base model"),
        (["llama32", "--base", "--demo", "--forgetting-split", "test"], "no effect without --forgetting"),
        (["llama32", "--base", "--demo", "--shot-choice", "similar"], "no effect without --shots"),
        (["llama32", "--adapter", "x", "--drift", "3"], "CKA needs 4 rows at least"),
        (["llama32", "--base", "--demo", "--set", "basic.gen_num_beams=4"], "evaluations are greedy"),
        (["llama32", "--base", "--demo", "--set", "data.max_rows_per_lang=4"], "--limit N takes rows evenly"),
        (["llama32", "--base", "--demo", "--set", "forgetting.columns.caption=x"], "give --forgetting"),
        (["llama32", "--base", "--demo", "--format", "xml"], "--format xml: choose one of table, json, csv, latex"),
        (["llama32", "--base", "--demo", "--shot-choice", "best"], "--shot-choice best: choose one of random, similar"),
        (["llama32", "--base", "--demo", "--data", "sample", "--split", "dev"], "has no split 'dev'"),
        (["llama32", "--base", "--demo", "--data", "sample", "--split", "heldout"], "--split heldout means the rows"),
        (["lama", "--base"], "unknown model 'lama'; did you mean llama32?"),
        (
            ["llama32", "--base", "--demo", "--data", "sample", "--set", "data.cjk_tokens=ko"],
            "data.cjk_tokens names 'ko'",
        ),
        (
            ["llama32", "--base", "--demo", "--data", "sample", "--languages", "zh", "--set", "data.cjk_tokens=[]"],
            "--set data.cjk_tokens=",
        ),
    ],
)
def test_mistakes_are_told_with_status_2_and_no_traceback(inft, tmp_path, args, said):
    done = inft("evaluate", *args)
    assert done.status == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "metrics").exists()


def test_captions_of_several_images_are_lines_with_their_names(inft, images):
    done = inft("caption", "llama32", "--demo", "s0.png", "s1.png", "--language", "en")
    expected = [f"s{number}.png\t{caption(seen, 'en')}" for number, seen in enumerate(images)]
    assert done.out.splitlines() == expected


def test_one_caption_stands_alone_and_json_has_a_line_an_image(inft, images):
    alone = inft("caption", "aya", "--demo", "s0.png", "--language", "fr")
    assert alone.out.strip() == caption(images[0], "fr")
    lines = inft("caption", "aya", "--demo", "s0.png", "s1.png", "--language", "fr", "--json").out.splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["s0.png", "s1.png"]
    assert json.loads(lines[0]) == {"image": "s0.png", "language": "fr", "caption": alone.out.strip()}


def test_an_unreadable_image_is_told_and_the_others_are_captioned(inft, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    done = inft("caption", "llama32", "--demo", "broken.png", "s0.png", "gone.png", "--language", "en")
    assert done.status == 1
    assert done.out.splitlines() == [f"s0.png\t{caption(images[0], 'en')}"]
    assert "broken.png" in done.err
    assert "gone.png does not exist" in done.err


def test_a_text_model_reads_the_news_from_words_or_a_file(inft, tmp_path):
    (tmp_path / "story.txt").write_text("star, red, large, left", encoding="utf-8")
    words = inft("caption", "text", "--demo", "--news", "star, red, large, left", "--language", "en")
    file = inft("caption", "text", "--demo", "--news", "story.txt", "--language", "en")
    assert words.out == file.out == "A large red star on the left.\n"


def test_sampling_follows_its_seed(inft, images):
    common = ("caption", "llama32", "--demo", "s0.png", "--language", "en", "--sample", "--temperature", "30")
    said = [inft(*common, "--seed", seed).out for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]


def test_beams_are_searched(inft, images):
    done = inft("caption", "llama32", "--demo", "s0.png", "--language", "en", "--num-beams", "3")
    assert done.out.strip() == caption(images[0], "en")


def test_an_image_with_transparency_lies_on_white(inft, tmp_path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    done = inft("caption", "llama32", "--demo", "clear.png", "white.png", "--language", "en")
    clear, white = (line.split("\t")[1] for line in done.out.splitlines())
    assert clear == white


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["llama32", "--demo"], "no image is given"),
        (["text", "--demo", "s0.png"], "text models take no images"),
        (["text", "--demo"], "caption what --news says"),
        (["llama32", "--demo", "s0.png", "--language", "tlh"], "language 'tlh' has no name for the prompt"),
        (["llama32", "--demo", "s0.png", "--temperature", "0.5"], "add --sample"),
        (["llama32", "--demo", "s0.png", "--num-beams", "0"], "must be at least 1"),
        (["llama32", "--adapter", ".", "s0.png"], "adapter_config.json"),
    ],
)
def test_mistakes_in_captioning_are_told(inft, images, args, said):
    done = inft("caption", *args)
    assert done.status == 2
    assert said in done.err
    assert "Traceback" not in done.err


def news(path, count=40):
    rows = [
        {"title": f"t{i}", "content": f"star {i}", "caption": f"a star {i}", "language": "en"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_run_on_a_single_file_is_evaluated_on_the_rows_that_it_held_out(inft, tmp_path):
    news(tmp_path / "news.jsonl")
    trained = inft(
        *("train", "text", "--demo", "--data", "news.jsonl", "--languages", "en", "--eval-fraction", "0.2"),
        *("--max-steps", "1", "--output-dir", "run"),
    )
    assert trained.status == 0, trained.err
    assert "captions and scores: inft evaluate text --adapter run/best" in trained.out
    done = inft("evaluate", "text", "--adapter", "run/best", "--max-new-tokens", "4", "--forgetting", "news.jsonl")
    assert done.status == 0, done.err
    stored = tmp_path / "metrics/run-news-heldout"
    titles = {json.loads(line)["title"] for line in (stored / "predictions.jsonl").read_text().splitlines()}
    assert 2 <= len(titles) <= 20
    assert "Forgetting on news.jsonl, train: 40 rows" in done.out


def test_a_base_model_has_no_held_out_rows_to_fall_back_to(inft, tmp_path):
    news(tmp_path / "news.jsonl")
    done = inft("evaluate", "text", "--base", "--demo", "--data", "news.jsonl")
    assert done.status == 2
    assert "news.jsonl has no split 'test'; it has train. Choose with --split NAME." in done.err


def test_the_base_is_evaluated_on_the_rows_that_an_adapters_run_held_out(inft, tmp_path):
    news(tmp_path / "news.jsonl")
    common = ("train", "text", "--demo", "--data", "news.jsonl", "--languages", "en", "--eval-fraction", "0.2")
    inft(*common, "--max-steps", "1", "--output-dir", "run")
    adapted = inft("evaluate", "text", "--adapter", "run", "--max-new-tokens", "4")
    base = inft("evaluate", "text", "--base", "--adapter", "run", "--max-new-tokens", "4")
    assert (adapted.status, base.status) == (0, 0), base.err
    said = [
        json.loads((tmp_path / "metrics" / name / "evaluation.json").read_text())
        for name in ("run-news-heldout", "text_base_demo-news-heldout")
    ]
    assert said[0]["fingerprint"] == said[1]["fingerprint"]
    assert said[1]["adapter"] is None
    beside = inft("evaluate", "text", "--adapter", "run", "--beside", "metrics/text_base_demo-news-heldout")
    assert beside.status == 2  # other settings: 96 new tokens
    both = ("--max-new-tokens", "4", "--beside", "metrics/text_base_demo-news-heldout", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(inft("evaluate", "text", "--adapter", "run", *both).out)))
    assert {row["system"] for row in rows} == {"run-news-heldout", "text_base_demo-news-heldout"}


def test_a_checkpoint_is_used_as_its_run_was_trained(inft, tmp_path):
    news(tmp_path / "news.jsonl")
    common = ("train", "text", "--demo", "--data", "news.jsonl", "--languages", "en", "--eval-fraction", "0.2")
    inft(*common, "--max-steps", "1", "--output-dir", "run", "--set", "basic.max_length=99")
    done = inft("evaluate", "text", "--adapter", "run/checkpoint-1", "--max-new-tokens", "4")
    assert done.status == 0, done.err
    said = json.loads((tmp_path / "metrics/run_checkpoint-1-news-heldout/evaluation.json").read_text())
    assert said["generation"]["max_length"] == 99
    assert said["generation"]["in_4bit"] is False


def test_evaluations_of_other_rows_do_not_stand_in_one_table(inft, tmp_path):
    evaluated(inft)
    done = evaluated(inft, "--split", "validation", "--beside", "metrics/llama32_base_demo-sample-test")
    assert done.status == 2
    assert "it was made on other rows" in done.err
    same_name = evaluated(
        inft,
        "--output-dir",
        "x/llama32_base_demo-sample-test",
        "--format",
        "csv",
        "--beside",
        "metrics/llama32_base_demo-sample-test",
    )
    rows = list(csv.DictReader(io.StringIO(same_name.out)))
    assert len({row["system"] for row in rows}) == 2


def test_a_file_of_news_that_is_not_there_is_no_news(inft):
    done = inft("caption", "text", "--demo", "--news", "story.txt")
    assert done.status == 2
    assert "--news story.txt: there is no such file" in done.err
