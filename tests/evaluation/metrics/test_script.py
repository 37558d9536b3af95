"""inft.evaluation.metrics.script: which script a text is in, and which one it should be in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.data.sample import scenes
from inft.data.scene_captions import GRAMMARS, caption
from inft.evaluation.metrics.script import (
    SCRIPTS,
    base_code,
    expected_scripts,
    in_wrong_script,
    script_counts,
    script_of,
)

FAST = settings(deadline=None, max_examples=60, derandomize=True)
SHOWN = [scene.attributes for scene in scenes("test", rounds=1)]


@pytest.mark.parametrize(
    ("character", "script"),
    [
        ("a", "LATIN"),
        ("é", "LATIN"),
        ("Ａ", "LATIN"),  # fullwidth
        ("𝐀", "LATIN"),  # mathematical bold
        ("ª", "LATIN"),
        ("ﬁ", "LATIN"),
        ("م", "ARABIC"),
        ("ﻡ", "ARABIC"),  # presentation form
        ("ٹ", "ARABIC"),
        ("क", "DEVANAGARI"),
        ("ක", "SINHALA"),
        ("星", "CJK"),
        ("々", "CJK"),
        ("\U00020000", "CJK"),
        ("あ", "HIRAGANA"),
        ("ア", "KATAKANA"),
        ("ｱ", "KATAKANA"),  # halfwidth
        ("ー", "KATAKANA"),
        ("ｰ", "KATAKANA"),
        ("한", "HANGUL"),
        ("ж", "CYRILLIC"),
    ],
)
def test_a_letter_has_the_script_of_its_name(character, script):
    assert script_of(character) == script


@pytest.mark.parametrize("character", [*"1٣ .,।。!　☃🐟\u064e\u0903ʼ\0①㈱ﾞ", "\ud800", "\ue000"])
def test_marks_digits_and_signs_have_no_script(character):
    assert script_of(character) is None


def test_letters_are_counted_by_script():
    assert script_counts("赤いスター star 12!") == {"CJK": 1, "HIRAGANA": 1, "KATAKANA": 3, "LATIN": 4}


@pytest.mark.parametrize("language", GRAMMARS)
@pytest.mark.parametrize("written", GRAMMARS)
def test_a_caption_is_right_in_the_scripts_of_its_language_only(language, written):
    captions = [caption(attributes, written) for attributes in SHOWN]
    references = [caption(attributes, language) for attributes in SHOWN]
    expected = expected_scripts(language, references)
    wrong = {in_wrong_script(text, [own], expected) for text, own in zip(captions, references, strict=True)}
    # Chinese in a Japanese row is in one of Japanese's scripts; Japanese with few Han characters is no Chinese.
    assert wrong == {not (SCRIPTS[written] & SCRIPTS[language])} or (written == "ja" and language in ("zh", "yue"))


def test_half_of_the_letters_are_enough():
    assert not in_wrong_script("ab مم", ["x"], SCRIPTS["en"])
    assert in_wrong_script("ab ممم", ["x"], SCRIPTS["en"])


def test_a_caption_without_letters_is_wrong_unless_its_references_have_none():
    assert in_wrong_script("", ["a star"], SCRIPTS["en"])
    assert in_wrong_script(" 12 !", ["12", "a star"], SCRIPTS["en"])
    assert not in_wrong_script("", ["12"], SCRIPTS["en"])
    assert not in_wrong_script("🐟", ["3 🐟"], SCRIPTS["en"])


@pytest.mark.parametrize(
    ("language", "references", "expected"),
    [
        ("ko", ["왼쪽에 빨간 별", "LG 로고 옆의 별"], {"HANGUL"}),
        ("ru", ["Красная звезда"], {"CYRILLIC"}),
        ("sr", ["Црвена звезда лево", "Crvena zvezda levo"], {"CYRILLIC", "LATIN"}),
        ("hi-Latn", ["laal taara"], {"LATIN"}),  # the code names the script
        ("hi-IN", ["laal taara"], {"DEVANAGARI"}),
        ("zh_TW", [], {"CJK"}),
        ("EN", [], {"LATIN"}),
        ("xx", ["12 !"], set()),
    ],
)
def test_scripts_of_other_languages_are_those_of_most_letters_of_the_references(language, references, expected):
    assert expected_scripts(language, references) == expected


def test_a_code_is_taken_without_its_region():
    assert [base_code(code) for code in ("zh", "zh-TW", "zh_Hant_HK", "YUE")] == ["zh", "zh", "zh", "yue"]


@FAST
@given(st.text(), st.text(st.sampled_from("0123456789 .!?،。\n🐟")))
def test_signs_and_digits_change_nothing(text, signs):
    assert script_counts(text + signs) == script_counts(signs + text) == script_counts(text)
