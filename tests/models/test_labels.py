"""Whatever the text: the supervised tokens are the answer and its end-of-turn token, and nothing else."""

import unicodedata

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inft.models.collate import IGNORED
from inft.models.templates import neutralise

CONTROL = ["<|eot_id|>", "<|image|>", "<image>", "<|IMG_PATCH|>", "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "TILE"]
SCRIPTS = [
    "රතු රවුමක්",
    "دائرة حمراء",
    "红色的圆",
    "赤い円",
    "👩\u200d👧 🟥",
    "लाल वृत्त",
    "{title}",
    "\n\n",
    " ",
    "\t",
    "'s",
]
words = st.one_of(st.sampled_from([*CONTROL, *SCRIPTS]), st.text(max_size=12))
texts = st.lists(words, max_size=6).map("".join)
answers = texts.filter(str.strip)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected(collator, answer):
    frame = {"LlamaCollator": ("", "<|eot_id|>"), "TextCollator": ("", "<|eot_id|>")}
    lead, end = frame.get(type(collator).__name__, ("<|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"))
    return lead + neutralise(answer.strip(), collator.control) + end


@quick
@given(answer=answers, news=texts, other=answers)
def test_supervised_tokens_decode_to_the_answer_and_its_end(family, make_sample, answer, news, other):
    collator = family.collator()
    batch = collator([make_sample(answer, news=news), make_sample(other, image=False)])
    for row, said in enumerate((answer, other)):
        ids = batch["labels"][row][batch["labels"][row] != IGNORED]
        decoded = collator.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", expected(collator, said))


@quick
@given(answer=answers, news=texts)
def test_generation_starts_where_training_did(family, make_sample, answer, news):
    collator = family.collator()
    sample = make_sample(answer, news=news)
    batch, prompt = collator([sample]), collator.prompts([sample])
    first = int((batch["labels"][0] != IGNORED).nonzero()[0])
    assert torch.equal(batch["input_ids"][0, :first], prompt["input_ids"][0])


@quick
@given(answer=answers, news=texts, cut=st.integers(1, 60))
def test_shortening_never_touches_the_answer(family, make_sample, answer, news, cut):
    sample = make_sample(answer, news=news)
    free = family.collator()
    whole, least = free([sample]), free([make_sample(answer)])
    limit = max(whole["input_ids"].shape[1] - cut, least["input_ids"].shape[1])
    batch = family.collator(max_length=limit)([sample])
    assert batch["input_ids"].shape[1] <= limit
    assert torch.equal(batch["labels"][batch["labels"] != IGNORED], whole["labels"][whole["labels"] != IGNORED])
