"""A batch is what the user wrote, or an error that names the row."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.client.losses import resolve_loss
from inft.client.losses.batch import Batch, parse_batch
from inft.client.losses.inputs import IGNORED
from params.errors import UserError

IDS = [[1, 2, 3], [4, 5, 0]]


def parse(**fields: Any) -> Batch:
    return parse_batch(fields, vocab_size=8, max_length=6)


def test_rows_come_back_as_they_were_given() -> None:
    batch = parse(input_ids=IDS, attention_mask=[[1, 1, 1], [1, 1, 0]], labels=[[-100, 2, 3], [4, 5, -100]])
    assert batch.input_ids_BT.tolist() == IDS
    assert batch.labels_BT.tolist() == [[-100, 2, 3], [4, 5, -100]]
    assert batch.tokens == 5


def test_without_labels_every_real_token_is_supervised() -> None:
    batch = parse(input_ids=IDS, attention_mask=[[1, 1, 1], [1, 1, 0]])
    assert batch.labels_BT.tolist() == [[1, 2, 3], [4, 5, IGNORED]]
    assert parse(input_ids=IDS).attention_mask_BT.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda rows: [torch.tensor(row) for row in rows], tuple])
def test_tensors_and_arrays_are_taken_as_lists_are(make: Callable[[list[list[int]]], Any]) -> None:
    assert parse(input_ids=make(IDS)).input_ids_BT.tolist() == IDS


def test_loss_inputs_are_shifted_to_the_position_that_predicts() -> None:
    batch = parse(input_ids=IDS, advantages=[1, 2], old_logprobs=[[-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6]])
    inputs = batch.loss_inputs(torch.zeros(2, 3, 8))
    assert inputs.labels_BT.tolist() == [[2, 3, IGNORED], [5, 0, IGNORED]]
    torch.testing.assert_close(inputs.extras["old_logprobs"], torch.tensor([[-0.2, -0.3, 0], [-0.5, -0.6, 0]]))
    assert inputs.extras["advantages"].tolist() == [1, 2]


def test_token_ce_of_a_batch_equals_that_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    batch = parse(input_ids=IDS, attention_mask=[[1, 1, 1], [1, 1, 0]], labels=[[-100, 2, 3], [4, 5, -100]])
    output = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT)
    torch.testing.assert_close(resolve_loss("token_ce")(batch.loss_inputs(output.logits)).loss, output.loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "input_ids: row 1 has 1 values and row 0 2: pad"),
        ({"input_ids": []}, "input_ids: expected a list of rows"),
        ({"input_ids": [[]]}, "input_ids: row 0 has 0 values"),
        ({"input_ids": [1, 2]}, "list of rows"),
        ({"input_ids": "text"}, "list of rows"),
        ({"input_ids": [[1, 8]]}, "input_ids: row 0, position 1 is 8, outside the vocabulary of 8 tokens"),
        ({"input_ids": [[1], [-1]]}, "input_ids: row 1, position 0 is -1"),
        ({"input_ids": [[1, 2.0]]}, "row 0, position 1 is 2.0: give a whole number"),
        ({"input_ids": [[True]]}, "row 0, position 0 is True"),
        ({"input_ids": [[10**30]]}, "outside the vocabulary"),
        ({"input_ids": [[1] * 7]}, "7 tokens, more than the 6"),
        ({"input_ids": IDS, "labels": [[1, 2, 3]]}, "labels has 1 rows and input_ids 2"),
        ({"input_ids": IDS, "labels": [[1, 2, 3], [1, 2]]}, "labels: row 1 has 2 values and that row of input_ids 3"),
        ({"input_ids": IDS, "labels": [[1, 2, 3], [1, 9, 3]]}, "labels: row 1, position 1 is 9.*or -100"),
        ({"input_ids": IDS, "labels": [[1, 2, 3], [1, -1, 3]]}, "labels: row 1, position 1 is -1"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1], [1, 2, 1]]}, "attention_mask: row 1, position 1 is 2"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1], [0, 0, 0]]}, "attention_mask: row 1 has no 1"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1], [1, 1]]}, "attention_mask: row 1 has 2 values"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 0], [1, 1, 1]], "labels": IDS}, "labels: row 0, position 2 is 3"),
        ({"input_ids": IDS, "advantages": [1.0]}, "advantages: 1 entries for 2 rows"),
        ({"input_ids": IDS, "advantages": 1.0}, "advantages: expected a list"),
        ({"input_ids": IDS, "advantages": [1.0, None]}, "advantages: row 1 holds None: give numbers"),
        ({"input_ids": IDS, "advantages": [1.0, float("nan")]}, "advantages: row 1 is not finite"),
        ({"input_ids": IDS, "advantages": [1.0, 10**400]}, "advantages: row 1 holds a whole number of 1329 bits"),
        ({"input_ids": [[10**5000, 1]]}, "row 0, position 0 is 9223372036854775807, outside the vocabulary"),
        ({"input_ids": [[{"a": "b" * 10**6}]]}, "row 0, position 0 is a dict of 1: give a whole number"),
        ({"input_ids": IDS, "labels": [[None] * 3] * 2}, "labels: row 0, position 0 is None: give a whole number"),
        ({"input_ids": IDS, "own": [[[1], [1, 2, 3]]] * 2}, "own: row 0 is ragged"),
        ({"input_ids": IDS, "own": [[[[[1]]]]] * 2}, "own: row 0 is 4 or more lists deep"),
        ({"input_ids": IDS, "own": ["a" * 10**6, 1]}, "own: row 0 holds 'a{60}': give numbers"),
        ({"input_ids": IDS, "own": [2**63, 1]}, "own: row 0 holds 9223372036854775808"),
        ({"input_ids": IDS, "own": [1e300, 1]}, "own: row 0 is not finite in torch.float32"),
        ({"input_ids": IDS, "own": [1j, 1]}, "own: row 0 holds 1j"),
        ({"input_ids": IDS, "o" * 65: [1, 2]}, "names of fields are text of 1 to 64 characters"),
        ({"input_ids": IDS, **{f"own{n}": [1, 2] for n in range(64)}}, "65 fields, more than the 64"),
        ({"input_ids": IDS, "old_logprobs": [[1.0, 2.0, 3.0], [1.0]]}, "old_logprobs: row 1 is 1 values and row 0 3"),
        ({"input_ids": IDS, "advantage": [1.0, 2.0]}, "did you mean 'advantages'"),
        ({"input_ids": IDS, "atention_mask": IDS}, "did you mean 'attention_mask'"),
        ({"input_ids": IDS, "prompt": "a"}, "not both"),
        ({"labels": IDS}, "neither input_ids nor both"),
        ({"prompt": "a"}, "neither input_ids nor both"),
        ({"prompt": "a", "completion": "b"}, "no tokenizer here"),
    ],
)
def test_wrong_batches_are_named(fields: dict[str, Any], message: str) -> None:
    """The original takes ragged rows."""
    with pytest.raises(UserError, match=message) as raised:
        parse(**fields)
    assert len(str(raised.value)) < 250


def test_numpy_numbers_and_booleans_are_numbers() -> None:
    batch = parse(
        input_ids=[[np.int64(1), 2, 3], np.array([4, 5, 0])],
        attention_mask=[[True, True, True], [True, True, False]],
        chosen=[True, False],
        advantages=[[np.float32(0.5)] * 3, [1, 2, 3]],
    )
    assert batch.input_ids_BT.tolist() == IDS
    assert batch.labels_BT.tolist() == [[1, 2, 3], [4, 5, IGNORED]]
    assert batch.extras["chosen"].tolist() == [1, 0]
    assert batch.extras["advantages"].tolist() == [[0.5] * 3, [1, 2, 3]]


def test_a_users_lists_are_left_as_they_were() -> None:
    given_rows = [[np.int64(1), 2], [3, 4]]
    parse(input_ids=given_rows)
    assert [type(item) for item in given_rows[0]] == [np.int64, int]


def test_eight_rows_of_512_tokens_are_read_in_a_few_milliseconds() -> None:
    rows = [[1] * 512 for _ in range(8)]
    fields = dict.fromkeys(("input_ids", "attention_mask", "labels"), rows)
    took = []
    for _ in range(10):
        started = time.perf_counter()
        parse_batch({**fields, "advantages": [[0.5] * 512] * 8}, vocab_size=8, max_length=512)
        took.append(time.perf_counter() - started)
    assert min(took) < 4e-3  # 0.5 ms where nothing else runs; number by number it took 5 ms


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["input_ids", "labels", "attention_mask", "advantages", "prompt", "x"]), ANYTHING)
)
def test_whatever_json_says_is_a_batch_or_a_user_error(fields: dict[str, Any]) -> None:
    try:
        batch = parse_batch(fields, vocab_size=8, max_length=6)
    except UserError:
        return
    assert batch.input_ids_BT.shape == batch.labels_BT.shape == batch.attention_mask_BT.shape
    assert bool((batch.input_ids_BT < 8).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_rows_are_accepted_exactly_when_equally_long(lengths: list[int]) -> None:
    rows = [[1] * length for length in lengths]
    if len(set(lengths)) == 1:
        assert parse(input_ids=rows).input_ids_BT.shape == (len(lengths), lengths[0])
        return
    wrong = next(row for row, length in enumerate(lengths) if length != lengths[0])
    with pytest.raises(UserError, match=f"row {wrong} "):
        parse(input_ids=rows)


def parse_texts(tokenizer: Any, *, max_length: int = 20, vocab_size: int = 300, **fields: Any) -> Batch:
    return parse_batch(fields, vocab_size=vocab_size, max_length=max_length, tokenizer=tokenizer)


def test_texts_have_labels_on_the_completion_and_its_end_alone(make_byte_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = make_byte_tokenizer("")
    batch = parse_texts(tokenizer, prompt=["ab", "a"], completion=["cd", "é"], advantages=[1.0, -1.0])
    a, b, c, d = (tokenizer("abcd")["input_ids"][i] for i in range(4))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    accent = tokenizer("é")["input_ids"]
    assert batch.input_ids_BT.tolist() == [[a, b, c, d, end], [a, *accent, end, pad]]
    assert batch.labels_BT.tolist() == [[-100, -100, c, d, end], [-100, *accent, end, -100]]
    assert batch.attention_mask_BT.tolist() == [[1] * 5, [1] * 4 + [0]]
    assert batch.extras["advantages"].tolist() == [1.0, -1.0]


def test_one_text_is_a_batch_of_one_row(make_byte_tokenizer: Callable[[str], Any]) -> None:
    assert parse_texts(make_byte_tokenizer(""), prompt="ab", completion="c").input_ids_BT.shape == (1, 4)


def test_a_start_token_stands_first_where_the_tokenizer_sets_one(make_byte_tokenizer: Callable[[str], Any]) -> None:
    from tokenizers import processors

    tokenizer = make_byte_tokenizer("")
    tokenizer.bos_token = "<|user|>"
    without = parse_texts(tokenizer, prompt="ab", completion="c")
    start, end = ("<|user|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[start, end]
    )
    batch = parse_texts(tokenizer, prompt="ab", completion="c")
    assert batch.input_ids_BT.tolist() == [[start[1], *without.input_ids_BT[0].tolist()]]
    assert batch.labels_BT.tolist() == [[-100, *without.labels_BT[0].tolist()]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a", "b"], "completion": ["a"]}, "prompt has 2 rows and completion 1"),
        ({"prompt": ["a", "b"], "completion": ["a", ""]}, "completion: row 1 is empty"),
        ({"prompt": ["a", 3], "completion": ["a", "b"]}, "prompt: row 1 is int"),
        ({"prompt": {}, "completion": "b"}, "prompt: expected a text"),
        ({"prompt": "", "completion": "b"}, "prompt: row 0 is empty"),
        ({"prompt": ["a", "b" * 18], "completion": ["a", "bc"]}, "row 1 has 21 tokens.*more than the 20"),
        ({"prompt": "a", "completion": "b", "labels": [[1]]}, "labels beside texts"),
        ({"prompt": "a", "completion": "b", "vocab_size": 6}, "outside the model's vocabulary of 6 tokens"),
    ],
)
def test_wrong_texts_are_named(make_byte_tokenizer: Callable[[str], Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_texts(make_byte_tokenizer(""), **fields)


def test_a_tokenizer_without_an_end_token_is_refused(make_byte_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = make_byte_tokenizer("")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        parse_texts(tokenizer, prompt="a", completion="b")
