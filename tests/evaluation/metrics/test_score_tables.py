"""inft.evaluation.metrics.tables: the same scores for the terminal, as CSV and as LaTeX."""

import csv
import io
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from inft.evaluation.metrics import ALL, METRICS, Score
from inft.evaluation.metrics.scores import score_captions
from inft.evaluation.metrics.tables import (
    best_systems,
    latex_text,
    number,
    scores_csv,
    scores_latex,
    scores_table,
)
from params.munichus import LANGUAGE_NAMES

AWKWARD = r'[best] * 3% of {a_b} & #1 $x ~ ^ \ <a|b> "q" ± × –'


@pytest.fixture(scope="module")
def systems(rows, other_rows):
    return {
        "llama32 base, zero-shot": score_captions(*rows.args(), resamples=50),
        "aya_craft": score_captions(*other_rows.args(), resamples=50),
    }


def scores_of(**values):
    """Scores of chrF: language=(value, low, high)."""
    return {language: {"chrf": Score(*of)} for language, of in values.items()}


def printed(table, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_csv_is_long_and_in_full(systems):
    lines = list(csv.DictReader(io.StringIO(scores_csv(systems))))
    assert list(lines[0]) == ["system", "language", "metric", "value", "low", "high"]
    assert len(lines) == 2 * 11 * len(METRICS)
    for line in lines:
        score = systems[line["system"]][line["language"]][line["metric"]]
        assert [float(line[name]) for name in ("value", "low", "high")] == [score.value, score.low, score.high]


def test_csv_keeps_awkward_names():
    text = scores_csv({'a, "b"\nc': scores_of(en=(1, 0, 2))})
    assert next(csv.DictReader(io.StringIO(text)))["system"] == 'a, "b"\nc'


def test_one_system_is_a_row_per_language_and_a_column_per_metric(systems):
    scores = systems["aya_craft"]
    lines = printed(scores_table({"aya_craft": scores}, language_names=LANGUAGE_NAMES)).splitlines()
    body = {line.split()[0]: line for line in lines}
    assert [name for name in body if name in {*LANGUAGE_NAMES.values(), ALL}] == [*LANGUAGE_NAMES.values(), ALL]
    for code, of in scores.items():
        line = body[LANGUAGE_NAMES.get(code, code)]
        shown = [float(text) for text in re.findall(r"(?<!±)(?<![\d.])\d+\.\d+", line)]
        assert shown == [float(number(METRICS[name], of[name].value)) for name in METRICS]
    assert f"±{(scores['en']['length_ratio'].high - scores['en']['length_ratio'].low) / 2:.2f}" in body["English"]
    assert f"±{(scores['en']['exact'].high - scores['en']['exact'].low) / 2:.0f} " in body["English"]


def test_both_layouts_fit_ten_languages_into_eighty_columns(systems):
    for shown in (systems, {"aya_craft": systems["aya_craft"]}):
        text = printed(scores_table(shown, language_names=LANGUAGE_NAMES))
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for scores in shown.values():
            for of in scores.values():
                for name, score in of.items():
                    assert re.search(rf"(?<![\d.]){re.escape(number(METRICS[name], score.value))}(?![\d.])", text)


def test_several_systems_are_a_block_per_metric(systems):
    text = printed(scores_table(systems), width=200)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == [*LANGUAGE_NAMES, ALL]
    titles = [
        line.strip()
        for line in text.splitlines()
        if line.strip() in {f"{m.title} {m.unit}".strip() for m in METRICS.values()}
    ]
    assert titles == [f"{metric.title} {metric.unit}".strip() for metric in METRICS.values()]
    aya = [line for line in lines if line[:1] == ["aya_craft"]]
    assert len(aya) == len(METRICS)
    assert aya[1][1:] == [number(METRICS["chrf"], of["chrf"].value) for of in systems["aya_craft"].values()]


@pytest.mark.parametrize("width", [80, 56, 48, 30])
def test_a_narrow_terminal_folds_numbers_and_loses_none(width):
    scores = scores_of(**dict.fromkeys(LANGUAGE_NAMES, (12.3, 12.3, 12.3)))
    text = printed(scores_table({"one": scores, "two": scores}), width=width)
    assert "…" not in text
    assert [text.count(digit) for digit in "123"] == [20, 20, 20]


def test_names_are_no_markup():
    scores = scores_of(en=(1, 0, 2))
    text = printed(scores_table({"[bold]x": scores, "[/]": scores}))
    assert "[bold]x" in text
    assert "[/]" in text


def test_what_a_system_lacks_is_a_dash():
    systems = {"one": scores_of(en=(1, 0, 2), all=(1, 0, 2)), "two": scores_of(fr=(3, 2, 4), all=(3, 2, 4))}
    lines = [line.split() for line in printed(scores_table(systems), width=100).splitlines()]
    assert lines[0] == ["en", "fr", "all"]
    assert ["one", "1.0", "–", "1.0"] in lines
    assert ["two", "–", "3.0", "3.0"] in lines
    assert r"{two} & -- & $3.0_{\,2.0}^{\,4.0}$ & $\mathbf{3.0}_{\,2.0}^{\,4.0}$ \\" in scores_latex(systems)


def test_the_best_of_a_column_is_marked():
    systems = {
        "one": {"en": {"chrf": Score(31.24, 0, 0), "wrong_script": Score(5, 0, 0), "length_ratio": Score(1, 0, 0)}},
        "two": {"en": {"chrf": Score(31.16, 0, 0), "wrong_script": Score(2, 0, 0), "length_ratio": Score(2, 0, 0)}},
        "six": {"en": {"chrf": Score(10.0, 0, 0), "wrong_script": Score(9, 0, 0)}},
    }
    assert best_systems(systems, "en", "chrf") == {"one", "two"}  # as printed they are equal
    assert best_systems(systems, "en", "wrong_script") == {"two"}
    assert best_systems(systems, "en", "length_ratio") == set()
    assert best_systems({"one": systems["one"]}, "en", "chrf") == set()
    assert best_systems({"one": systems["one"], "same": systems["one"]}, "en", "chrf") == set()


def test_the_terminal_shows_the_best_bold_but_no_difference():
    systems = {"one": scores_of(en=(31, 31, 31)), "two": scores_of(en=(32, 32, 32))}
    for signed, bold in ((False, ["32.0"]), (True, [])):
        console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
        console.print(scores_table(systems, signed=signed))
        assert re.findall(r"\x1b\[1m\s*[+]?(3[12]\.0)", console.file.getvalue()) == bold


def test_an_interval_without_width_as_printed_is_left_out():
    systems = {"one": scores_of(en=(31.2, 31.2, 31.2), fr=(31.2, 31.18, 31.22), si=(31.2, 31.1, 31.3))}
    assert r"{one} & $31.2$ & $31.2$ & $31.2_{\,31.1}^{\,31.3}$ \\" in scores_latex(systems)
    assert printed(scores_table(systems)).count("±0.1") == 1


def test_differences_carry_their_sign():
    systems = {"gain": scores_of(en=(1.24, -0.5, 2), fr=(-3, -4, -2), all=(-0.04, -0.04, -0.04))}
    assert r"{gain} & $+1.2_{\,-0.5}^{\,+2.0}$ & $-3.0_{\,-4.0}^{\,-2.0}$ & $+0.0$ \\" in scores_latex(
        systems, signed=True
    )
    lines = [line.split() for line in printed(scores_table(systems, signed=True)).splitlines()]
    assert ["en", "+1.2", "±1.2"] in lines
    assert ["fr", "-3.0", "±1.0"] in lines
    assert ["all", "+0.0"] in lines
    two = scores_latex({**systems, "loss": scores_of(en=(-1, -2, 0))}, signed=True)
    assert "mathbf" not in two


def balanced(text):
    """Whether braces and environments of a LaTeX text close in order, escapes set aside."""
    text = re.sub(r"\\[\\{}&%$#_]", "", re.sub(r"(?<!\\)%.*", "", text))
    depth, opened = 0, []
    for token in re.findall(r"\\begin\{[a-z*]+\}|\\end\{[a-z*]+\}|[{}]", text):
        if token.startswith(r"\begin"):
            opened.append((token[7:-1], depth))
        elif token.startswith(r"\end"):
            if not opened or opened.pop() != (token[5:-1], depth):
                return False
        else:
            depth += 1 if token == "{" else -1
            if depth < 0:
                return False
    return depth == 0 and not opened


def test_the_check_of_balance_can_fail():
    assert balanced(r"\begin{a}{x\}}\end{a}")
    assert not any(map(balanced, [r"\begin{a}{x}", r"{\begin{a}}\end{a}", "{", "}", r"\begin{a}\end{b}"]))


def test_latex_is_a_balanced_table_with_a_cell_for_every_language(systems):
    text = scores_latex({**systems, AWKWARD: systems["aya_craft"]})
    assert balanced(text)
    assert text.isascii()
    rows = [line for line in text.splitlines() if line.startswith("{")]
    assert len(rows) == 3 * len(METRICS)
    for line in rows:
        assert len(re.findall(r"(?<!\\)&", line)) == 11
        assert line.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)\$", line)) % 2 == 0
    score = systems["aya_craft"]["en"]["chrf"]
    assert rf"_{{\,{score.low:.1f}}}^{{\,{score.high:.1f}}}$" in text
    for rule in ("toprule", "midrule", "bottomrule", r"multicolumn{12}", r"usepackage{booktabs,graphicx}"):
        assert rule in text


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.text(st.sampled_from('ab \\{}&%$#_~^<>|"[]*\n\t')))
def test_escaped_names_are_balanced_and_leave_the_table_alone(name):
    text = latex_text(name)
    assert balanced(text)
    assert "\n" not in text
    assert not re.search(r"(?<!\\)[&%#_]", text)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles(systems, tmp_path):
    (tmp_path / "scores.tex").write_text(scores_latex({**systems, AWKWARD: systems["aya_craft"]}), encoding="utf-8")
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{scores.tex}\end{document}"
    (tmp_path / "paper.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
    assert "Overfull" not in found.stdout
