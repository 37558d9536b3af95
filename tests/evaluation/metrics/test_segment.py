"""inft.evaluation.metrics.segment: words of languages that write no spaces, and what is refused."""

import logging
import subprocess
import sys
import tempfile
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.data.scene_captions import GRAMMARS
from inft.evaluation.metrics import segment
from inft.evaluation.metrics.libraries import load_library
from inft.evaluation.metrics.segment import check_segmenters, check_spaces, segmenter
from params.errors import UserError

DEFAULT = ("ja", "zh", "yue")
FAST = settings(deadline=None, max_examples=80, derandomize=True)
TEXTS = st.text(st.one_of(st.sampled_from(" 　\t\n。、!a1"), st.characters(exclude_categories=["Cs", "Cc"])))
CJK_TEXTS = st.text(st.sampled_from("左边有一颗红色的大星星嘅細魚喺左に赤い星があります。カードー々 \n　Ab1"))


@pytest.fixture
def fresh():
    """Segmenters that are loaded anew, and again after the test."""
    segment._jieba.cache_clear()
    segment._mecab.cache_clear()
    yield
    segment._jieba.cache_clear()
    segment._mecab.cache_clear()


def test_words_are_those_of_the_libraries(rows, words_by_hand):
    for language, of_row in zip(rows.languages, rows.references, strict=True):
        assert segmenter(language, DEFAULT)(of_row[0]).split() == words_by_hand(language, of_row[0]).split()


def test_words_are_found_and_stand_one_space_apart():
    assert segmenter("zh", DEFAULT)("左边有 一颗大星星。\n") == "左边 有 一颗 大 星星 。"
    assert segmenter("ja", DEFAULT)("左に赤い 星があります。\n") == "左 に 赤い 星 が あり ます 。"


@pytest.mark.parametrize("language", [code for code in GRAMMARS if code not in DEFAULT])
def test_other_languages_are_left_as_they_are(language):
    assert segmenter(language, DEFAULT)(" 左边  有 ") == " 左边  有 "


def test_a_language_outside_of_cjk_tokens_is_left_as_it_is():
    assert segmenter("zh", ("ja",))("左边有") == "左边有"


@pytest.mark.parametrize("code", ["zh-TW", "zh_Hant", "zho", "cmn", "wuu", "lzh", "yue-HK", "ZH"])
def test_varieties_of_chinese_are_cut_like_chinese(code):
    assert segmenter(code, (code,))("左边有一颗红色的大星星") == segmenter("zh", DEFAULT)("左边有一颗红色的大星星")


@FAST
@given(st.sampled_from(["zh", "ja"]), st.one_of(TEXTS, CJK_TEXTS))
def test_segmentation_moves_nothing_but_spaces(language, text):
    assert "".join(segmenter(language, DEFAULT)(text).split()) == "".join(text.split())


def test_a_japanese_text_goes_on_after_nul():
    assert segmenter("ja", DEFAULT)("赤い\0星\ud800") == "赤い 星 ?"


def test_loading_writes_no_file_and_says_nothing(fresh, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG, "jieba")
    for language in DEFAULT:
        segmenter(language, DEFAULT)("赤い星")
    assert list(tmp_path.iterdir()) == []
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_another_dictionary_of_mecab_changes_nothing(fresh, monkeypatch):
    unidic = ModuleType("unidic")
    unidic.DICDIR = "/nowhere"
    monkeypatch.setitem(sys.modules, "unidic", unidic)
    assert segmenter("ja", DEFAULT)("赤い星") == "赤い 星"


@pytest.mark.parametrize("code", ["ko", "th", "jav", "zza", ""])
def test_a_code_that_no_segmenter_knows_is_an_error(code):
    with pytest.raises(UserError, match=rf"data.cjk_tokens names '{code}'.* ja, .*--set data.cjk_tokens=ja,zh,yue"):
        check_segmenters((*DEFAULT, code))
    with pytest.raises(UserError):
        segmenter("en", (*DEFAULT, code))


@pytest.mark.parametrize(("library", "language"), [("jieba", "zh"), ("MeCab", "ja"), ("unidic_lite", "ja")])
def test_a_missing_library_is_named_with_the_remedy(fresh, monkeypatch, library, language):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}.*pip install 'inft\[eval\]'"):
        segmenter(language, DEFAULT)


def test_a_library_that_warns_when_it_is_imported_is_not_heard(tmp_path, monkeypatch, recwarn):
    (tmp_path / "grumbling.py").write_text("import warnings\nwarnings.warn('old', UserWarning)\nWORDS = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_library("grumbling").WORDS == 3
    assert not recwarn


@pytest.mark.parametrize(
    ("code", "text", "remedy"),
    [
        ("zh", "左边有一颗红色的大星星。", "--set data.cjk_tokens=ja,yue,zh"),
        ("zh-TW", "左邊有一顆紅色的大星星。", "--set data.cjk_tokens=ja,yue,zh-TW"),
        ("ryu", "ゆたさるぐとぅ うにげーさびら", "No segmenter knows 'ryu'"),
        ("th", "ดาวสีแดงดวงใหญ่อยู่ทางซ้าย", "No segmenter knows 'th'"),
        ("lo", "ດາວສີແດງ", "No segmenter knows 'lo'"),
        ("km", "ផ្កាយក្រហម", "No segmenter knows 'km'"),
        ("my", "ကြယ်နီ", "No segmenter knows 'my'"),
    ],
)
def test_references_without_spaces_between_words_are_refused(code, text, remedy):
    with pytest.raises(UserError, match="one word") as error:
        check_spaces([["a red star"], [text]], ["en", code], ("ja", "yue"))
    assert f"the references in {code!r}" in str(error.value)
    assert remedy in str(error.value)


def test_the_remedy_names_every_language_that_needs_it():
    with pytest.raises(UserError, match=r"--set data\.cjk_tokens=ja,zh-TW,yue$"):
        check_spaces([["左邊"], ["魚"]], ["zh-TW", "yue"], ("ja",))


def test_a_few_han_characters_and_other_spaced_scripts_are_let_pass():
    check_spaces([["The sign 出口 says exit."], ["왼쪽에 빨간 별"], ["123"]], ["en", "ko", "en"], DEFAULT)
    check_spaces([["左边有"], ["赤い星"]], ["zh", "ja"], DEFAULT)


def test_the_package_is_light_to_import():
    code = (
        "import sys, inft.evaluation.metrics, inft.evaluation.metrics.segment, inft.evaluation.metrics.tables\n"
        "print({'numpy', 'sacrebleu', 'pycocoevalcap', 'jieba', 'MeCab', 'rich', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
