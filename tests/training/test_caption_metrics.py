"""Captions of held-out rows at each evaluation, and the best adapter chosen by what they score."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from inft.data.batches import load_samples
from inft.evaluation.generate import generate_captions
from inft.evaluation.metrics import METRICS
from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.sample import Prompt, Sample
from inft.training.adapters import add_adapters
from inft.training.best import criterion_of, read_best
from inft.training.captions import HeldoutCaptions, rows_to_caption
from inft.training.resume import checkpoints, refuse_changed_parameters
from inft.training.run import fit
from inft.training.runlog import read_events
from params import CraftParams, SFTParams, TrainParams, UserError
from params.presets import lora_targets
from params.resolve import dump_yaml, resolve_train
from params.sft import BestMetric

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)
BY_CHRF = {"sft__eval_captions": 8, "sft__best_metric": "chrf", "basic__gen_max_new_tokens": 14}


def events(params: TrainParams, kind: str) -> list[dict[str, Any]]:
    log = Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl"
    return [event for event in read_events(log) if event["event"] == kind]


def printed() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_best_adapter_is_chosen_by_the_loss_or_by_a_metric_that_has_a_direction() -> None:
    loss, *metrics = get_args(BestMetric)
    assert loss == "loss"
    assert metrics
    criteria = [criterion_of(SFTParams(best_metric=name)) for name in metrics]
    assert all(criterion.metric.higher_is_better for criterion in criteria)
    assert [criterion.name for criterion in criteria] == [f"eval_{name}" for name in metrics]


@pytest.mark.parametrize(
    "change",
    [
        {"sft__gradient_checkpointing": False},
        {"sft__gradient_checkpointing": True},
        {"qlora__load_in_4bit": True},
        {"craft": CraftParams(enabled=True)},
    ],
    ids=["plain", "checkpointing", "4-bit", "craft"],
)
def test_a_run_trains_the_same_to_the_bit_with_and_without_captions(
    make_params: Make, tmp_path: Path, change: dict[str, Any]
) -> None:
    found, weights = [], []
    for count in (0, 6):
        params = make_params(tmp_path / str(count), sft__eval_captions=count, basic__gen_max_new_tokens=8, **change)
        result = fit(params, console=QUIET)
        keys = ("step", "loss", "grad_norm", "learning_rate", "languages")
        found.append([[event.get(key) for key in keys] for kind in ("log", "eval") for event in events(params, kind)])
        weights.append(load_file(result.best_dir / "adapter_model.safetensors"))
        assert [("captions" in event, event.get("caption_rows")) for event in events(params, "eval")] == [
            (count > 0, count or None)
        ] * 4
    assert found[0] == found[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_logged_figures_are_those_of_the_stored_adapter_by_plain_peft_and_sacrebleu(make_params: Make) -> None:
    params = make_params(**BY_CHRF, sft__gradient_checkpointing=True)
    result = fit(params, console=QUIET)
    spec = load_spec("text")
    rows = load_samples(params.data, quarantine_file=None, with_images=False).heldout
    base = load_model(spec, params.model_name, basic=params.basic)
    model = PeftModel.from_pretrained(base, str(result.best_dir))
    collator = spec.collator(load_processor(spec, params.processor_name))
    chosen = [row for language in ("en", "si") for row in [r for r in rows if r.language == language][:4]]
    captions = generate_captions(model, collator, chosen, max_new_tokens=14, batch_size=1)
    references = [row.answer for row in chosen]

    assert result.best_metric is not None
    assert result.best_metric > 0
    assert result.best_metric == sacrebleu.corpus_chrf(captions, [references]).score
    (logged,) = [event for event in events(params, "eval") if event["step"] == result.best_step]
    assert logged["captions"].keys() == METRICS.keys()
    assert logged["captions"]["bleu4"] == sacrebleu.corpus_bleu(captions, [references]).score
    said = dict(zip(references, captions, strict=True))
    assert [example["language"] for example in logged["caption_examples"]] == ["en", "si", "en"]
    assert all(said[example["reference"]] == example["generated"] for example in logged["caption_examples"])


def test_the_adapter_with_the_highest_figure_is_stored_and_every_record_says_so(make_params: Make) -> None:
    params, console = make_params(**BY_CHRF), printed()
    result = fit(params, console=console)
    chrf = {event["step"]: event["captions"]["chrf"] for event in events(params, "eval")}
    losses = {event["step"]: event["loss"] for event in events(params, "eval")}
    highest = max(chrf, key=lambda step: (chrf[step], -losses[step]))  # of equal ones that with the lower loss
    assert (result.best_step, result.best_metric) == (highest, chrf[highest])
    record, last = read_best(result.best_dir), events(params, "best")[-1]
    assert record is not None
    for told in (record, last):
        assert (told["step"], told["metric"], told["value"]) == (highest, "eval_chrf", chrf[highest])
    assert record["why"].startswith("highest chrF of the captions")
    (end,) = events(params, "run_end")
    assert (end["best_step"], end["best_metric"]) == (highest, chrf[highest])
    text = text_of(console)
    assert f"step {highest}, held-out chrF {chrf[highest]:.1f} is stored" in text
    assert f"step {highest}/8 · captions: chrF {chrf[highest]:.1f} · BLEU-4 0.0 · CIDEr 0.0 · exact 0.0%" in text


def test_trackers_are_told_every_figure_and_no_text(make_params: Make) -> None:
    params = make_params(**BY_CHRF)
    fit(params, console=QUIET)
    state = (checkpoints(Path(params.output_dir))[0][1] / "trainer_state.json").read_text()
    assert all(f'"eval_{name}"' in state for name in METRICS)
    assert "generated" not in state


def test_training_stops_early_when_the_figure_no_longer_rises(make_params: Make) -> None:
    still = {"sft__lr": 1e-12, "sft__eval_steps": 1, "sft__early_stopping_patience": 3}
    console = printed()
    result = fit(make_params(**BY_CHRF, **still), console=console)
    assert (result.status, result.global_step, result.best_step) == ("early_stopped", 4, 1)
    assert "stopped early, the held-out chrF no longer rises" in text_of(console)


def test_a_resumed_run_goes_on_from_the_best_figure_and_has_the_figures_of_a_whole_one(make_params: Make) -> None:
    params = make_params(**BY_CHRF, sft__save_steps=6)
    whole = fit(params, console=QUIET)
    figures = {event["step"]: event["captions"] for event in events(params, "eval")}
    best = whole.best_step
    assert best in figures
    resumed = fit(params, resume=f"{params.output_dir}/checkpoint-6", console=QUIET)
    assert (resumed.best_step, resumed.best_metric) == (best, figures[best]["chrf"])
    assert [(event["step"], event["captions"]) for event in events(params, "eval")][4:] == [(8, figures[8])]


def test_a_resume_that_would_choose_the_best_adapter_otherwise_is_refused(make_params: Make) -> None:
    by_loss, by_chrf = make_params(sft__eval_captions=8), make_params(**BY_CHRF)
    for before, now in ((by_loss, by_chrf), (by_chrf, by_loss)):
        with pytest.raises(UserError, match=r"(?s)choice of its best adapter.*\n  sft\.best_metric: '\w+' -> '\w+'"):
            refuse_changed_parameters(before, now)
    changes = {"sft__eval_captions": 4, "basic__gen_max_new_tokens": 20, "data__cjk_tokens": ("ja",)}
    for name, value in changes.items():
        dotted = name.replace("__", ".")
        (note,) = refuse_changed_parameters(make_params(), make_params(**{name: value}))
        assert note.startswith(f"{dotted}: ")
        with pytest.raises(UserError, match=dotted):
            refuse_changed_parameters(by_chrf, make_params(**{**BY_CHRF, name: value}))


def test_the_plan_says_what_chooses_the_best_adapter_and_how_many_rows_are_captioned(make_params: Make) -> None:
    def shown(**changes: Any) -> str:
        console = printed()
        fit(make_params(**changes), dry_run=True, console=console)
        return text_of(console)

    assert "lowest held-out loss" in shown()
    by_cider = shown(**{**BY_CHRF, "sft__best_metric": "cider", "sft__eval_captions": 99})
    assert "highest held-out CIDEr" in by_cider
    assert "13 of 13 held-out rows at each evaluation, of 14 tokens at most" in by_cider
    assert "sft.load_best_model_at_end is off: the last step is stored" in shown(sft__load_best_model_at_end=False)


def test_captions_that_could_not_be_had_are_an_error_before_the_first_step(
    make_params: Make, captions_dir: Path, tmp_path: Path
) -> None:
    none_held_out = {"data__data": str(captions_dir / "train.jsonl"), "data__eval_fraction": 0.0}
    with pytest.raises(UserError, match=r"sft\.eval_captions=8: no row is held out.*--eval-fraction"):
        fit(make_params(**BY_CHRF, **none_held_out), console=QUIET)
    one = {"sft__eval_captions": 1, "sft__best_metric": "cider"}
    with pytest.raises(UserError, match=r"of one row it is always 0\. Raise --eval-captions"):
        fit(make_params(**one), console=QUIET)
    with pytest.raises(UserError, match=r"data\.cjk_tokens names 'xx'"):
        fit(make_params(**BY_CHRF, data__cjk_tokens=("xx",)), console=QUIET)
    assert not checkpoints(tmp_path / "run")


def row(language: str, number: int = 0) -> Sample:
    return Sample(image=None, prompt=Prompt(instruction="x"), answer=f"answer {number}", language=language)


@given(st.lists(st.sampled_from(["en", "si", "ja"]), min_size=1, max_size=30), st.integers(1, 40))
def test_captioned_rows_are_the_first_of_each_language_and_as_even_as_the_languages_allow(
    languages: list[str], count: int
) -> None:
    heldout = [row(language, number) for number, language in enumerate(languages)]
    params = resolve_train("text", demo=True, overrides=[f"sft.eval_captions={count}"])
    chosen = rows_to_caption(params, heldout)
    assert len(chosen) == min(count, len(heldout))
    taken = {}
    for language in set(languages):
        own = [sample for sample in heldout if sample.language == language]
        mine = [sample for sample in chosen if sample.language == language]
        assert mine == own[: len(mine)]
        taken[language] = len(mine), len(mine) < len(own)
    for few, more_to_come in taken.values():
        assert not more_to_come or all(many <= few + 1 for many, _ in taken.values())


@pytest.fixture
def adapted(request: pytest.FixtureRequest) -> tuple[PeftModel, Any, list[Sample], TrainParams]:
    """An embedded model with new adapters in training, its collator, and held-out scenes in languages it knows."""
    params = resolve_train(
        request.param, demo=True, overrides=["data.languages=en,ja,ar", "basic.gen_max_new_tokens=40"]
    )
    spec = load_spec(request.param)
    held = dataclasses.replace(params.data, split="test", eval_fraction=0.0, max_rows_per_lang=2)
    samples = load_samples(held, quarantine_file=None, with_images=spec.takes_images).train
    base = load_model(spec, "", basic=params.basic)
    model = add_adapters(base, spec, params.lora, lora_targets(request.param, "basic", params.lora), seed=0)
    return model, spec.collator(load_processor(spec, "")), samples, params


@pytest.mark.parametrize("adapted", ["llama32", "aya", "text"], indirect=True)
def test_captioning_leaves_the_model_as_it_was_and_reads_each_token_once(
    adapted: tuple[PeftModel, Any, list[Sample], TrainParams],
) -> None:
    model, collator, samples, params = adapted
    model.get_base_model().enable_input_require_grads = lambda: None
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)

    def state() -> list[Any]:
        modes = [module.training for module in model.modules()]
        grads = [(parameter.requires_grad, None if parameter.grad is None else parameter.grad.sum().item())
                 for parameter in model.parameters()]  # fmt: skip
        return [modes, grads, torch.get_rng_state().tolist(), model.config.use_cache, torch.is_grad_enabled()]

    before, lengths = state(), []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    captions = HeldoutCaptions(
        samples, collator, max_new_tokens=40, batch_size=len(samples), cjk_tokens=params.data.cjk_tokens
    )
    found = captions.score(model)
    handle.remove()
    assert state() == before
    assert lengths[0] > 1
    assert set(lengths[1:]) == {1}  # the cache is used, whatever training does
    assert found.rows == 6
    assert found.figures["chrf"] > 60  # the embedded models were trained on these languages
    assert [example.language for example in found.examples] == ["en", "ja", "ar"]


def test_two_processes_caption_their_shares_and_score_what_one_process_scores(
    make_params: Make, tmp_path: Path
) -> None:
    same = {**BY_CHRF, "sft__eval_captions": 13, "lora__dropout": 0.0}
    one = make_params(tmp_path / "one", **same, sft__gradient_accumulation_steps=2)
    alone = fit(one, console=QUIET)
    two = make_params(tmp_path / "two", **same, sft__gradient_accumulation_steps=1)
    model, run = two.model_name, two.output_dir
    basic = dataclasses.replace(two.basic, text_model_name=model, text_processor_name=model)
    sft = dataclasses.replace(two.sft, text_output_dir=run, text_best_model_dir=two.best_model_dir)
    (tmp_path / "two.yaml").write_text(dump_yaml(dataclasses.replace(two, basic=basic, sft=sft)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inft"]
    command = [*launch, "train", "text", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("captions: chrF") == 4
    for before, now in zip(events(one, "eval"), events(two, "eval"), strict=True):
        assert now["caption_rows"] == 13
        assert now["captions"] == pytest.approx(before["captions"], rel=1e-9)
        assert now["caption_examples"] == before["caption_examples"]
    record = read_best(Path(two.best_model_dir))
    assert record is not None
    assert (record["step"], record["value"]) == (alone.best_step, pytest.approx(alone.best_metric))
