"""inft.evaluation.metrics.scores: equal to the libraries called by hand, and what must hold of any captions."""

import json
import sys
from pathlib import Path
from random import Random

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from inft.data.sample import scenes
from inft.data.scene_captions import GRAMMARS, caption
from inft.evaluation.metrics import ALL, METRICS
from inft.evaluation.metrics.scores import caption_figures, check_scoring, score_captions, score_differences
from params.errors import UserError

EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji10" / "validation.jsonl"
FAST = settings(deadline=None, max_examples=25, derandomize=True)
SHOWN = [scene.attributes for scene in scenes("test", rounds=1)]


def by_hand(rows, words):
    """Every metric from direct calls of the libraries."""
    cut = [words(language, text) for language, text in zip(rows.languages, rows.captions, strict=True)]
    expected = [
        [words(language, text) for text in of_row]
        for language, of_row in zip(rows.languages, rows.references, strict=True)
    ]
    bleu = sacrebleu.corpus_bleu(cut, padded(expected), force=True)
    gts, res = dict(enumerate(expected)), {index: [text] for index, text in enumerate(cut)}
    exact = [
        text.strip() in [one.strip() for one in of] for text, of in zip(rows.captions, rows.references, strict=True)
    ]
    return {
        "bleu4": bleu.score,
        "chrf": sacrebleu.corpus_chrf(rows.captions, padded(rows.references)).score,
        "cider": 100 * Cider().compute_score(gts, res)[0],
        "exact": 100 * sum(exact) / len(exact),
        "length_ratio": bleu.sys_len / bleu.ref_len,
    }


def padded(references):
    most = max(map(len, references))
    return [list(stream) for stream in zip(*[[*of, *[None] * (most - len(of))] for of in references], strict=True)]


def values(scores):
    return {language: {name: score.value for name, score in of.items()} for language, of in scores.items()}


def test_scores_are_those_of_the_libraries_in_ten_languages_and_overall(rows, words_by_hand):
    found = values(score_captions(*rows.args(), resamples=0))
    assert list(found) == [*GRAMMARS, ALL]
    assert {len(of) for of in rows.references} == {1, 2}
    assert "" in rows.captions
    for language in found:
        of = rows if language == ALL else rows.of(language)
        expected = by_hand(of, words_by_hand)
        assert list(found[language]) == list(METRICS)
        assert {name: found[language][name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert expected["cider"] > 0


@pytest.mark.skipif(not EMOJI.exists(), reason="the emoji captions are not here")
def test_scores_of_real_captions_are_those_of_the_libraries(rows, words_by_hand):
    lines = [json.loads(line) for line in EMOJI.read_text(encoding="utf-8").splitlines()]
    rng = Random(0)
    shuffled = {line["language"]: [] for line in lines}
    for line in lines:
        shuffled[line["language"]].append(line["caption"])
    real = type(rows)(
        captions=[rng.choice([line["caption"], rng.choice(shuffled[line["language"]]), ""]) for line in lines],
        references=[[line["caption"], line["content"]] if rng.random() < 0.5 else [line["caption"]] for line in lines],
        languages=[line["language"] for line in lines],
    )
    found = values(score_captions(*real.args(), resamples=0))
    assert len(found) == 11
    for language, of in found.items():
        expected = by_hand(real if language == ALL else real.of(language), words_by_hand)
        assert {name: of[name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_share_in_the_wrong_script_is_counted(rows):
    found = values(score_captions(*rows.args(), resamples=0))
    latin = ("en", "fr", "id")
    for language in GRAMMARS:
        of = rows.of(language).captions
        wrong = [text == "" or (text == "A wrong language." and language not in latin) for text in of]
        assert found[language]["wrong_script"] == pytest.approx(100 * sum(wrong) / len(wrong))
    assert found[ALL]["wrong_script"] == pytest.approx(sum(found[code]["wrong_script"] for code in GRAMMARS) / 10)


def test_chrf_of_segmented_texts_is_that_of_the_texts(rows, words_by_hand):
    for language in ("ja", "zh", "yue"):
        of = rows.of(language)
        cut = [words_by_hand(language, text) for text in of.captions]
        expected = [[words_by_hand(language, text) for text in texts] for texts in of.references]
        plain = sacrebleu.corpus_chrf(of.captions, padded(of.references)).score
        assert sacrebleu.corpus_chrf(cut, padded(expected)).score == plain


def test_words_count_only_where_they_are_cut():
    captions, references = ["左边有一颗红色的大星星。"], [["左边有一颗蓝色的大星星。"]]
    found = score_captions(captions, references, ["zh"])[ALL]
    assert found["bleu4"].value > 30
    assert found["length_ratio"].value == 1


@pytest.mark.parametrize("language", GRAMMARS)
def test_references_themselves_score_full(language):
    texts = [" ".join(caption(attributes, language) for attributes in (one, SHOWN[0])) for one in SHOWN]
    found = caption_figures(texts, [[text] for text in texts], [language] * len(texts))
    assert found["cider"] == pytest.approx(1000, rel=0.03)  # below in words that every reference has
    del found["cider"]
    full = {"bleu4": 100, "chrf": 100, "exact": 100, "length_ratio": 1, "wrong_script": 0}
    assert found == pytest.approx(full, rel=1e-12)


def test_an_empty_caption_is_wrong_and_counts(rows):
    right = [of[0] for of in rows.references]
    kept = caption_figures(right, rows.references, rows.languages)
    half = [text if index % 2 else "" for index, text in enumerate(right)]
    found = caption_figures(half, rows.references, rows.languages)
    assert found["exact"] == found["wrong_script"] == 50
    assert found["bleu4"] < kept["bleu4"]
    assert found["cider"] < kept["cider"]
    empty = score_captions([""] * len(right), rows.references, rows.languages, resamples=10)[ALL]
    assert {name: score.value for name, score in empty.items()} == {**dict.fromkeys(METRICS, 0.0), "wrong_script": 100}


def test_another_reference_can_be_met_exactly():
    found = caption_figures([" a fish ", "a tree"], [["a star", "a fish"], ["a star", "a fish"]], ["en", "en"])
    assert found["exact"] == 50


def test_languages_keep_the_order_of_their_rows():
    found = score_captions(["a", "b", "c", "d"], [["a"]] * 4, ["fr", "en", "id", "en"], resamples=5)
    assert list(found) == ["fr", "en", "id", ALL]


def test_the_figures_alone_are_the_overall_values(rows):
    found = values(score_captions(*rows.args(), resamples=0))
    assert caption_figures(*rows.args()) == found[ALL]


def test_without_resamples_there_is_no_interval(rows):
    for of in score_captions(*rows.args(), resamples=0).values():
        assert all(score.low == score.value == score.high for score in of.values())


def test_a_language_scores_the_same_beside_others(rows):
    both = score_captions(*rows.args(), resamples=50)
    alone = score_captions(*rows.of("ja").args(), resamples=50)
    assert both["ja"] == alone["ja"] == alone[ALL]


@FAST
@given(st.permutations(range(30)))
def test_the_order_of_rows_changes_no_value(rows, order):
    few = rows.picked(list(range(30)))
    before, after = (
        values(score_captions(*few.args(), resamples=0)),
        values(score_captions(*few.picked(order).args(), resamples=0)),
    )
    assert list(before)[-1] == list(after)[-1] == ALL
    for language in before:
        assert after[language] == pytest.approx(before[language], rel=1e-12, abs=1e-12)


@FAST
@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=6))
def test_any_captions_score_within_bounds(pairs):
    captions, references = [text for text, _ in pairs], [["a", text] for _, text in pairs]
    found = score_captions(captions, references, ["en"] * len(pairs), resamples=20)
    for name, score in found["en"].items():
        assert 0 <= score.low <= score.high
        assert 0 <= score.value <= (1000 if name == "cider" else 1e9 if name == "length_ratio" else 100 + 1e-9)


def test_a_difference_is_after_minus_before(rows, other_rows):
    before, after = (values(score_captions(*of.args(), resamples=0)) for of in (rows, other_rows))
    found = score_differences(rows.captions, other_rows.captions, rows.references, rows.languages, resamples=100)
    assert list(found) == list(before)
    for language, of in found.items():
        assert {name: score.value for name, score in of.items()} == {
            name: after[language][name] - value for name, value in before[language].items()
        }
    assert 0 < found[ALL]["exact"].low <= found[ALL]["exact"].value <= found[ALL]["exact"].high


def test_equal_systems_differ_by_exactly_nothing(rows):
    found = score_differences(rows.captions, rows.captions, rows.references, rows.languages, resamples=200)
    assert {(score.value, score.low, score.high) for of in found.values() for score in of.values()} == {(0, 0, 0)}


def test_pairing_narrows_the_interval(rows, other_rows):
    paired = score_differences(rows.captions, other_rows.captions, rows.references, rows.languages)[ALL]
    alone = [score_captions(*of.args())[ALL] for of in (rows, other_rows)]
    for name in ("chrf", "cider", "exact"):
        width = sum((of[name].high - of[name].low) ** 2 for of in alone) ** 0.5  # of independent systems
        assert paired[name].high - paired[name].low < 0.95 * width


@pytest.mark.parametrize(
    ("captions", "references", "languages", "message"),
    [
        (["a"], [["a"], ["b"]], ["en", "en"], "1 captions, references of 2 rows and 2 languages"),
        (["a", "b"], [["a"], ["b"]], ["en"], "1 languages"),
        ([], [], [], "no rows"),
        (["a", "b"], [["a"], []], ["en", "en"], "row 1 has no reference"),
        (["a", "b"], [["a"], [" ", ""]], ["en", "en"], "row 1 has no reference"),
        (["a"], ["a star"], ["en"], "references of row 0 are one string"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(captions, references, languages, message):
    for score in (score_captions, caption_figures, lambda *args: score_differences(captions, *args)):
        with pytest.raises(ValueError, match=message):
            score(captions, references, languages)


def test_a_blank_reference_is_none():
    one, two = (
        caption_figures(["", "a fish"], [["a star", *more], ["a fish"]], ["en"] * 2) for more in ([], ["", " "])
    )
    assert one == two
    assert one["exact"] == 50


def test_what_cannot_be_scored_is_said_before_a_caption_is_generated(monkeypatch):
    check_scoring([["a star"], ["星"], ["赤い星"]], ["en", "zh", "ja"])
    with pytest.raises(UserError, match=r"data\.cjk_tokens names 'ko'"):
        check_scoring([["a star"]], ["en"], cjk_tokens=("ko",))
    with pytest.raises(UserError, match="one word"):
        check_scoring([["左边有星"]], ["zh"], cjk_tokens=())
    with pytest.raises(UserError, match="one word"):
        score_captions(["左边有星"], [["左边有星"]], ["zh"], cjk_tokens=())
    with pytest.raises(UserError, match="'all', which stands for all rows"):
        check_scoring([["a star"]], [ALL])
    for module in ("sacrebleu.metrics", "pycocoevalcap.cider.cider"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=r"pip install 'inft\[eval\]'"):
                check_scoring([["a star"]], ["en"])


def test_many_captions_that_end_in_a_full_stop_are_no_warning(caplog, capfd):
    score_captions(["a star ."] * 120, [["a star ."]] * 120, ["en"] * 120, resamples=0)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")
