"""Chat templates: released renderings, frames, differences and neutralised control tokens."""

import re
from copy import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.models.templates import (
    GENERATION,
    PLAIN_TEMPLATE,
    Frame,
    control_pattern,
    conversation,
    find_frame,
    first_difference,
    neutralise,
    render,
)
from params import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
)
# Llama: what the released template writes. Aya: the form in which Cohere's scripts for the model write a conversation.
RELEASED = {
    ("llama32", True): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Do it.\n\nnews<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "An answer<|eot_id|>",
    ),
    ("llama32", False): (
        f"<|begin_of_text|>{SYSTEM}<|start_header_id|>user<|end_header_id|>\n\nDo it.\n\nnews<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "An answer<|eot_id|>",
    ),
    ("aya", True): (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>Do it.\n\nnews<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|START_RESPONSE|>An answer<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    ("aya", False): (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Do it.\n\nnews<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|START_RESPONSE|>An answer<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
}


@pytest.mark.parametrize("image", [True, False])
def test_templates_render_as_the_models_were_trained(vlm, image):
    prompt, answer = RELEASED[vlm.spec.name, image]
    messages = conversation("Do it.\n\nnews", "An answer", image=object() if image else None, parts=True)
    template = vlm.spec.chat_template
    assert render(vlm.processor, template, messages, generation_prompt=False) == prompt + answer
    assert render(vlm.processor, template, messages[:1], generation_prompt=True) == prompt


def test_templates_mark_the_answer(vlm):
    assert GENERATION.search(vlm.spec.chat_template)


def test_llama_writes_the_present_day_where_no_date_is_given(llama32):
    messages = conversation("Do it.", None, parts=True)
    text = llama32.processor.apply_chat_template(messages, chat_template=llama32.spec.chat_template)
    assert re.search(r"Today Date: \d\d \w{3} \d{4}\n", text)


def test_llama_keeps_a_system_turn_of_text_only_conversations(llama32):
    messages = [{"role": "system", "content": "Be brief."}, *conversation("Do it.", None, parts=True)]
    text = render(llama32.processor, llama32.spec.chat_template, messages, generation_prompt=False)
    assert text.count("system<|end_header_id|>") == 1
    assert "26 Jul 2024\n\nBe brief.<|eot_id|>" in text


def test_a_template_does_not_differ_from_itself(vlm):
    unmarked = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", vlm.spec.chat_template)
    assert first_difference(vlm.processor, vlm.spec.chat_template, unmarked) is None


def test_the_first_difference_is_named(aya):
    other = aya.spec.chat_template.replace("<|END_RESPONSE|>", "<|end|>")
    difference = first_difference(aya.processor, aya.spec.chat_template, other)
    assert difference.startswith("character 160 of an image row: 'END_RESPONSE|>")
    assert difference.endswith("'end|><|END_OF_TURN_TOKEN|>' found")


def test_frame_leaves_the_line_break_after_the_end_of_turn_unsupervised(text):
    control = re.compile(r"<\|im_(?:start|end)\|>")
    frame = find_frame(text.processor, CHATML, control, parts=False)
    assert frame == Frame(lead="", end="<|im_end|>", trailing="\n")


def test_frame_of_a_template_whose_generation_prompt_stops_early_includes_the_lead(aya):
    control = control_pattern(aya.processor, aya.spec.chat_template)
    frame = find_frame(aya.processor, aya.spec.chat_template, control, parts=True)
    assert frame == Frame(lead="<|START_RESPONSE|>", end="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", trailing="")


def test_plain_template_ends_in_the_end_token(text):
    control = control_pattern(text.processor, PLAIN_TEMPLATE)
    frame = find_frame(text.processor, PLAIN_TEMPLATE, control, parts=False)
    assert frame == Frame(lead="", end=text.tokenizer.eos_token, trailing="")


def test_a_template_without_an_end_of_turn_is_refused(text):
    template = PLAIN_TEMPLATE.replace("+ eos_token", "+ '\n'")
    with pytest.raises(UserError, match="no end-of-turn token"):
        find_frame(text.processor, template, re.compile("<x>"), parts=False)


def test_a_template_that_does_not_go_on_from_its_generation_prompt_is_refused(text):
    template = CHATML.replace("<|im_start|>assistant", "<|im_start|>helper")
    with pytest.raises(UserError, match="generation prompt"):
        find_frame(text.processor, template, re.compile("<x>"), parts=False)


def test_control_pattern_knows_placeholders_that_are_no_tokens(aya):
    processor = copy(aya.processor)
    processor.image_token = "<here an image>"
    assert control_pattern(processor, aya.spec.chat_template).fullmatch("<here an image>")


TOKENS = ("<a>", "<a><b>", "ab", "bc", "TILE", "TILE_GLOBAL", "#")
CONTROL = re.compile("|".join(map(re.escape, sorted(TOKENS, key=len, reverse=True))))


@given(st.lists(st.sampled_from([*TOKENS, "<", "a", ">", "b", "c", "_", " ", "අ"]), max_size=12).map("".join))
def test_no_control_token_survives(text):
    plain = neutralise(text, CONTROL)
    assert not CONTROL.search(plain)
    assert plain.replace("\u2060", "") == text.replace("#", "")


def test_other_text_stays_as_it_is():
    assert neutralise("no token {here} <c>", CONTROL) == "no token {here} <c>"


def test_a_template_that_is_no_jinja_is_an_error_that_names_the_file(text) -> None:
    with pytest.raises(UserError, match=r"does not render .*chat_template\.jinja"):
        render(text.processor, "{% if %}", conversation("a", "b", image=None, parts=False), generation_prompt=False)
