"""evaluate(): its directory, its scores, what it refuses, and the same captions through plain PEFT and transformers."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from tiny_captioners import eval_params
from tiny_families import tiny_family

from inft.evaluation.evaluate import GALLERY_ROWS, evaluate
from inft.evaluation.metrics import ALL, METRICS
from inft.evaluation.metrics.scores import score_captions
from inft.evaluation.records import read_stored
from inft.models.loading import EMBEDDED
from params import UserError

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def stored(adapter_dir, tmp_path_factory):
    """An evaluation of the adapter on six drawn scenes."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("metrics") / "adapter"
    return evaluate(eval_params(adapter=adapter_dir, drift=4), directory, console=QUIET)


def test_the_directory_says_what_was_evaluated_and_how(stored, adapter_dir):
    record = json.loads((adapter_dir / "best.json").read_text())
    said = stored.evaluation
    assert (said.model, said.base_model, said.adapter, said.step) == ("llama32", "", str(adapter_dir), 7)
    assert said.adapter_sha256 == record["files"]["adapter_model.safetensors"]
    assert (said.data, said.split, said.setting, said.rows) == ("sample", "test", "zero-shot", 6)
    assert said.languages == ("en", "ur")


def test_scores_are_those_of_the_lines_in_the_file(stored):
    by_hand = score_captions(
        [p.generated_caption for p in stored.predictions],
        [[p.reference_caption] for p in stored.predictions],
        [p.lang for p in stored.predictions],
        resamples=50,
        seed=42,
    )
    assert set(stored.scores) == {"en", "ur", ALL}
    for language, metrics in stored.scores.items():
        assert set(metrics) == set(METRICS)
        for name, score in metrics.items():
            assert score.value == pytest.approx(by_hand[language][name].value)


def test_the_csv_has_a_line_per_language_and_metric(stored):
    rows = list(csv.DictReader(io.StringIO((stored.directory / "scores.csv").read_text())))
    assert len(rows) == 3 * len(METRICS)
    chrf = next(row for row in rows if (row["language"], row["metric"]) == ("en", "chrf"))
    assert float(chrf["value"]) == pytest.approx(stored.scores["en"]["chrf"].value)


def test_the_gallery_keeps_the_first_images_of_each_language(stored):
    shown = [p for p in stored.predictions if p.image]
    assert sorted(p.lang for p in shown) == ["en"] * 3 + ["ur"] * 3
    assert GALLERY_ROWS >= 3
    assert all((stored.directory / p.image).is_file() for p in shown)


def test_drift_has_a_figure_for_each_layer(stored):
    assert stored.drift.layers == (0, 1, 2, 3, 4, 5)
    assert stored.drift.cosine[0] == pytest.approx(1)  # no adapter on the embeddings
    assert all(-1 <= value < 0.999 for value in stored.drift.cosine[1:])


def test_evaluating_again_changes_nothing_and_loads_no_model(stored, adapter_dir, monkeypatch):
    def refuse(*args):
        raise AssertionError("a finished evaluation needs no model")

    monkeypatch.setattr("inft.evaluation.evaluate.load_captioner", refuse)
    before = {path: path.read_bytes() for path in stored.directory.rglob("*") if path.is_file()}
    again = evaluate(eval_params(adapter=adapter_dir, drift=4), stored.directory, console=QUIET)
    assert again.scores == stored.scores
    assert {path: path.read_bytes() for path in stored.directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 8}, "rows: 6 → 8"),
        ({"shots": 1}, "setting: zero-shot → random 1-shot"),
        ({"flags": {"max_new_tokens": "9"}}, "max_new_tokens"),
    ],
)
def test_other_settings_do_not_touch_an_evaluation(stored, adapter_dir, changes, said):
    before = (stored.directory / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"other settings.*{said}.*--overwrite"):
        evaluate(eval_params(adapter=adapter_dir, **changes), stored.directory, console=QUIET)
    assert (stored.directory / "predictions.jsonl").read_bytes() == before


def test_overwrite_replaces_an_evaluation_and_nothing_else(adapter_dir, tmp_path):
    where = tmp_path / "m"
    evaluate(eval_params(adapter=adapter_dir, limit=2), where, console=QUIET)
    (where / "notes.txt").write_text("mine")
    again = evaluate(eval_params(adapter=adapter_dir, limit=4), where, overwrite=True, console=QUIET)
    assert again.evaluation.rows == len(again.predictions) == 4
    assert (where / "notes.txt").read_text() == "mine"


def test_a_directory_with_other_files_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no evaluation"):
        evaluate(eval_params(), tmp_path, overwrite=True, console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_the_base_model_is_evaluated_alone_in_each_family(name, tmp_path):
    found = evaluate(eval_params(name, limit=4, flags={"languages": "en"}), tmp_path / "m", console=QUIET)
    assert found.evaluation.adapter is None
    assert found.scores["en"]["exact"].value >= 75  # the embedded models know English


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_plain_peft_and_transformers_write_the_same_captions(name, adapter_of, tmp_path):
    found = evaluate(eval_params(name, adapter_of(name), limit=4), tmp_path / "m", console=QUIET)
    spec = tiny_family(name).spec
    base = getattr(transformers, spec.auto_class).from_pretrained(EMBEDDED / name)
    model = PeftModel.from_pretrained(base, str(adapter_of(name))).eval()
    auto = transformers.AutoProcessor if spec.takes_images else transformers.AutoTokenizer
    collator = spec.collator(auto.from_pretrained(adapter_of(name)))
    from inft.evaluation.rows import load_rows

    rows = load_rows(eval_params(name).data, limit=4, with_images=spec.takes_images).rows
    for row, prediction in zip(rows, found.predictions_of(row.key for row in rows), strict=True):
        prompt = collator.prompts([row.sample])
        ends = [collator.end_token_id, base.generation_config.eos_token_id or collator.end_token_id]
        written = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=ends)
        text = collator.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert collator.control.sub("", text).strip() == prediction.generated_caption


def test_an_interrupted_evaluation_shows_as_unfinished(stored, adapter_dir, tmp_path):
    where = tmp_path / "m"
    where.mkdir()
    (where / "evaluation.json").write_text((stored.directory / "evaluation.json").read_text())
    lines = (stored.directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (where / "predictions.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    half = read_stored(where)
    assert half.scores == {}
    assert len(half.predictions) == 2
    whole = evaluate(eval_params(adapter=adapter_dir), where, console=QUIET)
    assert whole.scores == stored.scores


def test_unreadable_images_are_told_and_count_as_wrong(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    tiny_image(tmp_path / "b.png")
    rows = [{"image": name, "caption": f"a {name}", "language": "en"} for name in ("a.png", "b.png", "none.png")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = eval_params(flags={"data": str(tmp_path), "languages": "en"}, overrides=["data.context=none"])
    found = evaluate(params, tmp_path / "m", console=QUIET)
    errors = {p.where: p.error for p in found.predictions}
    assert "empty (0 bytes)" in errors["test.jsonl line 1"]
    assert errors["test.jsonl line 2"] is None
    assert "does not exist" in errors["test.jsonl line 3"]
    assert len(found.predictions) == 3
    assert found.scores["en"]["wrong_script"].value >= 200 / 3


def test_two_evaluations_do_not_write_into_one_directory(stored, adapter_dir):
    from inft.training.storage import locked

    with (
        locked(stored.directory, doing="evaluating into"),
        pytest.raises(UserError, match="another process is evaluating into"),
    ):
        evaluate(replace(eval_params(adapter=adapter_dir), drift=4), stored.directory, console=QUIET)


def test_forgetting_and_drift_of_other_rows_are_not_shown_for_these(adapter_dir, tmp_path):
    params = eval_params(adapter=adapter_dir, limit=8, drift=4)
    params = replace(params, forgetting=params.data)
    evaluate(params, tmp_path / "m", console=QUIET)
    with pytest.raises(UserError, match="drift: 4 rows → 6 rows"):
        evaluate(replace(params, drift=6), tmp_path / "m", console=QUIET)
    other = replace(params.data, split="validation")
    with pytest.raises(UserError, match="forgetting: sample, test, 8 rows → sample, validation, 8 rows"):
        evaluate(replace(params, forgetting=other), tmp_path / "m", console=QUIET)


def test_a_run_without_readable_rows_says_so_and_no_traceback(adapter_dir, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"junk")
    rows = [{"image": "bad.png", "caption": f"a {i}", "language": "en", "title": f"t{i}"} for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = eval_params(adapter=adapter_dir)
    data = replace(params.data, data=str(tmp_path), languages=("en",))
    with pytest.raises(UserError, match=r"can be captioned.*test\.jsonl line 1: image .*bad\.png"):
        evaluate(replace(params, forgetting=data), tmp_path / "m", console=QUIET)
    found = read_stored(tmp_path / "m")
    assert found.scores  # of the rows themselves: what was done stays


def test_rows_that_do_not_fit_are_left_out_of_losses_and_drift(adapter_dir, tmp_path):
    tiny_image(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "caption": "a " * length, "language": "en", "title": f"t{length}"}
        for length in (1, 2, 3, 4, 400)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data": str(tmp_path), "languages": "en"}
    params = eval_params(
        adapter=adapter_dir, drift=5, flags=flags, overrides=["basic.max_length=200", "data.context=none"]
    )
    found = evaluate(replace(params, forgetting=params.data), tmp_path / "m", console=QUIET)
    assert (found.forgetting.rows, found.forgetting.loss_rows) == (5, 4)
    assert found.drift.rows == 4


def test_a_draft_that_a_full_disk_left_is_in_nobodys_way(adapter_dir, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".inft-staging-evaluation.json").write_text("{")
    assert evaluate(eval_params(adapter=adapter_dir, limit=2), tmp_path / "m", console=QUIET).scores


def tiny_image(path):
    from PIL import Image

    Image.new("RGB", (64, 48), "blue").save(path)
