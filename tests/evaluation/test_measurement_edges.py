"""Edges of few-shot examples, forgetting, losses, drift and captions, each found unwatched by a mutation."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_captioners import captioner_of, eval_params
from tiny_families import tiny_family

from inft.data.images import BadImage, FileImage
from inft.evaluation import drift as drift_module
from inft.evaluation import forgetting as forgetting_module
from inft.evaluation.caption import caption_rows, default_language
from inft.evaluation.captioner import load_captioner, processor_place, search_of
from inft.evaluation.drift import measure_drift
from inft.evaluation.evaluate import evaluate
from inft.evaluation.fewshot import random_shots, similar_shots
from inft.evaluation.loss import row_losses
from inft.evaluation.predict import Captioning
from inft.evaluation.records import Forgetting, Prediction
from inft.evaluation.rows import EvalRow, load_rows
from inft.evaluation.splits import FOR_FORGETTING, first_split, settled_split
from inft.evaluation.verdict import Verdict
from inft.sample import Prompt, Sample
from params import MUNIChusLoadConfig
from params.evaluation import resolve_eval

QUIET = Console(quiet=True)
SAMPLE = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en", "ja", "ur"))


class Seen(Exception):
    """Carries what a replaced function was called with."""


@pytest.fixture(scope="module")
def rows():
    return load_rows(SAMPLE, limit=12, with_images=True).rows


@pytest.fixture
def captioning(captioner):
    return Captioning(model=captioner.model, collator=captioner.collator, max_new_tokens=6, batch_size=5)


def written(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def config(path, **changes):
    return MUNIChusLoadConfig(**{"data": str(path), "split": "test", "context": "none", **changes})


@dataclass(frozen=True)
class Drawn:
    """An image in memory."""

    colour: str

    def load(self):
        return Image.new("RGB", (64, 64), self.colour)


def text_sample(prompt, answer="a", **changes):
    return Sample(image=None, prompt=Prompt(instruction=prompt), answer=answer, language="en", **changes)


def row_of(sample, key="row"):
    return EvalRow(key=key, sample=sample, references=(sample.answer,))


def test_a_text_row_is_no_example_of_itself():
    pool = [text_sample("Say A.", "the answer"), text_sample("Say B.", "b")]
    shots = random_shots(pool, count=1, seed=0)
    assert {shots(row_of(pool[0], key=str(n)))[0].answer for n in range(20)} == {"b"}


def test_rows_do_not_all_get_the_same_random_examples():
    pool = [text_sample(f"Say {n}.", str(n)) for n in range(30)]
    shots = random_shots(pool, count=2, seed=0)
    assert len({tuple(s.answer for s in shots(row_of(text_sample("x"), key=str(n)))) for n in range(10)}) > 5


def test_an_unreadable_row_has_no_similar_examples():
    captioner = captioner_of("aya")
    pool = [replace(text_sample(f"{c}", c), image=Drawn(c)) for c in ("red", "blue", "green")]
    shots = similar_shots(captioner, pool, count=1)
    assert shots(row_of(replace(text_sample("x"), image=BadImage("gone")))) == []
    assert shots(row_of(replace(text_sample("x"), image=None))) == []


def test_similarity_is_that_of_the_base_models_features(monkeypatch):
    captioner, seen = captioner_of("aya"), []

    def features(model, processor, images):
        layers = [m for m in captioner.model.modules() if hasattr(m, "lora_A")]
        seen.append((type(model).__name__, all(layer.disable_adapters for layer in layers), bool(layers)))
        return torch.eye(len(images))

    captioner = replace(captioner, spec=replace(captioner.spec, image_features=features))
    similar_shots(captioner, [replace(text_sample(c, c), image=Drawn(c)) for c in ("red", "blue")], count=1)
    assert seen == [(type(tiny_family("aya").model()).__name__, True, True)]


def test_four_passes_are_base_and_adapter_on_own_and_on_shuffled_inputs(adapter_dir, tmp_path, monkeypatch):
    passes = {}

    def spy(captioning, rows, file, **_):
        layers = [module for module in captioning.model.modules() if hasattr(module, "lora_A")]
        off = {layer.disable_adapters for layer in layers}
        own = [row.sample.image == original.sample.image for row, original in zip(rows, task_rows, strict=True)]
        passes[file.stem] = (off, set(own))
        return [
            Prediction(row=r.key, lang=r.sample.language, generated_caption="x", reference_caption="x y", title="")
            for r in rows
        ]

    monkeypatch.setattr(forgetting_module, "predict", spy)
    captioner = captioner_of("llama32")
    task_rows = load_rows(replace(SAMPLE, languages=("en", "ja")), limit=6, with_images=True)
    task = forgetting_module.ForgettingTask(
        rows=task_rows, data="s", split="t", language_names={}, cjk_tokens=("ja",), resamples=5, seed=1
    )
    task_rows = task_rows.rows
    captioning = Captioning(model=captioner.model, collator=captioner.collator, max_new_tokens=4, batch_size=6)
    forgetting_module.measure_forgetting(captioner, captioning, task, tmp_path, on_progress=lambda *_: None)
    assert passes == {
        "base": ({True}, {True}),
        "adapter": ({False}, {True}),
        "base_shuffled": ({True}, {False}),
        "adapter_shuffled": ({False}, {False}),
    }


def test_rows_that_cannot_be_read_have_no_loss_and_stop_nothing(adapter_dir, tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "title": f"t{n}", "caption": f"c {n}", "language": "en"} for n in range(4)]
    written(tmp_path / "test.jsonl", *rows)
    params = eval_params(adapter=adapter_dir, limit=4, flags={"languages": "en"})
    params = replace(params, forgetting=config(tmp_path, languages=("en",)))
    found = evaluate(params, tmp_path / "m", console=QUIET).forgetting
    assert found.rows == 4
    assert found.loss["en"]["base"].value > 0


def test_losses_of_a_bfloat16_model_are_summed_in_float32(rows):
    family = tiny_family("text")
    model, collator = family.model(dtype="bfloat16"), family.collator()
    samples = [row.sample for row in rows[:2]]
    found = row_losses(model, collator, samples, batch_size=2)
    for sample, (nats, _) in zip(samples, found, strict=True):
        batch = collator([sample])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        assert nats == pytest.approx(expected, rel=1e-3)
        assert nats != torch.tensor(nats).bfloat16().item()


def test_losses_and_drift_are_without_dropout(rows):
    captioner = captioner_of("llama32")
    samples = [row.sample for row in rows[:4]]
    for module in captioner.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    captioner.model.eval()
    expected = row_losses(captioner.model, captioner.collator, samples, batch_size=4)
    still = measure_drift(captioner, samples, data="s", split="t", fingerprint="f")
    captioner.model.train()
    assert row_losses(captioner.model, captioner.collator, samples, batch_size=4) == expected
    assert measure_drift(captioner, samples, data="s", split="t", fingerprint="f") == still
    assert captioner.model.training


def test_cka_compares_means_over_a_rows_own_tokens(rows, monkeypatch):
    captioner, taken = captioner_of("llama32"), []
    samples = [replace(row.sample, prompt=row.sample.prompt.with_news("word " * n)) for n, row in enumerate(rows[:5])]
    real = drift_module.linear_cka
    monkeypatch.setattr(drift_module, "linear_cka", lambda x, y: taken.append((x, y)) or real(x, y))
    measure_drift(captioner, samples, data="s", split="t", fingerprint="f")
    for place, sample in enumerate(samples):
        batch = captioner.collator([sample])
        batch.pop("labels")
        with torch.no_grad():
            after = captioner.model(**batch, output_hidden_states=True).hidden_states
        for (_, adapted), layer in zip(taken, after, strict=True):
            torch.testing.assert_close(adapted[place], layer[0].mean(0), atol=1e-4, rtol=1e-4)


def test_the_mean_cosine_of_what_did_not_move_is_never_above_one(rows, monkeypatch):
    monkeypatch.setattr(torch, "cosine_similarity", lambda b, a, dim: torch.full(a.shape[:-1], 1 + 1e-6))
    samples = [row.sample for row in rows[:4]]
    found = measure_drift(captioner_of("text"), samples, data="s", split="t", fingerprint="f")
    assert set(found.cosine) == {1.0}


def test_the_processor_beside_the_adapter_is_the_one_that_is_read(adapter_dir, tmp_path):
    params = eval_params(adapter=adapter_dir)
    assert processor_place(params) == str(adapter_dir)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert processor_place(replace(params, adapter=str(bare), processor_name="name")) == "name"


def test_a_captioner_has_the_length_and_the_tiles_of_its_parameters():
    params = eval_params("aya", overrides=["basic.max_length=123", "basic.max_image_tiles=2"])
    captioner = load_captioner(params, None)
    assert captioner.collator.max_length == 123
    assert captioner.processor.image_processor.max_patches == 2


def test_a_search_is_what_the_parameters_say():
    params = eval_params(
        overrides=["basic.gen_do_sample=true", "basic.gen_top_p=0.5", "basic.gen_num_beams=3"],
        flags={"temperature": "2", "seed": "7"},
    )
    search = search_of(params.basic)
    said = (search.do_sample, search.top_p, search.temperature, search.num_beams, search.seed)
    assert said == (True, 0.5, 2.0, 3, 7)


def test_captions_are_in_the_first_language_of_the_run_or_in_english():
    from dataclasses import asdict

    from params.resolve import resolve_train

    run = asdict(resolve_train("llama32", demo=True, flags={"languages": "si,ur"}))
    every = asdict(resolve_train("llama32", demo=True, flags={"languages": "all"}))
    assert default_language(resolve_eval("llama32", trained=run)) == "si"
    assert default_language(resolve_eval("llama32", trained=every)) == "en"
    assert default_language(resolve_eval("llama32", demo=True, flags={"languages": "ur,si"})) == "ur"


def test_an_image_below_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    [row] = caption_rows(eval_params(), [Path("~/a.png")], language="en", news="")
    assert row.sample.image == FileImage(tmp_path / "a.png")
    assert row.sample.meta["where"] == "~/a.png"


@pytest.mark.parametrize("context", ["title", "content"])
def test_news_is_quoted_where_the_run_quoted_a_title_or_a_content(context):
    params = eval_params(overrides=[f"data.context={context}"])
    [row] = caption_rows(params, [Path("a.png")], language="en", news="It rains.")
    assert row.sample.prompt.news == "It rains."


def test_other_data_without_a_test_split_is_not_what_the_run_held_out(held, tmp_path):
    written(tmp_path / "other.jsonl", {"title": "t", "content": "c", "caption": "x", "language": "en"})
    params = replace(eval_params("text"), trained=held, data=replace(held, split="test"))
    assert settled_split(params).data.split == "heldout"
    other = replace(params, data=replace(held, data=str(tmp_path / "other.jsonl"), split="test"))
    assert settled_split(other) == other
    assert settled_split(replace(params, trained=None)).data.split == "test"


def test_forgetting_takes_the_test_split_then_the_validation_split(tmp_path):
    assert FOR_FORGETTING == ("test", "validation", "train")
    for split in reversed(FOR_FORGETTING):
        written(tmp_path / f"{split}.jsonl", {"title": "t", "content": "c", "caption": "x", "language": "en"})
        assert first_split(config(tmp_path)).split == split


def test_a_difference_whose_interval_touches_zero_is_kept():
    from inft.evaluation.metrics import ALL, Score

    def scores(value, low, high):
        return {code: {"chrf": Score(value, low, high)} for code in ("en", ALL)}

    def verdict(high):
        return Verdict(
            label="x",
            forgetting=Forgetting(
                data="d",
                split="t",
                rows=9,
                fingerprint="f",
                loss_rows=9,
                language_names={},
                could_do=("en",),
                base=scores(90, 80, 95),
                adapter=scores(89, 80, 94),
                difference=scores(-1, -2, high),
                base_shuffled=scores(1, 0, 2),
                adapter_shuffled=scores(1, 0, 2),
                loss={},
            ),
        )

    assert (verdict(0.0).kept, verdict(0.0).worse) == (["en"], [])
    assert (verdict(-0.1).kept, verdict(-0.1).worse, verdict(-0.1).lost) == ([], ["en"], [])
