import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.data.prompts import build_prompt, clean_line, clean_text, cut_at_word, visible_line
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig


def test_the_instruction_names_the_language() -> None:
    prompt = build_prompt(MUNIChusLoadConfig(), language="yue", title="T", content="News.")
    assert prompt.instruction == "Write a caption for this image in Cantonese."
    assert prompt.news == "News."


@pytest.mark.parametrize(("context", "news"), [("content", "the news"), ("title", "the title"), ("none", "")])
def test_the_context_column_is_quoted(context: str, news: str) -> None:
    config = MUNIChusLoadConfig(context=context)  # type: ignore[arg-type]
    assert build_prompt(config, language="en", title="the title", content="the news").news == news


@pytest.mark.parametrize("text", ["{language}", "{}", "{0}", "{news.__class__}", "a } b { c", "{{x}}", "%s %(a)s $x"])
def test_braces_in_the_news_text_stay_as_they_are(text: str) -> None:
    assert build_prompt(MUNIChusLoadConfig(), language="en", title="", content=text).news == text


@pytest.mark.parametrize("instruction", ["Caption {title} in {language}", "In {lang}:", "{Language}"])
def test_an_unknown_placeholder_in_the_instruction_is_an_error(instruction: str) -> None:
    with pytest.raises(UserError, match=r"unknown placeholder \{\w+\}"):
        build_prompt(MUNIChusLoadConfig(instruction=instruction), language="en", title="", content="")


def test_a_language_without_a_name_is_an_error_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"--set data\.language_names\.de=NAME"):
        build_prompt(MUNIChusLoadConfig(), language="de", title="", content="")


def test_control_characters_go_and_line_breaks_stay() -> None:
    assert clean_text("a\x00b\x1b[31m\x7f\r\nc\td\x0be\x9f\ud800") == "ab[31m\nc d e"
    assert clean_text("one\n\n\n\n two \u2028 three\n") == "one\n\ntwo three"
    assert clean_line("  a\n b\r\n\tc ") == "a b c"


def test_joiners_and_direction_marks_of_the_scripts_stay() -> None:
    text = "ශ්\u200dරී ලංකා \u200fاردو\u200e می\u200cخواهم 👩\u200d🚀"
    assert clean_text(text) == text


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \u202e", "\u00ad\u2060", "\u2028\u3000", "\x00\ud800", ""])
def test_a_line_without_a_visible_character_is_empty(text: str) -> None:
    assert visible_line(text) == ""
    assert visible_line(f" {text}කි\u200d ") == clean_line(f"{text}කි\u200d")


def test_text_is_cut_at_a_word() -> None:
    assert cut_at_word("one two three", 9) == "one two"
    assert cut_at_word("one two three", 7) == "one two"
    assert cut_at_word("one two three", 13) == "one two three"


def test_text_without_spaces_is_cut_at_the_limit() -> None:
    assert cut_at_word("一二三四五六七八九十", 4) == "一二三四"
    assert cut_at_word("短 " + "長" * 50, 20) == "短 " + "長" * 18


def test_a_combined_character_is_never_cut_in_two() -> None:
    assert cut_at_word("කි" * 10, 3) == "කි"  # letter and vowel sign
    assert cut_at_word("👩\u200d🚀" * 5, 5) == "👩\u200d🚀"


@given(st.text(max_size=80), st.integers(min_value=0, max_value=40))
def test_a_cut_is_a_prefix_within_the_limit(text: str, limit: int) -> None:
    cut = cut_at_word(text, limit)
    assert len(cut) <= limit
    assert text.startswith(cut)


@given(st.text(max_size=200))
def test_cleaning_is_idempotent_and_can_be_encoded(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    assert once.encode("utf-8").decode("utf-8") == once
