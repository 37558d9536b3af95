"""Whole runs with CRAFT: what is logged, stored and resumed, and what a user is told."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from inft.training.run import fit
from inft.training.runlog import read_events
from params import CraftParams, TrainParams, UserError
from params.craft import CRAFT_PRESETS

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty articles, each captioned in two languages."""
    path = tmp_path_factory.mktemp("translated")
    for split, count in (("train", 20), ("validation", 4)):
        rows = [
            {
                "title": f"{split} {i}",
                "content": "",
                "caption": f"{language} {'xyz'[i % 3] * (i + 1)}",
                "language": language,
            }
            for i in range(count)
            for language in ("en", "si")
        ]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def logs(params: TrainParams, kind: str = "log") -> list[dict[str, Any]]:
    events = read_events(Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl")
    return [event for event in events if event["event"] == kind]


def figures(params: TrainParams) -> dict[int, dict[str, Any]]:
    """Step -> what was logged of it, without clocks."""
    clocks = ("time", "run", "tokens_per_second")
    return {log["step"]: {key: value for key, value in log.items() if key not in clocks} for log in logs(params)}


@pytest.mark.parametrize("pairs", ["", "translations"])
def test_a_run_logs_the_guides_keys_and_its_adapter_loads_without_craft(
    make_params: Make, tiny_text_dir: Path, translated: Path, pairs: str
) -> None:
    params = make_params(craft=CraftParams(enabled=True, pairs=pairs), data__data=str(translated))
    result = fit(params, console=QUIET)
    assert result.status == "finished"
    for log in logs(params):
        assert {"loss/craft_sft", "loss/craft_contrast", "loss/craft_total"} <= log.keys()
        assert 0 <= log["metrics/craft_contrastive_accuracy"] <= 1
    assert all("craft" not in key for event in logs(params, "eval") for key in event)
    names = set(load_file(result.best_dir / "adapter_model.safetensors"))
    assert names
    assert all(".lora_" in name for name in names)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_text_dir), str(result.best_dir))
    assert torch.isfinite(model(input_ids=torch.tensor([[70, 71]])).logits).all()


@pytest.mark.parametrize("name", CRAFT_PRESETS)
@pytest.mark.parametrize("pairs", ["", "translations"])
@pytest.mark.filterwarnings("error:craft_negative_queue_size")
def test_every_preset_trains(make_params: Make, translated: Path, name: Any, pairs: str) -> None:
    craft = CraftParams(enabled=True, preset=name, pairs=pairs, **CRAFT_PRESETS[name])
    params = make_params(craft=craft, data__data=str(translated), sft__max_steps=3, sft__eval_steps=3)
    assert fit(params, console=QUIET).status == "finished"
    assert logs(params)[-1]["loss/craft_contrast"] > 0


@pytest.mark.parametrize("pairs", ["", "translations"])
def test_a_resumed_run_with_craft_is_bit_equal(tmp_path: Path, make_params: Make, translated: Path, pairs: str) -> None:
    craft = CraftParams(
        enabled=True,
        pairs=pairs,
        learnable_temperature=True,
        negative_strategy="queue",
        negative_queue_size=12,
        gradient_balancing="loss_scale",
    )
    settings = {"craft": craft, "data__data": str(translated), "sft__logging_steps": 2, "sft__save_steps": 3}
    whole, broken = make_params(tmp_path / "whole", **settings), make_params(tmp_path / "broken", **settings)
    fit(whole, console=QUIET)
    fit(broken, console=QUIET)
    checkpoint = Path(broken.output_dir) / "checkpoint-6"
    (Path(broken.basic.logs_dir) / f"trainer_{broken.task}.jsonl").unlink()
    fit(broken, resume=str(checkpoint), console=QUIET)
    expected = {step: log for step, log in figures(whole).items() if step > 6}
    assert figures(broken) == expected
    adapters = [load_file(Path(p.best_model_dir) / "adapter_model.safetensors") for p in (whole, broken)]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_a_resume_with_other_pairs_is_refused(make_params: Make, translated: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"text": f"one {i}", "text_tgt": f"eins {i}"}) for i in range(12)]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    params = make_params(craft=CraftParams(enabled=True, pairs=str(pairs)), data__data=str(translated))
    fit(params, console=QUIET)
    pairs.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="the data has changed"):
        fit(params, resume="latest", console=QUIET)


def test_craft_cannot_be_turned_on_in_the_middle_of_a_run(make_params: Make) -> None:
    plain = make_params()
    fit(plain, console=QUIET)
    with pytest.raises(UserError, match=r"craft\.enabled"):
        fit(make_params(craft=CraftParams(enabled=True)), resume="latest", console=QUIET)


def test_the_plan_names_micro_batches_alpha_and_negatives(make_params: Make, translated: Path) -> None:
    said = StringIO()
    craft = CraftParams(enabled=True, pairs="translations", contrastive_batch_size=6)
    params = make_params(craft=craft, data__data=str(translated), sft__gradient_accumulation_steps=4)
    fit(params, dry_run=True, console=Console(file=said, width=160))
    for words in ("n_sft 2, n_con 2 micro-batches a step", "0.6 fine-tuning to 0.4 contrast", "5 per anchor"):
        assert words in said.getvalue()


def test_what_auto_beta_leaves_out_is_told_once_and_in_the_names_of_set(
    make_params: Make, translated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"text": f"one {i}", "text_tgt": f"eins {i}"}) for i in range(2)]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    craft = CraftParams(enabled=True, pairs=str(pairs), length_strategy="auto_beta")
    params = make_params(craft=craft, data__data=str(translated), sft__max_steps=2)
    said = StringIO()
    fit(params, console=Console(file=said, width=160))
    told = "9 fine-tuning batches of each epoch are left out: there are too few batches of pairs for every step."
    assert said.getvalue().count(told) == 1
    assert "--set craft.length_strategy=oversample" in said.getvalue()
    assert "up to 1 per anchor" in said.getvalue()
    assert "craft_length_strategy" not in caplog.text
