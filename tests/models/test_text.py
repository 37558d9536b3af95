"""Text models: tokenizers with templates of several forms, and without one."""

from copy import deepcopy

import pytest

from inft.models.collate import IGNORED
from inft.models.text import TextCollator
from params import UserError

CHATML = (
    "{% for m in messages %}{{ '<|eom_id|>' + m['role'] + '\n' + m['content'] + '<|eot_id|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|eom_id|>assistant\n' }}{% endif %}"
)
# The generation prompt ends before what the template writes in front of an answer.
THINKING = (
    "{% for m in messages %}{{ '<|eom_id|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|eom_id|>assistant\n' }}{% endif %}"
)
# The space before an answer stands in the generation prompt, where most tokenizers join it with the answer.
SPACED = (
    "{% for m in messages %}{{ ('Assistant: ' if m['role'] == 'assistant' else 'User: ') + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# The same text, with the space on the answer's side.
UNSPACED = SPACED.replace("{{ 'Assistant: ' }}", "{{ 'Assistant:' }}")


def collator_with(text, template, **options):
    tokenizer = deepcopy(text.tokenizer)
    tokenizer.chat_template = template
    return TextCollator(tokenizer, **options)


def learned(collator, batch, row=0):
    return collator.tokenizer.decode(batch["labels"][row][batch["labels"][row] != IGNORED])


@pytest.mark.parametrize(("template", "lead"), [(CHATML, ""), (THINKING, "<think></think>")])
def test_trailing_text_of_the_template_is_not_supervised(text, make_sample, template, lead):
    collator = collator_with(text, template)
    batch = collator([make_sample("A red circle."), make_sample("එක")])
    assert learned(collator, batch) == f"{lead}A red circle.<|eot_id|>"
    assert learned(collator, batch, 1) == f"{lead}එක<|eot_id|>"
    assert collator.tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()]).endswith("<|eot_id|>\n")


def test_a_template_that_changes_the_answer_is_named_with_its_row(text, make_sample):
    collator = collator_with(text, CHATML.replace("m['content']", "m['content'] | replace('red', 'blue')"))
    with pytest.raises(UserError, match=r"train.jsonl line 17: the chat template does not render this answer"):
        collator([make_sample("A red circle.")])


def test_images_of_samples_are_left_out(text, make_sample):
    class Unreadable:
        def load(self):
            raise AssertionError

    sample = make_sample()
    object.__setattr__(sample, "image", Unreadable())
    assert set(text.collator()([sample])) == {"input_ids", "attention_mask", "labels"}


def test_a_tokenizer_without_a_template_is_pointed_to_load_processor(text):
    with pytest.raises(UserError, match="no chat template"):
        collator_with(text, None)


def test_a_generation_prompt_that_the_tokenizer_joins_with_the_answer_is_refused(text):
    with pytest.raises(
        UserError, match=r"generation prompt, which ends in '\\nAssistant: ': the tokenizer joins that with"
    ):
        collator_with(text, SPACED)


def test_a_space_on_the_answers_side_is_supervised(text, make_sample):
    collator = collator_with(text, UNSPACED)
    batch, prompts = collator([make_sample("red")]), collator.prompts([make_sample()])
    assert learned(collator, batch) == f" red{collator.tokenizer.eos_token}"
    length = prompts["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == prompts["input_ids"][0].tolist()


def test_the_end_token_of_a_template_need_not_be_the_tokenizers(text):
    tokenizer = text.tokenizer
    collator = collator_with(text, CHATML.replace("<|eot_id|>", "<|end_of_text|>"))
    assert collator.end_token_id == tokenizer.convert_tokens_to_ids("<|end_of_text|>") != tokenizer.eos_token_id
