"""Runs of every method: what they log, judge, store and resume, and what a user is told, on a tiny text model."""

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import METHODS, QUIET, REWARDED, adapter, events, figures
from plain_scores import log_probs, tuned
from rich.console import Console
from torch.nn.functional import logsigmoid

from inft.data.batches import load_samples
from inft.models.preferences import sides
from inft.training.best import read_best
from inft.training.run import fit
from inft.training.runlog import COMMON, EVENTS, read_events
from params import CraftParams, TrainParams

Make = Callable[..., TrainParams]


OWN_FIGURES = {
    "dpo": {"rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen", "num_tokens"},
    "orpo": {"rewards/margins", "rewards/accuracies", "log_odds_ratio", "nll_loss", "num_tokens"},
    "grpo": {"reward", "rewards/length/mean", "completions/mean_length", "entropy", "num_tokens"},
    "ppo": {"reward", "rewards/length/mean", "kl", "value_loss", "num_tokens"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("craft", [None, "", "pairs"])
def test_a_method_trains_logs_its_figures_and_stores_an_adapter(
    of: Callable[..., TrainParams], tmp_path: Path, method: str, craft: str | None
) -> None:
    changes: dict[str, Any] = {"sft__max_steps": 4}
    if craft is not None:
        pairs = tmp_path / "pairs.jsonl"
        lines = [json.dumps({"text": f"one {i}", "text_tgt": f"eins {i}"}) for i in range(12)]
        pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
        changes["craft"] = CraftParams(enabled=True, pairs=str(pairs) if craft else "", contrastive_batch_size=None)
    params = of(method, **changes)
    result = fit(params, console=QUIET)
    assert (result.status, result.global_step) == ("finished", 4)
    for event in read_events(result.log_file):
        assert event.keys() >= COMMON | EVENTS[event["event"]], event
    logs = events(params, "log")
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    for log in logs:
        assert OWN_FIGURES[method] <= log.keys(), OWN_FIGURES[method] - log.keys()
        assert ("loss/craft_contrast" in log) == (craft is not None)
    assert events(params, "run_start")[0]["method"] == method
    assert events(params, "run_start")[0]["params"]["method"] == method
    weights = adapter(params)
    assert all(".lora_" in name and "ref" not in name for name in weights)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert not (Path(params.best_model_dir) / "ref").exists()


def test_the_held_out_figures_of_dpo_are_means_over_rows_whatever_the_batch_size(
    of: Callable[..., TrainParams], tmp_path: Path
) -> None:
    found = []
    for size in (1, 3, 7):
        params = of("dpo", tmp_path / str(size), sft__max_steps=2, sft__per_device_eval_batch_size=size)
        fit(params, console=QUIET)
        found.append(events(params, "eval")[-1])
    for event in found[1:]:
        for name in ("loss", "rewards/accuracies", "rewards/margins"):
            assert event[name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-7)
        assert event["languages"] == pytest.approx(found[0]["languages"], rel=1e-5)

    base, model, collator = tuned(params)
    heldout = load_samples(params.data, quarantine_file=None, with_images=False, kind="preferences").heldout
    losses: dict[str, list[float]] = {}
    margins = []
    for sample in heldout:
        ratios = [log_probs(model, collator, s)[0] - log_probs(base, collator, s)[0] for s in sides(sample)]
        margins.append(0.1 * (ratios[0] - ratios[1]))
        losses.setdefault(sample.language, []).append(-float(logsigmoid(torch.tensor(margins[-1]))))
    every = [loss for part in losses.values() for loss in part]
    assert found[0]["loss"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert found[0]["languages"] == pytest.approx({k: sum(v) / len(v) for k, v in losses.items()}, rel=1e-5)
    assert found[0]["rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-3, abs=1e-6)
    assert found[0]["rewards/accuracies"] == sum(margin > 0 for margin in margins) / len(margins)


def test_the_held_out_loss_of_orpo_is_the_papers_mean_over_rows_whatever_the_batch_size(
    of: Callable[..., TrainParams], tmp_path: Path
) -> None:
    found = []
    for size in (1, 7):
        params = of("orpo", tmp_path / str(size), sft__max_steps=2, sft__per_device_eval_batch_size=size)
        fit(params, console=QUIET)
        found.append(events(params, "eval")[-1])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)

    _, model, collator = tuned(params)
    heldout = load_samples(params.data, quarantine_file=None, with_images=False, kind="preferences").heldout
    losses = []
    for sample in heldout:
        chosen, rejected = (total / count for total, count in (log_probs(model, collator, s) for s in sides(sample)))
        odds = (chosen - math.log1p(-math.exp(chosen))) - (rejected - math.log1p(-math.exp(rejected)))
        losses.append(-chosen - 0.1 * float(logsigmoid(torch.tensor(odds))))
    assert found[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm", "sppo_hard"])
def test_the_held_out_loss_of_one_row_is_trls_own(
    of: Callable[..., TrainParams], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import DPOTrainer

    from inft.training.methods.dpo import DPORunTrainer

    compared = []
    own = DPORunTrainer.row_scores

    def row_scores(self: Any, batch: Any) -> Any:
        scores = own(self, batch)
        whole = DPOTrainer._compute_loss(self, self.model, dict(batch), False)
        self._metrics["eval"].clear()
        compared.append((float(scores[0].mean()), float(whole)))
        return scores

    monkeypatch.setattr(DPORunTrainer, "row_scores", row_scores)
    smoothing = 0.1 if kind == "robust" else 0.0
    params = of("dpo", preference__dpo_loss_type=kind, preference__label_smoothing=smoothing, sft__max_steps=2)
    fit(params, console=QUIET)
    assert compared
    for mean, whole in compared:
        assert mean == pytest.approx(whole, rel=1e-5)


def test_the_first_loss_of_dpo_is_ln_2(of: Callable[..., TrainParams]) -> None:
    params = of("dpo", sft__max_steps=1)
    fit(params, console=QUIET)
    assert events(params, "log")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_accumulated_small_batches_of_preferences_train_as_one_large_batch(
    of: Callable[..., TrainParams], tmp_path: Path
) -> None:
    losses = []
    for size, accumulated in ((8, 1), (2, 4)):
        params = of(
            "dpo",
            tmp_path / str(size),
            sft__per_device_train_batch_size=size,
            sft__gradient_accumulation_steps=accumulated,
        )
        fit(params, console=QUIET)
        losses.append([log["loss"] for log in events(params, "log")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_figures_and_weights_of_an_uninterrupted_one(
    of: Callable[..., TrainParams], tmp_path: Path, method: str
) -> None:
    settings = {"sft__max_steps": 6, "sft__save_steps": 2, "sft__logging_steps": 3, "sft__save_total_limit": 3}
    whole, broken = (of(method, tmp_path / name, **settings) for name in ("whole", "broken"))
    fit(whole, console=QUIET)
    fit(broken, console=QUIET)
    (Path(broken.basic.logs_dir) / f"trainer_{broken.task}.jsonl").unlink()
    fit(broken, resume=str(Path(broken.output_dir) / "checkpoint-4"), console=QUIET)
    expected = {step: log for step, log in figures(whole).items() if step > 4}
    assert expected
    assert figures(broken) == expected
    first, second = adapter(whole), adapter(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_how_often_one_evaluates_does_not_change_the_training(
    of: Callable[..., TrainParams], tmp_path: Path, method: str
) -> None:
    losses = []
    for every in (1, 100):
        params = of(method, tmp_path / str(every), sft__eval_steps=every, sft__max_steps=4)
        fit(params, console=QUIET)
        losses.append([log["loss"] for log in events(params, "log")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("method", "metric", "higher"), [("dpo", "eval_loss", False), ("grpo", "eval_reward", True)])
def test_the_stored_adapter_is_that_of_the_best_evaluation(
    of: Callable[..., TrainParams], method: str, metric: str, higher: bool
) -> None:
    params = of(method, sft__eval_steps=1)
    result = fit(params, console=QUIET)
    found = read_best(Path(params.best_model_dir))
    assert found is not None
    assert (found["metric"], found["value"]) == (metric, result.best_metric)
    values = [event[metric.removeprefix("eval_")] for event in events(params, "eval")]
    assert found["value"] == (max if higher else min)(values)
    assert (method.upper() in found["why"]) == (method == "dpo")


def test_the_held_out_reward_is_that_of_greedy_answers(of: Callable[..., TrainParams], preferences: Path) -> None:
    from inft.evaluation.generate import generate_captions
    from inft.rewards.functions import length

    params = of("grpo", sft__max_steps=2)
    fit(params, console=QUIET)
    _, model, collator = tuned(params)
    heldout = load_samples(params.data, quarantine_file=None, with_images=False).heldout
    answers = generate_captions(model, collator, heldout, max_new_tokens=6, batch_size=4)
    values = length(answers, references=[sample.answer for sample in heldout])
    event = events(params, "eval")[-1]
    assert event["reward"] == pytest.approx(sum(values) / len(values))
    assert event["rewards/length"] == pytest.approx(event["reward"])
    assert event["loss"] is None
    assert set(event["languages"]) == {"en", "si"}


def test_weighted_rewards_add_up(of: Callable[..., TrainParams]) -> None:
    params = of("ppo", rl__rewards=("length", "json"), rl__reward_weights=(2.0, 0.5), sft__max_steps=2)
    fit(params, console=QUIET)
    for event in events(params, "eval"):
        assert event["reward"] == pytest.approx(2 * event["rewards/length"] + 0.5 * event["rewards/json"])


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_loss(of: Callable[..., TrainParams], tmp_path: Path, method: str) -> None:
    losses = []
    for checkpointing in (False, True):
        params = of(method, tmp_path / str(checkpointing), sft__gradient_checkpointing=checkpointing, sft__max_steps=3)
        fit(params, console=QUIET)
        losses.append([log["loss"] for log in events(params, "log")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_a_4_bit_model_stay_in_float32(of: Callable[..., TrainParams], method: str) -> None:
    params = of(method, qlora__load_in_4bit=True, sft__gradient_checkpointing=True, sft__max_steps=2)
    assert fit(params, console=QUIET).status == "finished"
    assert {weight.dtype for weight in adapter(params).values()} == {torch.float32}
    if method == "dpo":
        assert events(params, "log")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_held_out_rows_are_captioned_beside_a_methods_own_figures(of: Callable[..., TrainParams], method: str) -> None:
    fit(of(method, sft__eval_captions=4, sft__max_steps=2, basic__gen_max_new_tokens=5), console=QUIET)
    (event,) = events(of(method), "eval")
    assert event["caption_rows"] == 4
    assert "chrf" in event["captions"]
    assert ("reward" in event) == (method in REWARDED)


def test_a_dry_run_tells_the_method(of: Callable[..., TrainParams]) -> None:
    told = {
        "dpo": ("sigmoid, beta 0.1", "its adapters turned off"),
        "orpo": ("the odds ratio times 0.1 (beta)",),
        "grpo": ("length", "4 to each prompt, of 6 tokens at most", "no KL term"),
        "ppo": ("KL to the base model 0.05", "2 passes over each batch"),
    }
    for method, words in told.items():
        said = StringIO()
        result = fit(of(method), dry_run=True, console=Console(file=said, width=180))
        assert result.status == "dry_run"
        assert not Path(result.output_dir).exists()
        for word in (f"({method.upper()})", *words):
            assert word in said.getvalue(), (method, word)


@pytest.mark.parametrize(("method", "line"), [("dpo", "chosen above rejected"), ("ppo", "held-out reward")])
def test_an_evaluation_says_what_it_found(of: Callable[..., TrainParams], method: str, line: str) -> None:
    said = StringIO()
    fit(of(method, sft__max_steps=2), console=Console(file=said, width=160))
    assert line in said.getvalue()


def test_the_contrast_lines_of_a_joint_run_speak_of_both_losses(of: Callable[..., TrainParams]) -> None:
    said = StringIO()
    params = of("grpo", craft=CraftParams(enabled=True), sft__per_device_train_batch_size=8)
    fit(params, dry_run=True, console=Console(file=said, width=180))
    for words in ("its own generated answer", "2 micro-batches a step, each with both losses", "0.6 GRPO to 0.4"):
        assert words in said.getvalue()
    assert "up to 7 per anchor" in said.getvalue()


def test_epochs_make_as_many_steps_as_the_plan_says(of: Callable[..., TrainParams], tmp_path: Path) -> None:
    # 40 rows: GRPO has 2 prompts of 4 answers in a step of 8; PPO 5 rollouts of 8 rows, 2 passes over each.
    for method, steps in (("grpo", 20), ("ppo", 10)):
        rare = {"sft__eval_steps": 100, "sft__save_steps": 100}
        params = of(method, tmp_path / method, sft__max_steps=None, sft__num_epochs=1, **rare)
        assert fit(params, console=QUIET).global_step == steps
