import json
import subprocess
import sys

import pytest

from inft.evaluation.metrics import ALL, Score
from inft.evaluation.records import Evaluation, scores_to_json, to_json


@pytest.fixture
def evaluation(tmp_path):
    """The evaluation of a base model on one row."""
    directory = tmp_path / "metrics" / "base"
    directory.mkdir(parents=True)
    record = Evaluation(
        model="text",
        base_model="",
        adapter=None,
        adapter_sha256=None,
        step=None,
        task=None,
        setting="zero-shot",
        data="sample",
        split="test",
        fingerprint="f",
        languages=("en",),
        language_names={"en": "English"},
        rows=1,
        without_reference=0,
        generation={},
    )
    row = {"row": "1", "lang": "en", "generated_caption": "A tree.", "reference_caption": "A fish.", "title": "t"}
    scores = {language: {"chrf": Score(12.0, 10.0, 14.0)} for language in ("en", ALL)}
    (directory / "evaluation.json").write_text(to_json(record), encoding="utf-8")
    (directory / "predictions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (directory / "scores.json").write_text(scores_to_json(scores), encoding="utf-8")
    return directory


def test_report_writes_a_page_and_its_figures_and_says_so(inft, evaluation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = inft("report", str(evaluation))
    assert found.status == 0
    assert "wrote report.html (" in found.out
    assert "wrote report_png: languages.png, gallery.png" in found.out
    assert "A tree." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_goes_where_told_and_the_figures_can_be_left_out(inft, evaluation, tmp_path):
    target = tmp_path / "new" / "page.html"
    assert inft("report", str(evaluation), "-o", str(target), "--no-png").status == 0
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["absent"], "absent: there is no such directory. Name the output directory of `inft train`"),
        (["{evaluation}", "{evaluation}"], "are the same directory: drop one"),
        (["{evaluation}", "-o", "{evaluation}/scores.json"], "is no report of inft"),
        (["{evaluation}", "-o", "{evaluation}"], "is a directory: name a file"),
        (["{evaluation}", "--metric-dir", "absent"], "--metric-dir absent: there is no such directory"),
    ],
)
def test_a_mistake_is_told_without_a_page(inft, evaluation, tmp_path, monkeypatch, args, complaint):
    monkeypatch.chdir(tmp_path)
    found = inft("report", *(arg.format(evaluation=evaluation) for arg in args))
    assert found.status == 2
    assert complaint in found.err
    assert list(tmp_path.glob("*.html")) == []


def test_a_report_without_a_run_shows_how_to_name_one(inft):
    found = inft("report")
    assert "RUN" in found.out + found.err
    assert found.status == 2


def test_a_report_needs_no_torch(evaluation, tmp_path):
    code = (
        "import sys\n"
        "from inft.__main__ import main\n"
        "try:\n"
        f"    main(['report', {str(evaluation)!r}, '-o', {str(tmp_path / 'a.html')!r}])\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.html").exists()
