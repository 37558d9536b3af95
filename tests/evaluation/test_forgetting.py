"""Forgetting: base and adapter on the same rows, with intervals; what the base could do told from what it could not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_captioners import captioner_of, eval_params
from tiny_families import tiny_family

from inft.evaluation.evaluate import evaluate
from inft.evaluation.forgetting import loss_scores, without_input
from inft.evaluation.loss import row_losses
from inft.evaluation.metrics import ALL, Score
from inft.evaluation.rows import load_rows
from inft.evaluation.verdict import could_do
from params import MUNIChusLoadConfig

CONFIG = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en", "fr", "ur"))


@pytest.fixture(scope="module")
def samples():
    return [row.sample for row in load_rows(CONFIG, limit=9, with_images=True).rows]


@pytest.fixture(scope="module")
def found(adapter_dir, tmp_path_factory):
    """What an adapter of random weights forgot of English and French; Urdu the base never knew."""
    torch.set_num_threads(1)
    params = eval_params(adapter=adapter_dir, limit=18)
    params = replace(params, forgetting=CONFIG)
    where = tmp_path_factory.mktemp("forgetting")
    return evaluate(params, where / "m", console=Console(quiet=True)).forgetting


def test_the_languages_that_the_base_could_do_are_those_it_was_trained_on(found):
    assert found.could_do == ("en", "fr")


def test_the_adapters_fall_is_shown_with_its_interval(found):
    assert found.base["en"]["exact"].value == 100
    for language in ("en", "fr"):
        fall = found.difference[language]["chrf"]
        assert fall.low <= fall.value <= fall.high < 0
        assert fall.value == pytest.approx(found.adapter[language]["chrf"].value - found.base[language]["chrf"].value)


def test_shuffled_images_take_the_base_down(found):
    assert found.base_shuffled["en"]["exact"].value < 50
    assert set(found.base_shuffled) == set(found.base) == {"en", "fr", "ur", ALL}


def test_losses_rise_and_stand_beside_those_without_the_image(found):
    for language in ("en", "fr", ALL):
        losses = found.loss[language]
        assert losses["difference"].value == pytest.approx(losses["adapter"].value - losses["base"].value)
    assert found.loss["en"]["difference"].low > 0
    assert found.loss["en"]["base_text_only"].value > found.loss["en"]["base"].value


def test_a_language_counts_as_known_only_above_the_whole_interval_of_the_control():
    def scores(low, value, high):
        return {"en": {"chrf": Score(value, low, high)}, ALL: {"chrf": Score(value, low, high)}}

    assert could_do(scores(40, 50, 60), scores(10, 20, 30)) == ("en",)
    assert could_do(scores(25, 50, 60), scores(10, 20, 30)) == ()


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_row_losses_are_those_of_the_plain_models_logits(name, samples):
    family = tiny_family(name)
    model, collator = family.model(), family.collator()
    found = row_losses(model, collator, samples, batch_size=4)
    for sample, (nats, tokens) in zip(samples, found, strict=True):
        batch = collator([sample])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, :-1].double()
        chosen = labels != -100
        expected = F.cross_entropy(logits[chosen], labels[chosen], reduction="sum").item()
        assert tokens == int(chosen.sum())
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_text_only_row_has_neither_image_nor_news(samples):
    row = without_input(replace(samples[0], prompt=samples[0].prompt.with_news("a long story")))
    assert row.image is None
    assert row.prompt.text == samples[0].prompt.instruction


def test_the_base_of_a_captioner_is_the_model_without_its_adapter(samples):
    captioner = captioner_of("llama32")
    untouched = row_losses(tiny_family("llama32").model(), captioner.collator, samples, batch_size=9)
    with captioner.base() as base:
        within = row_losses(base, captioner.collator, samples, batch_size=9)
    after = row_losses(captioner.model, captioner.collator, samples, batch_size=9)
    assert [nats for nats, _ in within] == pytest.approx([nats for nats, _ in untouched])
    assert all(a != b for a, b in zip(after, untouched, strict=True))


rows_of_losses = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 30)), min_size=1, max_size=20)


@given(rows_of_losses)
def test_loss_scores_are_per_token_and_their_intervals_hold_them(rows):
    base, adapter = [(b, n) for b, _, n in rows], [(a, n) for _, a, n in rows]
    scores = loss_scores(base, adapter, resamples=50, seed=0)
    tokens = sum(n for *_, n in rows)
    assert scores["base"].value == pytest.approx(sum(b for b, *_ in rows) / tokens)
    assert scores["difference"].value == pytest.approx(scores["adapter"].value - scores["base"].value, abs=1e-9)
    assert all(score.low <= score.high for score in scores.values())
    same = loss_scores(base, base, resamples=50, seed=0)["difference"]
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_paired_intervals_are_narrower_than_the_rows_own_spread():
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 100, 200)
    base = [(float(x), 10) for x in hard]
    adapter = [(float(x + 5 + rng.normal(0, 0.1)), 10) for x in hard]
    scores = loss_scores(base, adapter, resamples=300, seed=0)
    width = {name: score.high - score.low for name, score in scores.items()}
    assert width["difference"] < width["base"] / 20
    assert scores["difference"].low <= 0.5 <= scores["difference"].high
