"""Every method on the embedded vision models: images reach both answers, and what is generated is scored with them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from inft.models.preferences import PreferenceCollator
from inft.training import run
from inft.training.methods.grpo import GRPORunTrainer
from inft.training.run import fit
from inft.training.runlog import read_events
from params import TrainParams
from params.resolve import resolve_train

QUIET = Console(quiet=True)
METHODS = ("dpo", "orpo", "grpo", "ppo")


@pytest.fixture
def demo(tmp_path: Path) -> Callable[..., TrainParams]:
    """demo(family, method, *overrides): a few steps on eight drawn scenes."""

    def make(family: str, method: str, *overrides: str) -> TrainParams:
        short = ["sft.max_steps=2", "sft.eval_steps=1", "sft.save_steps=2", "sft.logging_steps=1", "lora.r=4"]
        short += ["sft.per_device_train_batch_size=4", "data.max_rows_per_lang=8", f"basic.logs_dir={tmp_path}/logs"]
        if method in ("grpo", "ppo"):
            short += ["rl.max_completion_length=6"]
        if method == "grpo":
            short += ["rl.num_generations=2"]
        flags = {"output_dir": str(tmp_path / "run"), "task": "t"}
        return resolve_train(family, method=method, demo=True, overrides=(*short, *overrides), flags=flags)

    return make


def logs(params: TrainParams, kind: str = "log") -> list[dict[str, Any]]:
    return [event for event in read_events(f"{params.basic.logs_dir}/trainer_t.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "craft"), [("llama32", False), ("llama32", True), ("aya", False)])
def test_a_method_trains_on_images(demo: Callable[..., TrainParams], family: str, method: str, craft: bool) -> None:
    params = demo(family, method, *(["craft.enabled=true"] if craft else []))
    assert fit(params, console=QUIET).status == "finished"
    assert all(("loss/craft_contrast" in log) == craft for log in logs(params))
    names = load_file(Path(params.best_model_dir) / "adapter_model.safetensors")
    assert names
    assert not any("ref" in name for name in names)


@pytest.mark.parametrize("family", ["llama32", "aya", "text"])
def test_the_first_loss_of_dpo_is_ln_2(demo: Callable[..., TrainParams], family: str) -> None:
    params = demo(family, "dpo", "sft.max_steps=1")
    fit(params, console=QUIET)
    assert logs(params)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs(params)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_held_out_loss_of_a_changed_image_is_another_one(
    demo: Callable[..., TrainParams], monkeypatch: Any
) -> None:
    found = []
    for factor in (1.0, -1.0):
        call = PreferenceCollator.__call__

        def changed(self: Any, samples: Any, factor: float = factor, call: Any = call) -> dict[str, Tensor]:
            batch = call(self, samples)
            return {**batch, "pixel_values": batch["pixel_values"] * factor}

        with monkeypatch.context() as patch:
            patch.setattr(PreferenceCollator, "__call__", changed)
            params = demo("llama32", "dpo", "sft.lr=1e-2")
            fit(params, console=QUIET, overwrite=True)
        found.append(logs(params, "eval")[-1]["loss"])
    assert found[0] != found[1]


@pytest.mark.parametrize("family", ["llama32", "aya", "text"])
def test_the_log_probabilities_of_generated_answers_are_those_of_rows_alone(
    demo: Callable[..., TrainParams], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one row at a time, without padding and images of its own alone, through the model's plain logits."""
    compared = []
    own = GRPORunTrainer._get_per_token_logps_and_entropies

    def scored(self: Any, model: Any, ids: Tensor, mask: Tensor, width: int, *rest: Any, **options: Any) -> Any:
        found = own(self, model, ids, mask, width, *rest, **options)
        numbers = [int(number) for number in self._now]
        with torch.no_grad():
            for place, number in enumerate(numbers):
                prompts = self.rows.collator.prompts(self.samples([number]))
                answer = ids[place, -width:][mask[place, -width:].bool()]
                compared.append((found[0][place, : len(answer)].detach(), alone(self, model, prompts, answer)))
        return found

    def alone(self: Any, model: Any, prompts: dict[str, Tensor], answer: Tensor) -> Tensor:
        inputs = dict(prompts)
        for token in answer:  # one by one, as generation extends what is per token
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "cross_attention_mask" in inputs:
                seen = inputs["cross_attention_mask"]
                inputs["cross_attention_mask"] = torch.cat([seen, seen[:, -1:]], dim=1)
        logits = model(**inputs).logits[0, -len(answer) - 1 : -1].float() / self.temperature
        return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]

    monkeypatch.setattr(GRPORunTrainer, "_get_per_token_logps_and_entropies", scored)
    temperature = "rl.temperature=1.7"
    params = demo(family, "grpo", "sft.max_steps=1", temperature, "rl.kl_coef=0.1", "data.languages=en,yue")
    fit(params, console=QUIET)
    assert len(compared) >= 8  # of the reference and of the loss
    for ours, plain in compared:
        torch.testing.assert_close(ours, plain, atol=2e-4, rtol=1e-4)


def test_images_are_negatives_of_each_other_though_their_prompts_are_equal(
    demo: Callable[..., TrainParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    answers = GRPORunTrainer._craft_answers

    def looked(self: Any, inputs: Any) -> Any:
        found = answers(self, inputs)
        seen.append((found.prompts_tell, found.sample_ids_B.tolist(), inputs["rows"].tolist()))
        return found

    monkeypatch.setattr(GRPORunTrainer, "_craft_answers", looked)
    fit(demo("llama32", "grpo", "craft.enabled=true", "sft.max_steps=2"), console=QUIET)
    assert seen
    for tell, ids, rows in seen:
        assert not tell
        assert len(set(ids)) == len(set(rows)) == 2  # of four answers to two prompts


def test_the_guards_look_at_both_answers(demo: Callable[..., TrainParams], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    guards = run.run_guards

    def told(model: Any, spec: Any, processor: Any, batches: Any, **options: Any) -> None:
        looked.extend(sample.answer for samples, _ in batches for sample in samples)
        guards(model, spec, processor, batches, **options)

    monkeypatch.setattr(run, "run_guards", told)
    params = demo("llama32", "dpo")
    fit(params, dry_run=True, console=QUIET)
    from inft.data.batches import load_samples

    rows = load_samples(params.data, quarantine_file=None, with_images=True, kind="preferences").train
    assert any(row.answer in looked and row.rejected in looked for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama32", "aya", "text"])
def test_the_demo_of_a_method_rises(tmp_path: Path, family: str, method: str) -> None:
    from inft.evaluation.demo import run_demo

    flags = {"output_dir": str(tmp_path / "run")}
    logs_dir = f"basic.logs_dir={tmp_path}/logs"
    params = resolve_train(family, method=method, demo=True, overrides=(logs_dir,), flags=flags)
    run_demo(params, QUIET, resume=None, overwrite=False)
    figures = json.loads((tmp_path / "run" / "demo.json").read_text())
    before, after = figures["before"]["yue"], figures["after"]["yue"]
    if method in ("dpo", "orpo"):
        assert before <= 0.6
        assert after >= 0.75
        assert figures["shuffled"]["yue"] <= 0.6  # it looks at the scene
    else:
        assert before <= 0.6
        assert after >= 1.0
