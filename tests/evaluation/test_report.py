import json
import shlex
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_files import (
    LANGUAGES,
    rows_of,
    write_adapter,
    write_drift,
    write_evaluation,
    write_forgetting,
    write_log,
    write_run,
)

from inft.evaluation.fonts import installed_fonts
from inft.evaluation.report import write_report
from inft.evaluation.report_runs import gather
from inft.evaluation.report_sheet import LINES, wrapped
from inft.evaluation.report_tables import figure
from params import UserError

HOSTILE = "<script>alert('x')</script> & \"quoted\" $1 and $2"
PNGS = {"curves.png", "languages.png", "forgetting.png", "drift.png", "gallery.png"}


class Page(HTMLParser):
    """What a browser would find in a page: addresses, tags, texts with their attributes, notes."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.pieces = [], [], []
        self.stack = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "br"):
            self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"unbalanced {tag}"

    def handle_data(self, data):
        if data.strip():
            tag, attrs = self.stack[-1] if self.stack else ("", {})
            self.pieces.append((tag, attrs, data))

    @property
    def text(self):
        return " ".join(" ".join(data for tag, _, data in self.pieces if tag != "style").split())

    def captions(self):
        """(language, text) of every caption; all have dir=auto."""
        found = [(attrs, data) for _, attrs, data in self.pieces if attrs.get("class") == "caption"]
        assert all(attrs["dir"] == "auto" for attrs, _ in found)
        return [(attrs["lang"], data) for attrs, data in found]


def page_of(*directories, output, **options):
    write_report(list(directories), output=output, png=False, **options)
    return Page(output.read_text(encoding="utf-8"))


def changed(predictions, texts):
    """The predictions with other captions, by row."""
    return [replace(one, generated_caption=texts.get(one.row, one.generated_caption)) for one in predictions]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two runs in one log, one with CRAFT, evaluated with their base in ten languages, reported with PNG files."""
    root = tmp_path_factory.mktemp("report")
    plain = write_run(root / "outputs" / "plain", logs=root / "logs")
    craft = write_run(root / "outputs" / "craft", logs=root / "logs", craft=True, lr=1e-3)
    rows = rows_of()
    write_evaluation(root / "metrics" / "base", changed(rows, {"ur0": "", "si0": HOSTILE}), value=20.0)
    first = write_evaluation(root / "metrics" / "plain", rows, run=plain, value=60.0)
    unread = [replace(one, error="image is damaged", generated_caption="") if one.row == "en0" else one for one in rows]
    write_evaluation(root / "metrics" / "craft", unread, run=craft, value=70.0)
    write_forgetting(first)
    write_drift(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each glyph that no font has
        return write_report([plain, craft], output=root / "out" / "report.html", metric_dir=root / "metrics")


@pytest.fixture(scope="module")
def page(written):
    return Page(written.page.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(page, written):
    assert page.addresses
    assert [one for one in page.addresses if not one.startswith(("data:image/", "#"))] == []
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    text = written.page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert [part[:5] for part in text.split("url(")[1:]] == ["data:"] * text.count("url(")


def test_every_caption_is_on_the_page_with_its_language(page):
    shown = page.captions()
    for prediction in rows_of():
        assert shown.count((prediction.lang, prediction.reference_caption)) >= 3  # reference and two systems
    assert {language for language, _ in shown} == set(LANGUAGES)


def test_text_that_looks_like_html_stays_text(page):
    assert ("si", HOSTILE) in page.captions()
    assert "script" not in page.tags


def test_exact_empty_and_unreadable_rows_are_told_apart(page):
    badges = [data for _, attrs, data in page.pieces if "badge" in attrs.get("class", "")]
    assert badges.count("exact") == 30 - 3  # base: ur empty, si wrong; craft: en unreadable
    assert badges.count("not captioned") == 1
    assert "image is damaged" in page.text
    assert [data for _, attrs, data in page.pieces if attrs.get("class") == "empty"] == ["(empty)"]


def test_differences_between_the_runs_are_marked_and_equal_parameters_are_not(page):
    marked = [data for tag, attrs, data in page.pieces if tag == "td" and attrs.get("class", "").strip() == "differs"]
    assert {"0.003", "0.001", "true", "false"} <= {text.strip() for text in marked}
    assert "float32" not in {text.strip() for text in marked}
    assert "differs:" in page.text  # for those who do not see the mark
    assert page.text.index("sft.lr") < page.text.index("training_mode")  # what differs comes first


def test_the_summary_says_what_each_run_came_to(page):
    for words in (
        "32 parameters (LoRA r 16, alpha 32)",
        "30, evaluation loss 0.5000",
        "finished",
        "1 min 15 s",
        "20.0 → 60.0",
        "20.0 → 70.0",
        "sample: 40 rows in ur",
    ):
        assert words in page.text


def test_forgetting_is_a_plain_sentence_with_figures(page):
    assert (
        "plain lost 1 of the 2 languages that the base could do: chrF en 99.1 → 2.3 (−96.8, −97.5 to −96.0). "
        "It kept 1: chrF fr 90.0 → 89.5 (−0.5, −1.2 to 0.2)."
    ) in page.text
    assert "2.500" in page.text  # a loss without the input


def test_the_figures_are_also_png_files(written):
    assert {path.name for path in written.pictures} == PNGS
    for path in written.pictures:
        assert path.parent.name == "report_png"
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width > 1000


def test_every_script_has_glyphs(written):
    if not installed_fonts():
        pytest.skip("weblate-fonts is not installed")
    assert written.notes == []  # and the fixture turns matplotlib's warnings of missing glyphs into errors


def test_drawing_leaves_the_settings_of_matplotlib_alone(written, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report([written.page.parents[1] / "metrics" / "base"], output=tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before


def test_each_run_has_its_own_events_of_a_log_that_runs_share(tmp_path):
    first = write_run(tmp_path / "a", logs=tmp_path / "logs", best=False)
    second = write_run(tmp_path / "b", logs=tmp_path / "logs", best=False, steps=(5, 15))
    steps = [[event["step"] for event in run.training.events if event["event"] == "log"] for run in runs(first, second)]
    assert steps == [[10, 20, 30], [5, 15]]


def runs(*directories):
    return gather(list(directories)).runs


def test_paths_of_a_run_are_found_from_where_it_was_started(tmp_path, monkeypatch):
    """Those in params.yaml are relative to that directory, which is not the one of the report."""
    (tmp_path / "started").mkdir()
    monkeypatch.chdir(tmp_path / "started")
    write_run(Path("outputs/x"), logs="logs")
    write_evaluation(Path("metrics/x"), rows_of(languages=("en",)), run=Path("outputs/x"))
    monkeypatch.chdir(tmp_path)
    (run,) = runs(tmp_path / "started" / "outputs" / "x")
    assert run.training.status == "finished"
    assert [one.name for one in run.evaluations] == ["x"]


def test_a_run_without_log_and_evaluation_is_reported_with_the_commands_that_bring_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "new run")
    page = page_of(run, output=tmp_path / "report.html")
    assert "No log of new run was found" in page.text
    assert "trainer_llama32_basic_demo.jsonl" in page.text
    assert f"inft evaluate llama32 --adapter '{run / 'best'}'" in page.text
    assert "--forgetting DATA" in page.text
    assert "--drift N" in page.text


def test_an_evaluation_without_its_base_names_the_command_for_it(tmp_path):
    run = write_run(tmp_path / "x")
    write_evaluation(tmp_path / "m" / "x", rows_of(languages=("en", "ur")), run=run)
    page = page_of(run, output=tmp_path / "report.html", metric_dir=tmp_path / "m")
    best = shlex.quote(str(run / "best"))
    assert f"inft evaluate llama32 --base --adapter {best} --data sample --split test --languages en,ur" in page.text


def test_evaluations_belong_to_a_run_by_the_sum_of_its_weights_and_bases_by_their_rows(tmp_path):
    run, other = write_run(tmp_path / "x"), write_run(tmp_path / "other")
    rows, metrics = rows_of(languages=("en",)), tmp_path / "m"
    write_evaluation(metrics / "own", rows, run=run, adapter="moved/elsewhere")
    write_evaluation(metrics / "foreign", rows, run=other)
    write_evaluation(metrics / "base", rows)
    write_evaluation(metrics / "base of other rows", rows, fingerprint="f2")
    write_evaluation(metrics / "base of other family", rows, model="aya")
    found = gather([run], metric_dir=metrics)
    assert [one.name for one in found.runs[0].evaluations] == ["own"]
    assert [one.name for one in found.bases] == ["base"]


def test_few_shot_baselines_stand_beside_the_base_and_other_rows_apart(tmp_path):
    run = write_run(tmp_path / "x")
    rows, metrics = rows_of(languages=("en",)), tmp_path / "m"
    write_evaluation(metrics / "x", rows, run=run)
    write_evaluation(metrics / "shots", rows, setting="random 3-shot")
    write_evaluation(metrics / "base", rows)
    write_evaluation(metrics / "x other", rows, run=run, fingerprint="f2", split="validation")
    found = write_report([run], output=tmp_path / "report.html", metric_dir=metrics)
    page = Page(found.page.read_text(encoding="utf-8"))
    assert "base, random 3-shot" in page.text
    assert "sample, split validation, 1 rows" in page.text
    assert {"languages.png", "languages_2.png", "gallery_2.png"} <= {path.name for path in found.pictures}


def test_an_unfinished_evaluation_says_how_far_it_is(tmp_path):
    run, rows = write_run(tmp_path / "x"), rows_of(languages=("en", "fr", "ur"))
    write_evaluation(tmp_path / "m" / "base", rows)
    write_evaluation(tmp_path / "m" / "x", rows[:2], run=run, finished=False, rows=3, languages=("en", "fr", "ur"))
    page = page_of(run, output=tmp_path / "report.html", metric_dir=tmp_path / "m")
    assert "unfinished, 2 of 3 rows" in page.text
    assert "not yet" in page.text


def test_an_image_that_is_missing_damaged_or_outside_is_told_in_its_place(tmp_path):
    rows = rows_of(languages=("en", "fr", "ur", "ar"))
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    rows = [replace(one, image="../secret.png") if one.lang == "ur" else one for one in rows]
    evaluation = write_evaluation(tmp_path / "m", rows, images=False)
    (evaluation / "gallery" / "fr0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    Image.new("RGB", (8, 8)).save(evaluation / "gallery" / "ar0.png")
    page = page_of(evaluation, output=tmp_path / "report.html")
    told = [data for _, attrs, data in page.pieces if attrs.get("class") == "badge bad"]
    assert ["does not exist" in told[0], "fr0.png" in told[1], "lies outside" in told[2]] == [True] * 3
    assert sum(one.startswith("data:image/jpeg") for one in page.addresses) == 1


def test_runs_of_different_families_stand_side_by_side(tmp_path):
    llama, aya = write_run(tmp_path / "a" / "x"), write_run(tmp_path / "b" / "x", model="aya")
    rows = rows_of(languages=("en",))
    write_evaluation(tmp_path / "m" / "1", rows, run=llama)
    write_evaluation(tmp_path / "m" / "2", rows, run=aya, model="aya")
    write_evaluation(tmp_path / "m" / "3", rows)
    write_evaluation(tmp_path / "m" / "4", rows, model="aya")
    page = page_of(llama, aya, output=tmp_path / "report.html", metric_dir=tmp_path / "m")
    for label in ("a/x", "b/x", "base llama32", "base aya"):
        assert label in page.text


def test_an_evaluation_can_be_named_alone_or_with_its_run(tmp_path):
    run, rows = write_run(tmp_path / "x"), rows_of(languages=("en",))
    named = write_evaluation(tmp_path / "far" / "away", rows, run=run)
    base = write_evaluation(tmp_path / "far" / "base", rows)
    alone = gather([named])
    assert [(one.label, one.training) for one in alone.runs] == [("away", None)]
    assert [one.name for one in alone.bases] == ["base"]  # beside it
    together = gather([run, named, base], metric_dir=tmp_path)
    assert [(one.label, len(one.evaluations)) for one in together.runs] == [("x", 1)]
    assert len(together.bases) == 1
    assert "runs ·" in page_of(base, output=tmp_path / "report.html").text  # a base alone


def test_a_text_model_has_a_gallery_without_images(tmp_path):
    rows = [replace(one, image=None) for one in rows_of(languages=("en", "ur"))]
    evaluation = write_evaluation(tmp_path / "m", rows, images=False)
    page = page_of(evaluation, output=tmp_path / "report.html")
    assert ("ur", rows[1].reference_caption) in page.captions()
    assert page.tags.count("img") == 1  # the bars


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda run: (run / "params.yaml").unlink(), "neither a run nor an evaluation"),
        (lambda run: (run / "params.yaml").write_text("sft: {lrr: 1}\n"), "did you mean"),
        (lambda run: (run / "best" / "best.json").write_text("{"), "best.json"),
        (lambda run: (run / "best" / "adapter_model.safetensors").write_bytes(b"x"), "half copied or damaged"),
        (lambda run: (run.parent / "m" / "scores.json").write_text("{}"), "scores.json is damaged"),
        (lambda run: (run.parent / "m" / "scores.json").write_text('{"scores": {"en": 1}}'), "scores.json is damaged"),
        (lambda run: (run.parent / "m" / "forgetting.json").write_text("[]"), "forgetting.json"),
    ],
)
def test_a_damaged_file_is_named_with_its_remedy(tmp_path, break_it, complaint):
    run = write_run(tmp_path / "x")
    write_evaluation(tmp_path / "m", rows_of(languages=("en",)), run=run)
    break_it(run)
    with pytest.raises(UserError, match=complaint):
        gather([run, tmp_path / "m"])


def test_what_is_no_run_is_refused_with_a_hint(tmp_path):
    run = write_run(tmp_path / "x")
    with pytest.raises(UserError, match=r"neither a run nor an evaluation. Did you mean .*x\?"):
        gather([run / "best"])
    with pytest.raises(UserError, match="no such directory"):
        gather([tmp_path / "absent"])
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="are the same directory"):
        gather([run, tmp_path / "link"])
    with pytest.raises(UserError, match="--metric-dir"):
        gather([run], metric_dir=tmp_path / "absent")


def test_a_damaged_evaluation_that_nobody_named_is_passed_over_with_a_note(tmp_path):
    run = write_run(tmp_path / "x")
    (tmp_path / "m" / "broken").mkdir(parents=True)
    (tmp_path / "m" / "broken" / "evaluation.json").write_text("{", encoding="utf-8")
    page = page_of(run, output=tmp_path / "report.html", metric_dir=tmp_path / "m")
    assert "Passed over: " in page.text


def test_a_file_that_no_report_wrote_is_kept_unless_told(tmp_path):
    evaluation, output = write_evaluation(tmp_path / "m", rows_of(languages=("en",))), tmp_path / "report.html"
    output.write_text("<p>mine</p>", encoding="utf-8")
    with pytest.raises(UserError, match="--overwrite"):
        write_report([evaluation], output=output)
    assert output.read_text(encoding="utf-8") == "<p>mine</p>"
    write_report([evaluation], output=output, png=False, overwrite=True)
    write_report([evaluation], output=output, png=False)  # its own page is replaced without asking
    with pytest.raises(UserError, match="is a directory"):
        write_report([evaluation], output=tmp_path)


def test_figures_of_an_earlier_report_go_and_other_files_stay(tmp_path):
    evaluation, folder = write_evaluation(tmp_path / "m", rows_of(languages=("en",))), tmp_path / "report_png"
    folder.mkdir()
    for name in ("drift.png", "languages_7.png", "mine.png", "notes.txt"):
        (folder / name).write_bytes(b"old")
    with pytest.raises(UserError, match=r"holds .*, and no report lies beside it"):  # whose are they?
        write_report([evaluation], output=tmp_path / "report.html")
    assert (folder / "drift.png").read_bytes() == b"old"
    found = write_report([evaluation], output=tmp_path / "report.html", overwrite=True)
    assert {path.name for path in found.pictures} == {"languages.png", "gallery.png"}
    assert {path.name for path in folder.iterdir()} == {"languages.png", "gallery.png", "mine.png", "notes.txt"}


def test_a_report_that_cannot_be_written_leaves_no_half_page(tmp_path):
    evaluation = write_evaluation(tmp_path / "m", rows_of(languages=("en",)))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([evaluation], output=tmp_path / "file" / "report.html", png=False)
    (tmp_path / "report_png").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="the figures need a directory there"):
        write_report([evaluation], output=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_evaluation_event_with_captions_is_drawn(tmp_path):
    from inft.training.curves import draw_runs
    from inft.training.runlog import read_events

    path = write_log(tmp_path / "trainer_x.jsonl", tmp_path / "x")
    drawn = draw_runs({"x": list(read_events(path))})
    lines = {axis.get_title(): [line.get_label() for line in axis.get_lines()] for axis in drawn.axes}
    assert lines["captions during training"] == ["captions/chrf"]
    assert lines["CIDEr during training"] == ["captions/cider"]


def test_an_adapter_that_was_trained_again_has_no_old_evaluations(tmp_path):
    import shutil

    run = write_run(tmp_path / "x")
    write_evaluation(tmp_path / "m" / "x", rows_of(languages=("en",)), run=run)
    shutil.rmtree(run / "best")
    write_adapter(run / "best", name="trained again")
    assert gather([run], metric_dir=tmp_path / "m").runs[0].evaluations == []


@pytest.mark.parametrize(
    ("value", "signed", "shown"),
    [(-96.75, False, "−96.8"), (0.04, True, "0.0"), (-0.04, True, "0.0"), (3, True, "+3.0")],
)
def test_a_figure_has_a_sign_only_where_it_shows(value, signed, shown):
    from inft.evaluation.metrics import METRICS

    assert figure(value, METRICS["chrf"], signed=signed) == shown


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120), st.integers(3, 40))
def test_wrapped_lines_fit_and_lose_nothing_but_spaces(text, columns):
    lines = wrapped(text, len, columns)
    assert len(lines) <= LINES
    whole = "".join(text.split())
    found = "".join("".join(lines).split())
    assert found == whole or (found.endswith("…") and whole.startswith(found[:-1]))


def test_long_words_and_wide_characters_break_and_stops_hang():
    assert wrapped("aaa bbb ccc", len, 7) == ["aaa bbb", "ccc"]
    assert wrapped("真ん中に円がある。", len, 4) == ["真ん中に", "円があ", "る。"]
    assert wrapped("x" * 30, len, 14) == ["x" * 14, "x" * 14, "xx"]


@settings(max_examples=4, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=6))
def test_any_caption_is_shown_as_it_is_without_breaking_the_page(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("any")
    rows = [
        replace(rows_of(languages=("en",))[0], row=str(number), generated_caption=text, title=text, image=None)
        for number, text in enumerate(texts)
    ]
    write_evaluation(root / "m", rows, images=False)
    page = page_of(root / "m", output=root / "report.html")
    shown = "".join(data for _, data in page.captions())
    for text in texts:
        for letter in (one for one in text if one.isalnum()):
            assert letter in shown
    assert json.loads((root / "m" / "scores.json").read_text())
