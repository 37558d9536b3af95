import base64
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.data.scene_captions import GRAMMARS, caption
from inft.data.scenes import COMBINATIONS
from inft.evaluation import fonts

installed = pytest.mark.skipif(not fonts.installed_fonts(), reason="weblate-fonts is not installed")
CAPTIONS = [(language, caption(COMBINATIONS[0], language)) for language in GRAMMARS]


@pytest.fixture
def without_fonts(monkeypatch):
    """A machine without weblate-fonts."""
    monkeypatch.setattr(fonts, "PACKAGE", "absent_fonts")
    fonts.installed_fonts.cache_clear()
    yield
    monkeypatch.undo()
    fonts.installed_fonts.cache_clear()


def opened(font):
    from fontTools.ttLib import TTFont

    return TTFont(io.BytesIO(base64.b64decode(font.woff)))


@installed
def test_ten_languages_have_all_their_characters():
    assert fonts.missing_characters("".join(text for _, text in CAPTIONS)) == ""
    assert fonts.missing_characters("a\U0001f9ffb\U0001f9ff\n\u200d ") == "\U0001f9ff"


@installed
def test_a_language_asks_its_own_countrys_font_first():
    asked = {language: fonts.families(language) for language in ("en", "ja", "zh", "yue", "zh-TW", "ko")}
    assert asked["en"][:2] == ["DejaVu Sans", "Kurinto Sans"]
    firsts = {language: names[1] for language, names in asked.items()}
    suffixes = {"en": "", "ja": " JP", "zh": " SC", "yue": " TC", "zh-TW": " TC", "ko": " KR"}
    assert firsts == {language: f"Kurinto Sans{suffix}" for language, suffix in suffixes.items()}
    assert {frozenset(names) for names in asked.values()} == {frozenset(asked["en"])}  # none loses a script


@installed
def test_matplotlib_finds_every_family_and_its_settings_stay():
    import matplotlib
    from matplotlib.font_manager import findfont

    before = list(matplotlib.rcParams["font.family"])
    with matplotlib.rc_context(fonts.rc_fonts("ja")):
        for family in matplotlib.rcParams["font.family"]:
            assert findfont(family, fallback_to_default=False)
    assert matplotlib.rcParams["font.family"] == before


@installed
def test_a_page_gets_the_characters_that_it_shows_and_what_shapes_them():
    page = fonts.page_fonts(CAPTIONS)
    assert page.families == ("Report Sans", "Report Sans SC", "Report Sans JP", "Report Sans TC")
    found = {font.family: opened(font) for font in page.fonts}
    for language, text in CAPTIONS:
        order = page.by_language.get(language, page.families)
        for character in text:
            assert any(ord(character) in found[family].getBestCmap() for family in order), (language, character)
    assert "GSUB" in found["Report Sans"]
    assert "GPOS" in found["Report Sans"]
    features = {record.FeatureTag for record in found["Report Sans"]["GSUB"].table.FeatureList.FeatureRecord}
    assert {"init", "medi", "fina"} <= features  # Arabic letters join
    assert sum(len(font.woff) for font in page.fonts) < 250_000


@installed
def test_a_cut_font_has_another_name_and_its_licence():
    (font,) = fonts.page_fonts([("en", "abc")]).fonts
    assert base64.b64decode(font.woff).startswith(b"wOFF")
    names = opened(font)["name"]
    assert "Kurinto" not in str(names.getDebugName(1))
    assert "SIL OPEN FONT LICENSE" in str(names.getDebugName(13))


@installed
def test_han_characters_are_those_of_the_languages_country():
    page = fonts.page_fonts([("ja", "直"), ("zh", "直"), ("yue", "直"), ("en", "直")])
    assert [order[0] for order in page.by_language.values()] == ["Report Sans JP", "Report Sans TC", "Report Sans SC"]
    assert [ord("直") in opened(font).getBestCmap() for font in page.fonts] == [True] * 3


@installed
def test_a_language_code_that_is_no_code_gets_no_rule_of_its_own():
    assert fonts.page_fonts([("zh) {} body {display: none} (", "直")]).by_language == {}


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_what_is_missing_is_part_of_the_text_and_each_character_once(text):
    missing = fonts.missing_characters(text)
    assert len(set(missing)) == len(missing)
    assert set(missing) <= set(text)
    assert fonts.missing_characters(missing) == missing


def test_without_the_package_latin_is_drawn_and_other_scripts_are_told(without_fonts):
    assert fonts.families("ja") == ["DejaVu Sans"]
    assert fonts.missing_characters("aé 日") == "日"
    assert fonts.page_fonts(CAPTIONS) == fonts.PageFonts(fonts=(), families=(), by_language={})


def test_a_report_without_the_package_is_written_and_names_the_extra(without_fonts, tmp_path):
    from report_files import rows_of, write_evaluation

    from inft.evaluation.report import write_report

    evaluation = write_evaluation(tmp_path / "m", rows_of())
    written = write_report([evaluation], output=tmp_path / "report.html")
    assert "pip install 'inft[eval]'" in written.notes[0]
    assert "font-face" not in written.page.read_text(encoding="utf-8")
    assert any(path.name == "gallery.png" for path in written.pictures)


@installed
def test_a_vowel_sign_comes_with_the_halves_that_shaping_makes_of_it():
    [font] = fonts.page_fonts([("si", "තිබේ"), ("bn", "কো")]).fonts
    covered = set(opened(font).getBestCmap())
    assert {0x0DD9, 0x0DCA, 0x0DDA} <= covered  # Sinhala: before the letter, after it, whole
    assert {0x09C7, 0x09BE, 0x09CB} <= covered  # Bengali
