"""Chat templates: which one frames a conversation, where the answer stands in it, and what user text must not say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Processor = Any  # a ProcessorMixin, or the PreTrainedTokenizerBase of a text model: both render chat templates
Message = dict[str, Any]

GENERATION = re.compile(r"\{%-?\s*generation\b")  # a template with this block marks the answer itself
PROBE_PROMPT = "Zq1 instruction\n\nZq1 news"
PROBE_ANSWER = "Zq2 answer"
PROBE_ANSWERS = (PROBE_ANSWER, "a", "the", "A", "1")  # beginnings that tokenizers join with a space before them
WORD_JOINER = "\u2060"  # invisible, no line break; keeps a control token in user text from being read as one
# The templates of Llama 3 write today's date into text-only prompts. A run must not depend on the day it is resumed,
# so the date that those templates themselves fall back to is passed.
DATE_STRING = "26 Jul 2024"

# Frames a row that was rendered before: `{% generation %}` marks the answer for the mask of the processor's one call.
SPLICE_TEMPLATE = (
    "{{ messages[0].before }}{% generation %}{{ messages[0].answer }}{% endgeneration %}{{ messages[0].after }}"
)
# For tokenizers of base models, which have no template: the prompt, a line break, the answer and the end token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a template writes around an answer once the generation prompt stands."""

    lead: str  # between the generation prompt and the answer: "" or "<|START_RESPONSE|>"
    end: str  # end-of-turn token or tokens, directly after the answer
    trailing: str  # what follows them, such as a line break: not supervised


def tokenizer_of(processor: Processor) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def conversation(prompt: str, answer: str | None, *, image: Any = None, parts: bool) -> list[Message]:
    """Return the user's turn and the answer, if there is one; `parts`: content as typed parts, for processors."""
    if not parts:
        turns: list[Message] = [{"role": "user", "content": prompt}]
        return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]
    content: list[Message] = [] if image is None else [{"type": "image", "image": image}]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def render(processor: Processor, template: str, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    """Return the text of a conversation under a template; UserError for a template that refuses it or is no Jinja."""
    try:
        text: str = processor.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **template_variables(template),
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template of the tokenizer does not render ({error}). Mend chat_template.jinja beside it."
        ) from error
    return text


def template_variables(template: str) -> dict[str, str]:
    """Return the variables that a template reads beside the messages: the fixed date, where it takes one."""
    return {"date_string": DATE_STRING} if "date_string" in template else {}


def own_template(processor: Processor) -> str | None:
    """Return the default chat template that came with a processor or tokenizer."""
    template = processor.chat_template or tokenizer_of(processor).chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template


def first_difference(processor: Processor, ours: str, theirs: str) -> str | None:
    """Return where two templates render a probe conversation differently, in words; None when they agree."""
    for image in (object(), None):
        for answer in (PROBE_ANSWER, None):
            messages = conversation(PROBE_PROMPT, answer, image=image, parts=True)
            a, b = (render(processor, t, messages, generation_prompt=answer is None) for t in (ours, theirs))
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                kind = "an image row" if image else "a text-only row"
                return f"character {at} of {kind}: {a[at : at + 40]!r} expected, {b[at : at + 40]!r} found"
    return None


def control_pattern(processor: Processor, template: str) -> re.Pattern[str]:
    """Return a pattern of the tokens that only the template may write: special ones, those it names, placeholders."""
    tokenizer = tokenizer_of(processor)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(t) for t in added if t.special or (str(t) in template and not str(t).isspace())}
    tokens |= {token for token in [getattr(processor, "image_token", None)] if token}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def neutralise(text: str, control: re.Pattern[str]) -> str:
    """Return the text with each control token broken by an invisible character, so that it is read as plain text."""
    while control.search(text):
        text = control.sub(lambda m: m[0][0] + WORD_JOINER + m[0][1:] if len(m[0]) > 1 else "", text)
    return text


def find_frame(processor: Processor, template: str, control: re.Pattern[str], *, parts: bool) -> Frame:
    """Return the frame of a template, found with a probe; UserError when no end-of-turn token follows the answer."""
    messages = conversation(PROBE_PROMPT, PROBE_ANSWER, parts=parts)
    whole = render(processor, template, messages, generation_prompt=False)
    prompt = render(processor, template, messages[:1], generation_prompt=True)
    lead, found, after = whole.removeprefix(prompt).partition(PROBE_ANSWER)
    if not (whole.startswith(prompt) and found):
        raise UserError(
            "the chat template writes an answer differently from how it prompts for one, so the answer cannot be told "
            "apart. Give the tokenizer a template whose generation prompt is the start of the answer's turn."
        )
    end = re.match(f"(?:{control.pattern})+", after)
    if end is None:
        raise UserError(
            "the chat template writes no end-of-turn token after the answer, so the model would never learn to stop. "
            "Give the tokenizer a template that ends the assistant's turn with a special token."
        )
    return Frame(lead=lead, end=end[0], trailing=after[end.end() :])
