"""Sampling: rows of their own, log-probabilities that training agrees with, stops, bounds, nothing left behind."""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from embedded_bases import absolute_base, embedded_base
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inft.client import sampling
from inft.client.batches import model_inputs, prepare_batch
from inft.client.drawing import draw_tokens, text_after
from inft.client.errors import InvalidRequest, NotFinite
from inft.client.images import encode_image
from inft.client.losses.inputs import IGNORED
from inft.client.losses.supervised import supervised_tokens
from inft.client.losses.texts import tokenise_texts
from inft.client.prompts import prompt_inputs
from inft.client.sampling import check_sample, sample

FAMILIES = ("text", "llama32", "aya")
VLMS = ("llama32", "aya")
RED = encode_image(Image.new("RGB", (96, 64), "red"))
BLUE = encode_image(Image.new("RGB", (64, 128), "blue"))
ASKED = "Write a caption for this image in English."  # what the embedded models were tuned on


def disc() -> str:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 50, 40), fill="red")
    return encode_image(image)


DISC = disc()


def sampled(family: str, *, seed: int = 1, step: int = 0, **payload: Any) -> list[dict[str, Any]]:
    base = embedded_base(family)
    request = check_sample(base, {"include_logprobs": True, "max_tokens": 12, **payload})
    found = sample(base, request, seed=seed, step=step)
    assert found["model_step"] == step
    samples: list[dict[str, Any]] = found["samples"]
    return samples


def tokens(samples: list[dict[str, Any]]) -> list[list[int]]:
    return [found["tokens"] for found in samples]


@pytest.fixture(params=FAMILIES)
def rows(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A family and prompts of different lengths, with images where it takes them."""
    payload: dict[str, Any] = {"prompts": ["Once upon a time", "a", "the middle of a longer prompt about a dog"]}
    if request.param in VLMS:
        payload["images"] = [RED, None, BLUE]
    return request.param, payload


def test_a_row_is_the_same_alone_and_among_others(rows: tuple[str, dict[str, Any]]) -> None:
    family, payload = rows
    together = sampled(family, **payload)
    for number, prompt in enumerate(payload["prompts"]):
        images = {"images": [payload["images"][number]]} if family in VLMS else {}
        (alone,) = sampled(family, prompts=[prompt], **images)
        assert alone["tokens"] == together[number]["tokens"]
        assert alone["prompt_tokens"] == together[number]["prompt_tokens"]
        np.testing.assert_allclose(alone["logprobs"], together[number]["logprobs"], atol=1e-4)


def test_a_row_is_the_same_alone_where_positions_are_absolute() -> None:
    base = absolute_base()
    payload = {"max_tokens": 8, "include_logprobs": True, "temperature": 1.0, "top_p": 1.0}
    prompts = ["a", "a longer prompt than that"]
    together = sample(base, check_sample(base, {**payload, "prompts": prompts}), seed=1, step=0)["samples"]
    for number, prompt in enumerate(prompts):
        (alone,) = sample(base, check_sample(base, {**payload, "prompts": [prompt]}), seed=1, step=0)["samples"]
        assert alone["tokens"] == together[number]["tokens"]
        np.testing.assert_allclose(alone["logprobs"], together[number]["logprobs"], atol=1e-5)


def test_the_order_of_prompts_does_not_matter() -> None:
    forth = sampled("text", prompts=["a dog", "a cat", "a dog"])
    back = sampled("text", prompts=["a cat", "a dog", "a dog"])
    assert tokens(forth) == [tokens(back)[1], tokens(back)[0], tokens(back)[2]]


def test_num_samples_is_the_prompt_as_often_and_its_samples_differ() -> None:
    several = sampled("text", prompts=["a dog", "a cat"], num_samples=3)
    assert [found["prompt"] for found in several] == ["a dog"] * 3 + ["a cat"] * 3
    assert tokens(several[:3]) == tokens(sampled("text", prompts=["a dog"] * 3))
    assert len({tuple(row) for row in tokens(several)}) == 6


def test_many_rows_are_generated_in_parts_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled("text", prompts=["a", "bb", "ccc"], num_samples=2)
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 4)
    assert tokens(sampled("text", prompts=["a", "bb", "ccc"], num_samples=2)) == tokens(whole)
    monkeypatch.setattr(sampling, "TOKENS_AT_ONCE", 30)
    assert tokens(sampled("text", prompts=["a", "bb", "ccc"], num_samples=2)) == tokens(whole)


def test_the_seed_decides_and_the_request_s_own_counts_first() -> None:
    first = tokens(sampled("text", prompts=["a dog"], seed=1))
    assert tokens(sampled("text", prompts=["a dog"], seed=1)) == first
    assert tokens(sampled("text", prompts=["a dog"], seed=2)) != first
    request = check_sample(embedded_base("text"), {"prompts": ["a dog"], "max_tokens": 12, "seed": 1})
    texts = [sample(embedded_base("text"), request, seed=seed, step=0)["samples"] for seed in (5, 6)]
    assert texts[0] == texts[1]
    assert texts[0][0]["completion"] == sampled("text", prompts=["a dog"], seed=1)[0]["completion"]


def test_pictures_count_in_what_is_written() -> None:
    samples = sampled("aya", prompts=["What is it?"] * 2, images=[RED, BLUE], temperature=0.0)
    assert samples[0]["logprobs"] != samples[1]["logprobs"]


def test_training_and_sampling_agree_on_log_probabilities(rows: tuple[str, dict[str, Any]]) -> None:
    family, payload = rows
    base = embedded_base(family)
    samples = sampled(family, **payload, temperature=1.3, top_k=20, top_p=0.8)
    for number, found in enumerate(samples):
        prompt, written = found["prompt_tokens"], found["tokens"]
        row = {"input_ids": [prompt + written], "labels": [[IGNORED] * len(prompt) + written]}
        if family in VLMS:
            row["images"] = [payload["images"][number]]
        batch = prepare_batch(base, row, max_length=512, batch_size=1)
        with torch.no_grad():
            logits = base.model(**model_inputs(base, batch)).logits
        logprobs = supervised_tokens(batch.batch.loss_inputs(logits)).logprobs_N
        np.testing.assert_allclose(found["logprobs"], logprobs.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", VLMS)
def test_training_on_a_sampled_completion_agrees_with_an_image_too(family: str) -> None:
    base = embedded_base(family)
    found = sampled(family, prompts=[ASKED], images=[DISC], temperature=0.0, max_tokens=60)[0]
    assert found["finish_reason"] == "stop"
    batch = prepare_batch(
        base,
        {"prompt": [ASKED], "completion": [found["completion"]], "images": [DISC]},
        max_length=512,
        batch_size=1,
    )
    assert batch.batch.input_ids_BT[0].tolist()[: len(found["prompt_tokens"])] == found["prompt_tokens"]
    with torch.no_grad():
        logits = base.model(**model_inputs(base, batch)).logits
    inputs = batch.batch.loss_inputs(logits)
    if inputs.labels_BT[inputs.labels_BT != IGNORED].tolist() != found["tokens"]:
        pytest.fail("the completion's text is tokenised otherwise than it was written: choose another prompt")
    np.testing.assert_allclose(found["logprobs"], supervised_tokens(inputs).logprobs_N.numpy(), atol=1e-4)


def test_greedy_is_transformers_greedy() -> None:
    base = embedded_base("text")
    inputs = prompt_inputs(base, ["a dog", "once upon a time"], [None, None])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[1158], pad_token_id=1153)
    expected = base.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    found = sampled("text", prompts=["a dog", "once upon a time"], temperature=0.0)
    for row, plain in zip(tokens(found), expected.tolist(), strict=True):
        assert plain[: len(row)] == row


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    uniform=st.integers(0, 2**53 - 1).map(lambda number: number / 2**53),
)
def test_a_draw_falls_where_transformers_leaves_a_probability(
    seed: int, temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    logits = 4 * torch.randn(3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    filters = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    probabilities = filters(torch.zeros(3, 1, dtype=torch.int64), logits.clone()).softmax(1)
    drawn = draw_tokens(
        logits, torch.full((3,), uniform, dtype=torch.float64), temperature=temperature, top_k=top_k, top_p=top_p
    )
    assert bool((probabilities.gather(1, drawn[:, None]) > 0).all())


@pytest.mark.parametrize(
    "filters", [{"top_k": 0, "top_p": 1.0}, {"top_k": 5, "top_p": 1.0}, {"top_k": 0, "top_p": 0.7}]
)
def test_draws_are_as_frequent_as_their_probabilities(filters: Mapping[str, Any]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0]])
    warped = LogitsProcessorList([TemperatureLogitsWarper(1.5)])
    if filters["top_k"]:
        warped.append(TopKLogitsWarper(filters["top_k"]))
    if filters["top_p"] < 1:
        warped.append(TopPLogitsWarper(filters["top_p"]))
    expected = warped(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(1)[0]
    draws = 20_000
    uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens(logits.expand(draws, -1), uniform, temperature=1.5, **filters)
    found = drawn.bincount(minlength=7) / draws
    torch.testing.assert_close(found, expected, atol=0.012, rtol=0)
    assert bool((found[expected == 0] == 0).all())


def test_the_largest_uniform_number_draws_a_token_of_the_vocabulary() -> None:
    uniform = torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    logits = torch.tensor([[0.0, 0.0, -200.0], [-torch.inf, 0.0, -torch.inf]])
    assert draw_tokens(logits, uniform, temperature=1e-9, top_k=0, top_p=1.0).tolist() == [1, 1]


def test_a_stop_text_ends_the_completion_before_it_and_may_span_tokens() -> None:
    free = sampled("text", prompts=["a dog"], max_tokens=40, seed=4)[0]
    text, count = free["completion"], len(free["tokens"])
    base = embedded_base("text")
    pieces = [base.tokenizer.decode([token]) for token in free["tokens"]]
    at = next(i for i in range(5, count) if not any("\ufffd" in piece for piece in pieces[i : i + 2]))
    stop = pieces[at][-1] + pieces[at + 1][0]
    found = sampled("text", prompts=["a dog"], max_tokens=40, seed=4, stop_sequences=["\x00never", stop])[0]
    assert found["completion"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"
    assert found["tokens"] == free["tokens"][: len(found["tokens"])]
    assert stop in text_after(base.tokenizer, found["prompt_tokens"][-1], found["tokens"])
    assert stop not in text_after(base.tokenizer, found["prompt_tokens"][-1], found["tokens"][:-1])
    assert found["tokens_generated"] == len(found["tokens"]) == len(found["logprobs"]) < count


def test_one_row_s_stop_leaves_the_others_alone() -> None:
    free = sampled("text", prompts=["a dog", "a cat"], max_tokens=30)
    stop = free[0]["completion"][4:7]
    assert stop not in free[1]["completion"]
    found = sampled("text", prompts=["a dog", "a cat"], max_tokens=30, stop_sequences=[stop])
    assert len(found[0]["tokens"]) < 30
    assert found[1] == free[1]


def test_a_stop_text_in_the_prompt_stops_nothing() -> None:
    found = sampled("text", prompts=["stop here"], stop_sequences=["stop", "here"])[0]
    assert found["tokens_generated"] == 12


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 50))
def test_any_piece_of_a_completion_stops_it(data: st.DataObject, seed: int) -> None:
    free = sampled("text", prompts=["a dog"], seed=seed, max_tokens=16)[0]
    text = free["completion"]
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 9))]
    if "\ufffd" in stop:  # half a character, that what follows may complete
        return
    found = sampled("text", prompts=["a dog"], seed=seed, max_tokens=16, stop_sequences=[stop])[0]
    assert found["completion"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_a_special_token_may_be_a_stop_text() -> None:
    base = embedded_base("text")
    ends, stops = sampling._ends(base, ["<|start_header_id|>", "a"])
    assert base.tokenizer.convert_tokens_to_ids("<|start_header_id|>") in ends
    assert stops == ["a"]


@pytest.mark.parametrize("family", VLMS)
def test_an_end_token_ends_a_row_and_is_counted(family: str) -> None:
    base = embedded_base(family)
    samples = sampled(family, prompts=[ASKED], images=[DISC], temperature=0.0, max_tokens=60)
    found = samples[0]
    assert found["finish_reason"] == "stop"
    assert found["tokens"][-1] == base.collator.end_token_id
    assert found["tokens_generated"] == len(found["tokens"]) < 60
    assert not base.collator.control.search(found["completion"])
    exact = sampled(family, prompts=[ASKED], images=[DISC], temperature=0.0, max_tokens=found["tokens_generated"])
    assert exact[0]["finish_reason"] == "stop"
    short = sampled(family, prompts=[ASKED], images=[DISC], temperature=0.0, max_tokens=found["tokens_generated"] - 1)
    assert short[0]["finish_reason"] == "length"


def test_a_raw_prompt_is_what_a_training_row_begins_with() -> None:
    base = embedded_base("text")
    rows, _, labels = tokenise_texts(["a dog"], ["b"], tokenizer=base.tokenizer, max_length=99)
    context = [token for token, label in zip(rows[0], labels[0], strict=True) if label == IGNORED]
    assert sampled("text", prompts=["a dog"])[0]["prompt_tokens"] == context


def test_an_empty_prompt_samples_from_the_start_token() -> None:
    found = sampled("text", prompts=["", "a"])
    assert found[0]["prompt_tokens"] == [1151]
    assert found[0]["tokens_generated"] == 12
    assert sampled("llama32", prompts=[""])[0]["tokens_generated"] > 0


def test_results_have_what_the_guide_shows_and_log_probabilities_only_when_asked_for() -> None:
    base = embedded_base("text")
    found = sample(base, check_sample(base, {"prompts": ["a"], "max_tokens": 3}), seed=1, step=7)
    assert found["model_step"] == 7
    assert set(found["samples"][0]) == {"prompt", "completion", "tokens_generated", "finish_reason"}


@pytest.fixture
def odd_generation_config() -> Iterator[None]:
    """A model whose makers' generation config would change what is drawn."""
    model = embedded_base("text").model
    own = model.generation_config
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0,
        suppress_tokens=list(range(200)),
        min_new_tokens=5,
        do_sample=True,
        top_k=2,
        eos_token_id=own.eos_token_id,
    )
    yield
    model.generation_config = own


def test_the_model_s_own_generation_config_changes_nothing_and_is_kept(odd_generation_config: None) -> None:
    base = embedded_base("text")
    theirs = base.model.generation_config
    odd = sampled("text", prompts=["a dog"], num_samples=4, max_tokens=20)
    assert base.model.generation_config is theirs
    assert any(token < 200 for row in tokens(odd) for token in row)
    base.model.generation_config = GenerationConfig(eos_token_id=theirs.eos_token_id)
    assert sampled("text", prompts=["a dog"], num_samples=4, max_tokens=20) == odd


def test_random_states_modes_and_gradients_are_as_before() -> None:
    base = embedded_base("text")
    assert base.model.config.use_cache is False
    module = next(base.model.children())
    module.train()
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    modes = [each.training for each in base.model.modules()]
    try:
        sampled("text", prompts=["a dog"])
        assert [each.training for each in base.model.modules()] == modes
    finally:
        base.model.eval()
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.is_grad_enabled()
    assert base.model.config.use_cache is False


def test_decoding_uses_the_cache() -> None:
    base = embedded_base("text")
    lengths: Counter[int] = Counter()
    handle = base.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: lengths.update([output.shape[1]])
    )
    try:
        sampled("text", prompts=["a dog"], max_tokens=9)
    finally:
        handle.remove()
    assert lengths == {5: 1, 1: 8}


def test_logits_that_are_not_finite_are_an_error_not_a_token() -> None:
    base = embedded_base("text")
    handle = base.model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * torch.nan)
    try:
        for temperature in (0.0, 1.0):
            with pytest.raises(NotFinite, match="not finite"):
                sampled("text", prompts=["a dog"], temperature=temperature)
    finally:
        handle.remove()
    assert base.model.generation_config.eos_token_id is not None


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({}, "prompts: expected"),
        ({"prompts": []}, "prompts: expected"),
        ({"prompts": "a dog"}, "prompts: expected"),
        ({"prompts": ["a", 3]}, "prompts: row 1 is int"),
        ({"prompts": ["a", "\udc80"]}, "prompts: row 1 has half"),
        ({"prompts": ["a"] * 257}, "257 rows, more than 256"),
        ({"prompts": ["a"] * 100, "num_samples": 3}, "300 completions"),
        ({"prompts": ["a"] * 200, "max_tokens": 4000}, "up to 4000 tokens, more than 524288"),
        ({"prompts": ["a"], "num_samples": 0}, "num_samples is 0"),
        ({"prompts": ["a"], "max_tokens": 0}, "max_tokens is 0"),
        ({"prompts": ["a"], "max_tokens": True}, "max_tokens is True"),
        ({"prompts": ["a"], "max_tokens": 4097}, "max_tokens is 4097"),
        ({"prompts": ["a", "b c"], "max_tokens": 4094}, "row 1 has .* tokens, and with max_tokens of 4094"),
        ({"prompts": ["a"], "temperature": -1}, "temperature is -1"),
        ({"prompts": ["a"], "temperature": float("nan")}, "temperature is nan"),
        ({"prompts": ["a"], "temperature": float("inf")}, "temperature is inf"),
        ({"prompts": ["a"], "top_p": 0}, "top_p is 0"),
        ({"prompts": ["a"], "top_p": 1.1}, "top_p is 1.1"),
        ({"prompts": ["a"], "top_k": -1}, "top_k is -1"),
        ({"prompts": ["a"], "top_k": 1.0}, "top_k is 1.0"),
        ({"prompts": ["a"], "seed": -1}, "seed is -1"),
        ({"prompts": ["a"], "seed": "1"}, "seed is '1'"),
        ({"prompts": ["a"], "stop_sequences": "\n"}, "stop_sequences: expected"),
        ({"prompts": ["a"], "stop_sequences": ["\n", ""]}, "row 1 has 0 characters"),
        ({"prompts": ["a"], "stop_sequences": [3]}, "stop_sequences: row 0 is int"),
        ({"prompts": ["a"], "include_logprobs": 1}, "include_logprobs is 1"),
        ({"prompts": ["a"], "images": [RED]}, "embedded/text is a text model"),
        ({"prompts": ["a"], "prompt": "a"}, "no field 'prompt'"),
        ([], "takes a mapping"),
    ],
)
def test_a_wrong_request_is_refused_with_its_place(payload: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check_sample(embedded_base("text"), payload)


def test_image_tokens_count_against_the_context() -> None:
    base = embedded_base("aya")
    length = prompt_inputs(base, ["a"], check_sample(base, {"prompts": ["a"], "images": [RED]}).images)
    most = base.context - length["input_ids"].shape[1]
    assert check_sample(base, {"prompts": ["a"], "images": [RED], "max_tokens": most}).max_tokens == most
    with pytest.raises(InvalidRequest, match="row 0 has"):
        check_sample(base, {"prompts": ["a"], "images": [RED], "max_tokens": most + 1})


@pytest.fixture
def quick_threads() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_other_threads_may_check_while_one_samples(quick_threads: None) -> None:
    base = embedded_base("llama32")
    request = check_sample(base, {"prompts": ["a dog", "a"], "max_tokens": 24, "stop_sequences": ["never"]})
    expected = sample(base, request, seed=1, step=0)
    rows = {"prompt": ["a", "a longer one"], "completion": ["b", "c"], "images": [RED, None]}
    length = prepare_batch(base, rows, max_length=512, batch_size=2).batch.input_ids_BT.shape

    def check(number: int) -> Any:
        if number % 2:
            return prepare_batch(base, rows, max_length=512, batch_size=2).batch.input_ids_BT.shape
        return check_sample(base, {"prompts": ["a", "b " * number], "max_tokens": 4}).prompts[1]

    with ThreadPoolExecutor(max_workers=4) as threads:
        others = [threads.submit(check, number) for number in range(120)]
        assert all(sample(base, request, seed=1, step=0) == expected for _ in range(3))
        for number, other in enumerate(others):
            assert other.result() == (length if number % 2 else "b " * number)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    payload=st.fixed_dictionaries(
        {"prompts": st.lists(st.text(max_size=6), max_size=3) | ANYTHING},
        optional={
            "images": st.lists(st.none() | st.just(RED), max_size=2) | ANYTHING,
            "max_tokens": st.integers(0, 3) | ANYTHING,
            "temperature": st.sampled_from([0, 1e-9, 0.7, 50, 1e6]) | ANYTHING,
            "top_p": st.floats(0, 1) | ANYTHING,
            "top_k": st.integers(-1, 2**65) | ANYTHING,
            "stop_sequences": st.lists(st.text(max_size=3), max_size=2) | ANYTHING,
            "seed": st.none() | st.integers(),
            "num_samples": st.integers(0, 2) | ANYTHING,
            "include_logprobs": st.booleans(),
        },
    )
)
def test_whatever_a_request_is_it_is_answered_or_refused(payload: dict[str, Any]) -> None:
    base = embedded_base("llama32")
    try:
        request = check_sample(base, payload)
    except InvalidRequest:
        return
    if request.max_tokens > 3:
        return
    found = sample(base, request, seed=0, step=0)["samples"]
    assert len(found) == len(request.prompts) * request.num_samples
    assert all(1 <= each["tokens_generated"] <= request.max_tokens for each in found)
