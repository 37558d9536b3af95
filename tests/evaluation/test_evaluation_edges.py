"""Edges of predicting, of the rows and of the sequence of an evaluation, each found unwatched by a mutation."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from tiny_captioners import captioner_of, eval_params

from inft.data.images import BadImage, FileImage
from inft.evaluation import evaluate as evaluate_module
from inft.evaluation import predict as predict_module
from inft.evaluation.evaluate import GALLERY_PIXELS, GALLERY_ROWS, _Job, _shots, evaluate
from inft.evaluation.metrics.scores import score_captions
from inft.evaluation.predict import Captioning, predict, predict_rows
from inft.evaluation.records import read_predictions
from inft.evaluation.rows import EvalRow, load_rows
from inft.sample import Prompt, Sample
from params import MUNIChusLoadConfig, UserError

QUIET = Console(quiet=True)
SAMPLE = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en", "ja", "ur"))


class Seen(Exception):
    """Carries what a replaced function was called with."""


@pytest.fixture(scope="module")
def rows():
    return load_rows(SAMPLE, limit=12, with_images=True).rows


@pytest.fixture
def captioning(captioner):
    return Captioning(model=captioner.model, collator=captioner.collator, max_new_tokens=6, batch_size=5)


def written(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def config(path, **changes):
    return MUNIChusLoadConfig(**{"data": str(path), "split": "test", "context": "none", **changes})


def test_lines_of_rows_that_are_not_asked_for_are_not_counted(captioning, rows, tmp_path):
    file, told = tmp_path / "p.jsonl", []
    predict(captioning, rows[:6], file)
    predict(captioning, rows[:4], file, on_progress=lambda *done: told.append(done))
    assert told == [(4, 4)]
    assert {p.row for p in read_predictions(tmp_path, name="p.jsonl")} == {row.key for row in rows[:4]}


def test_long_prompts_come_first_then_large_images_and_a_languages_rows_together(tmp_path, monkeypatch):
    def row(name, *, news="", size=(64, 64), language="en"):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        image, prompt = FileImage(tmp_path / f"{name}.png"), Prompt(instruction="Say it.", news=news)
        sample = Sample(image=image, prompt=prompt, answer="a", language=language, meta={"where": name})
        return EvalRow(key=name, sample=sample, references=("a",))

    asked = [
        *(row("d", language="ur"), row("a", language="en"), row("b", language="ur"), row("c", language="en")),
        *(row("wide", size=(900, 100)), row("long", news="word " * 400)),
    ]
    monkeypatch.setattr(predict_module, "generate_captions", lambda model, collator, samples, **_: [""] * len(samples))
    captioning = Captioning(model=None, collator=captioner_of("aya").collator, max_new_tokens=1, batch_size=1)
    order = [prediction.row for batch in predict_rows(captioning, asked) for prediction in batch]
    assert order == ["long", "wide", "a", "c", "b", "d"]


def test_a_prediction_keeps_every_reference_of_its_row_and_scores_count_them(captioning, rows, tmp_path):
    row = replace(rows[0], references=("one", "two"))
    [found] = predict(captioning, [row], tmp_path / "p.jsonl")
    assert found.references == found.all_references == ("one", "two")
    [again] = read_predictions(tmp_path, name="p.jsonl")
    assert again.all_references == ("one", "two")


def test_seconds_are_those_of_the_batch_per_row(captioning, rows, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(predict_module, "perf_counter", lambda: next(clock))
    [batch] = predict_rows(captioning, rows[:5])
    assert [prediction.seconds for prediction in batch] == [2.0] * 5


def test_each_row_is_prompted_with_its_own_examples(captioning, rows, monkeypatch):
    seen = {}

    def spy(model, collator, samples, *, shots, **_):
        seen.update(
            {sample.meta["where"]: [shot.answer for shot in own] for sample, own in zip(samples, shots, strict=True)}
        )
        return [""] * len(samples)

    monkeypatch.setattr(predict_module, "generate_captions", spy)
    broken = replace(rows[2], sample=replace(rows[2].sample, image=BadImage("gone")))
    asked = [*rows[:2], broken, *rows[3:7]]
    few_shot = replace(captioning, shots=lambda row: [replace(row.sample, answer=f"example of {row.key}")])
    list(predict_rows(few_shot, asked))
    assert seen == {row.sample.meta["where"]: [f"example of {row.key}"] for row in asked if row is not broken}


def test_an_image_is_read_once_though_it_is_shown(captioning, rows, tmp_path):
    loads = []

    class Counted:
        def load(self):
            loads.append(1)
            return rows[0].sample.image.load()

    row = replace(rows[0], sample=replace(rows[0].sample, image=Counted()))
    predict(captioning, [row], tmp_path / "p.jsonl", on_image=lambda row, image: "gallery/x.png")
    assert len(loads) == 1


def test_bytes_that_are_no_utf8_cost_one_line_only(tmp_path):
    good = json.dumps({"row": "1", "lang": "en", "generated_caption": "a", "reference_caption": "b", "title": ""})
    (tmp_path / "predictions.jsonl").write_bytes(good.encode() + b'\n{"row": "2", "lang": "\xe0\xb6')
    assert [p.row for p in read_predictions(tmp_path)] == ["1"]


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return {"image": "a.png", "title": "one", "language": "en"}


def test_empty_captions_are_left_out_whatever_training_does_with_them(picture, tmp_path):
    written(tmp_path / "test.jsonl", {**picture, "caption": "red"}, {**picture, "caption": ""})
    found = load_rows(config(tmp_path, remove_empty=False), limit=None, with_images=True)
    assert (len(found.rows), found.without_reference, found.bad) == (1, 1, ())


def test_a_limit_takes_no_beginning_of_the_data():
    whole, some = (load_rows(replace(SAMPLE, languages=("en",)), limit=n, with_images=True).rows for n in (None, 9))
    assert [row.key for row in some] != [row.key for row in whole[:9]]
    assert [row.key for row in some] == [row.key for row in whole if row.key in {row.key for row in some}]


@pytest.mark.parametrize("other", [{"title": "two"}, {"content": "other news"}, {"language": "fr"}])
def test_one_image_under_another_title_or_prompt_is_another_row(picture, tmp_path, other):
    row = {**picture, "content": "news", "caption": "red"}
    written(tmp_path / "test.jsonl", row, {**row, "caption": "a red field", **other})
    found = load_rows(config(tmp_path, context="content"), limit=None, with_images=True)
    assert [row.references for row in found.rows] == [("red",), ("a red field",)]


def test_a_reference_that_stands_twice_counts_once(picture, tmp_path):
    written(tmp_path / "test.jsonl", {**picture, "captions": ["red", "red field", "red"]})
    [row] = load_rows(config(tmp_path), limit=None, with_images=True).rows
    assert row.references == ("red", "red field")


def test_another_prompt_makes_other_keys():
    one, other = (
        load_rows(replace(SAMPLE, instruction=text), limit=3, with_images=True) for text in ("Say it.", "Write it.")
    )
    assert one.fingerprint != other.fingerprint
    assert not {row.key for row in one.rows} & {row.key for row in other.rows}


def test_of_the_held_out_rows_the_languages_that_are_asked_for(held):
    asked = replace(held, split="heldout", languages=("fr",))
    found = load_rows(asked, limit=None, with_images=False, trained=held)
    assert found.languages == ("fr",)
    with pytest.raises(UserError, match="no rows in language 'si': the split heldout has en, fr"):
        load_rows(replace(asked, languages=("fr", "si")), limit=None, with_images=False, trained=held)


def test_held_out_rows_are_found_where_the_data_lies_now(held, tmp_path):
    before = load_rows(replace(held, split="heldout"), limit=None, with_images=False, trained=held)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "captions.jsonl").rename(moved / "captions.jsonl")
    asked = replace(held, split="heldout", data=str(moved))
    after = load_rows(asked, limit=None, with_images=False, trained=held)
    assert after.fingerprint == before.fingerprint


def test_an_adapter_that_was_moved_goes_on_with_its_evaluation(adapter_dir, tmp_path):
    where = tmp_path / "m"
    evaluate(eval_params(adapter=adapter_dir, limit=2), where, console=QUIET)
    shutil.copytree(adapter_dir, tmp_path / "moved")
    again = evaluate(eval_params(adapter=tmp_path / "moved", limit=2), where, console=QUIET)
    assert again.evaluation.adapter == str(adapter_dir)


def test_overwrite_leaves_nothing_of_the_evaluation_before(adapter_dir, tmp_path):
    where, params = tmp_path / "m", eval_params(adapter=adapter_dir, limit=2)
    first = evaluate(params, where, console=QUIET)
    lines = [json.loads(line) for line in (where / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    written(where / "predictions.jsonl", *({**line, "generated_caption": "of another model"} for line in lines))
    for name in ("forgetting.json", "drift.json"):
        (where / name).write_text("{}")
    (where / "forgetting").mkdir()
    (where / "forgetting" / "base.jsonl").write_text("")
    again = evaluate(params, where, overwrite=True, console=QUIET)
    assert [p.generated_caption for p in again.predictions] == [p.generated_caption for p in first.predictions]
    assert not any((where / name).exists() for name in ("forgetting.json", "drift.json", "forgetting"))


@pytest.mark.parametrize("choice", ["random", "similar"])
def test_examples_are_rows_of_the_train_split_all_of_them(choice):
    params = eval_params("aya", shots=2, shot_choice=choice, flags={"languages": "en"})
    captioner, taken = captioner_of("aya"), set()
    rows = load_rows(params.data, limit=None, with_images=True)
    job = _Job(params=params, directory=Path(), stored=None, rows=rows, forgetting_rows=None, console=QUIET)
    shots = _shots(job, captioner)
    for row in rows.rows:
        taken |= {sample.meta["where"] for sample in shots(row)}
    assert all(place.startswith("sample train scene") for place in taken)


def test_few_shot_prompts_reach_the_model(tmp_path, monkeypatch):
    def spy(model, collator, samples, *, shots, **_):
        raise Seen([len(own) for own in shots])

    monkeypatch.setattr(predict_module, "generate_captions", spy)
    params = eval_params("text", shots=2, limit=2, flags={"languages": "en"})
    with pytest.raises(Seen) as seen:
        evaluate(params, tmp_path / "m", console=QUIET)
    assert seen.value.args == ([2, 2],)


def test_forgetting_is_measured_zero_shot(adapter_dir, tmp_path, monkeypatch):
    def spy(captioner, captioning, *_, **__):
        raise Seen(captioning)

    monkeypatch.setattr(evaluate_module, "measure_forgetting", spy)
    params = eval_params(adapter=adapter_dir, limit=2, shots=1)
    with pytest.raises(Seen) as seen:
        evaluate(replace(params, forgetting=SAMPLE), tmp_path / "m", console=QUIET)
    assert seen.value.args[0].shots is None


def test_the_gallery_is_small(picture, tmp_path):
    for number in range(GALLERY_ROWS + 2):
        Image.new("RGB", (800, 600), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "caption": f"c {n}", "language": "en"} for n in range(GALLERY_ROWS + 2)]
    written(tmp_path / "test.jsonl", *rows)
    params = eval_params(limit=None, flags={"data": str(tmp_path), "languages": "en"}, overrides=["data.context=none"])
    stored = evaluate(params, tmp_path / "m", console=QUIET)
    shown = [p.image for p in stored.predictions if p.image]
    assert len(shown) == len(list((tmp_path / "m" / "gallery").iterdir())) == GALLERY_ROWS
    sizes = [Image.open(tmp_path / "m" / image).size for image in shown]
    assert sizes == [(GALLERY_PIXELS, GALLERY_PIXELS * 3 // 4)] * GALLERY_ROWS


def test_drift_passes_over_rows_whose_image_cannot_be_read(adapter_dir, tmp_path):
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    written(tmp_path / "test.jsonl", *({"image": f"{n}.png", "caption": f"c {n}", "language": "en"} for n in range(5)))
    params = eval_params(
        adapter=adapter_dir,
        drift=5,
        flags={"data": str(tmp_path), "languages": "en"},
        overrides=["data.context=none"],
    )
    assert evaluate(params, tmp_path / "m", console=QUIET).drift.rows == 4


def test_scores_that_are_missing_are_made_from_the_lines_without_a_model(adapter_dir, tmp_path, monkeypatch):
    params = eval_params(adapter=adapter_dir, limit=4)
    first = evaluate(params, tmp_path / "m", console=QUIET)
    (tmp_path / "m" / "scores.json").unlink()
    monkeypatch.setattr(evaluate_module, "load_captioner", lambda *_: pytest.fail("no model is needed"))
    again = evaluate(params, tmp_path / "m", console=QUIET)
    assert again.scores == first.scores != {}
    by_hand = score_captions(
        [p.generated_caption for p in again.predictions_of(p.row for p in first.predictions)],
        [p.all_references for p in first.predictions],
        [p.lang for p in first.predictions],
        resamples=50,
        seed=42,
    )
    assert {code: by_hand[code] for code in again.scores} == again.scores  # intervals too: paired by the seed


def test_rows_that_are_left_out_are_told(picture, tmp_path):
    written(tmp_path / "test.jsonl", {**picture, "caption": "red"}, {**picture, "caption": ""})
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("{no json\n")
    console = Console(file=StringIO(), width=200)
    params = eval_params(flags={"data": str(tmp_path), "languages": "en"}, overrides=["data.context=none"])
    evaluate(params, tmp_path / "m", console=console)
    text = console.file.getvalue()
    assert "1 rows have no reference caption and are left out" in text
    assert "1 lines are no rows, the first: test.jsonl line 3: not JSON" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [("basic.seed=1", "seed"), ("basic.max_length=100", "max_length"), ("basic.dtype=bfloat16", "dtype")],
)
def test_settings_that_change_captions_or_intervals_are_other_settings(adapter_dir, tmp_path, override, said):
    evaluate(eval_params(adapter=adapter_dir, limit=2), tmp_path / "m", console=QUIET)
    with pytest.raises(UserError, match=f"other settings.*{said}"):
        evaluate(eval_params(adapter=adapter_dir, limit=2, overrides=[override]), tmp_path / "m", console=QUIET)


def test_what_cannot_be_scored_in_the_rows_of_forgetting_is_told_before_a_caption(adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_captioner", lambda *_: pytest.fail("told too late"))
    params = eval_params(adapter=adapter_dir, limit=2, overrides=["data.cjk_tokens=[]"])
    with pytest.raises(UserError, match=r"--set data\.cjk_tokens="):
        evaluate(replace(params, forgetting=replace(SAMPLE, languages=("zh",))), tmp_path / "m", console=QUIET)
    assert not (tmp_path / "m").exists()


def test_forgetting_that_is_there_is_not_measured_again(adapter_dir, tmp_path, monkeypatch):
    where, params = tmp_path / "m", eval_params(adapter=adapter_dir, limit=2, flags={"languages": "en"})
    params = replace(params, forgetting=replace(SAMPLE, languages=("en",)))
    first = evaluate(params, where, console=QUIET)
    monkeypatch.setattr(evaluate_module, "measure_forgetting", lambda *_, **__: pytest.fail("measured again"))
    (where / "predictions.jsonl").write_text("")  # the model is needed again
    again = evaluate(params, where, console=QUIET)
    assert again.forgetting == first.forgetting
