"""Runs of every method: what they log, judge, store and resume, and what a user is told, on a tiny text model."""

import json
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_scores import log_probs, tuned
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from inft.data.batches import load_samples
from inft.models.collate import CaptionCollator
from inft.models.preferences import sides
from inft.training.best import read_best
from inft.training.callbacks import GracefulStop
from inft.training.run import fit
from inft.training.runlog import COMMON, EVENTS, read_events
from params import CraftParams, TrainParams, UserError

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)
PREFERENCES = ("dpo", "orpo")
REWARDED = ("grpo", "ppo")
METHODS = (*PREFERENCES, *REWARDED)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four preferences in two languages, and seven held out, whose answers differ in length."""
    path = tmp_path_factory.mktemp("preferences")
    for split, count in (("train", 24), ("validation", 7)):
        rows = [
            {
                "title": f"{split} {i}",
                "content": "abc" * (i % 3 + 1),
                "chosen": "xy" * (i % 4 + 1),
                "rejected": "z" * (i % 5 + 2),
                "language": ("en", "si")[i % 2],
            }
            for i in range(count)
        ]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def of(make_params: Make, preferences: Path) -> Callable[..., TrainParams]:
    """of(method, root=None, **changes): the parameters of a short run."""

    def make(method: str, root: Path | None = None, **changes: Any) -> TrainParams:
        own: dict[str, Any] = {"method": method, "lora__dropout": 0.0}
        if method in PREFERENCES:
            own["data__data"] = str(preferences)
        else:
            own |= {"sft__best_metric": "reward", "rl__max_completion_length": 6, "rl__num_generations": 4}
            own["rl__rewards"] = ("length",)
        if method == "ppo":
            own |= {"rl__num_iterations": 2, "rl__kl_coef": 0.05}
        return make_params(root, **{**own, **changes})

    return make


def events(params: TrainParams, kind: str) -> list[dict[str, Any]]:
    log = Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl"
    return [event for event in read_events(log) if event["event"] == kind]


def figures(params: TrainParams) -> dict[int, dict[str, Any]]:
    """Step -> what was logged of it, without clocks."""
    clocks = ("time", "run", "tokens_per_second", "step_time")
    return {e["step"]: {k: v for k, v in e.items() if k not in clocks} for e in events(params, "log")}


def adapter(params: TrainParams) -> dict[str, torch.Tensor]:
    return load_file(Path(params.best_model_dir) / "adapter_model.safetensors")


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


@pytest.fixture
def rewards_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reward functions that misbehave, in a module of the current directory."""
    source = """
def raising(completions, **columns):
    return [1 / 0 for _ in completions]

def short(completions, **columns):
    return [1.0]

def nothing(completions, **columns):
    return [float("nan")] * len(completions)

def none(completions):
    return [None for _ in completions]

def leaving(completions):
    raise SystemExit(3)
"""
    (tmp_path / "bad_rewards.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    import sys

    sys.modules.pop("bad_rewards", None)


@pytest.mark.parametrize("method", REWARDED)
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raising", "raised ZeroDivisionError"),
        ("short", "returned 1 rewards for"),
        ("nothing", "returned nan"),
        ("leaving", "raised SystemExit"),
    ],
)
@pytest.mark.usefixtures("rewards_here")
def test_a_reward_function_that_misbehaves_is_a_users_error(
    of: Callable[..., TrainParams], method: str, function: str, words: str
) -> None:
    params = of(method, rl__rewards=(f"bad_rewards:{function}",))
    with pytest.raises(UserError, match=rf"rl\.rewards=bad_rewards:{function}: .*{words}"):
        fit(params, console=QUIET)
    (error,) = events(params, "error")
    assert error["kind"] == "UserError"


@pytest.mark.parametrize("method", REWARDED)
@pytest.mark.usefixtures("rewards_here")
def test_an_answer_without_any_reward_is_not_trained_on(
    of: Callable[..., TrainParams], tmp_path: Path, method: str
) -> None:
    alone = of(method, tmp_path / "alone", rl__rewards=("bad_rewards:none",), sft__eval_steps=100)
    with pytest.raises(UserError, match=r"the answer to .* has no reward: bad_rewards:none returned None"):
        fit(alone, console=QUIET)
    beside = of(method, tmp_path / "beside", rl__rewards=("bad_rewards:none", "length"), sft__max_steps=2)
    assert fit(beside, console=QUIET).status == "finished"


def long_rows(file: Path, **columns: str) -> dict[str, Any]:
    """Twelve rows in one file, in the fourth of which some columns are long; what of the parameters reads them."""
    rows = [{"title": f"t{i}", "content": "abc", "caption": "xyz", "language": "en"} for i in range(12)]
    rows[3] |= columns
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"data__data": str(file), "data__languages": ("en",), "data__eval_fraction": 0.0}


@pytest.mark.parametrize("method", REWARDED)
def test_a_long_reference_is_no_part_of_a_rows_length_and_the_answer_is(
    of: Callable[..., TrainParams], tmp_path: Path, method: str
) -> None:
    data = long_rows(tmp_path / "reference.jsonl", caption="x" * 300)
    params = of(method, tmp_path / "reference", basic__max_length=200, sft__max_steps=1, **data)
    assert fit(params, console=QUIET).status == "finished"
    data = long_rows(tmp_path / "prompt.jsonl", prompt="x" * 150)
    room = {"basic__max_length": 200, **data}
    fit(of(method, **room), dry_run=True, console=QUIET)
    with pytest.raises(UserError, match=r"line 4.*basic\.max_length=200 tokens with an answer of .*=100 even without"):
        fit(of(method, rl__max_completion_length=100, **room), dry_run=True, console=QUIET)


@pytest.mark.parametrize("method", REWARDED)
def test_news_is_shortened_to_leave_room_for_the_answer(
    of: Callable[..., TrainParams], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = long_rows(tmp_path / "news.jsonl", content="x" * 300)
    params = of(method, basic__max_length=200, rl__max_completion_length=20, sft__max_steps=6, **data)
    widths, prompts = [], CaptionCollator.prompts

    def measured(self: Any, samples: Any, *args: Any) -> Any:
        batch = prompts(self, samples, *args)
        if any(sample.meta.get("title") == "t3" for sample in samples):
            widths.append(int(batch["attention_mask"].sum(1).max()))
        return batch

    fit(params, dry_run=True, console=QUIET)
    monkeypatch.setattr(CaptionCollator, "prompts", measured)
    fit(params, console=QUIET)
    assert widths[-1] == 180  # a byte is a token here


def test_a_prompt_beyond_the_models_context_is_a_users_error(of: Callable[..., TrainParams], tmp_path: Path) -> None:
    data = long_rows(tmp_path / "context.jsonl", content="x" * 700)
    params = of("ppo", basic__max_length=1000, **data)
    with pytest.raises(UserError, match=r"line 4.*model's context of 512 leaves it 506\. Set basic\.max_length=512"):
        fit(params, dry_run=True, console=QUIET)
    with pytest.raises(UserError, match=r"^rl\.max_completion_length=600 leaves no room .* context of 512 tokens"):
        fit(of("ppo", basic__max_length=1000, rl__max_completion_length=600), dry_run=True, console=QUIET)
    assert fit(of("ppo", tmp_path / "less", basic__max_length=512, **data), console=QUIET).status == "finished"


@pytest.mark.parametrize("method", REWARDED)
def test_checkpoints_lie_between_batches_of_answers_and_resume_to_the_bit(
    of: Callable[..., TrainParams], tmp_path: Path, method: str
) -> None:
    settings = {"sft__max_steps": 8, "sft__save_steps": 2, "sft__save_total_limit": 9, "rl__num_iterations": 3}
    whole, broken = (of(method, tmp_path / name, **settings) for name in ("whole", "broken"))
    fit(whole, console=QUIET)
    assert {path.name for path in Path(whole.output_dir).glob("checkpoint-*")} == {
        "checkpoint-3",  # asked for at 2
        "checkpoint-6",  # at 4 and at 6
        "checkpoint-8",  # the last one
    }
    stopped = GracefulStop.on_step_end

    def at_four(self: Any, args: Any, state: Any, *rest: Any, **options: Any) -> None:
        if state.global_step == 4:
            self.requested = True
        stopped(self, args, state, *rest, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GracefulStop, "on_step_end", at_four)
        result = fit(broken, console=QUIET)
    assert (result.status, result.global_step) == ("interrupted", 6)
    said = StringIO()
    fit(broken, resume="latest", console=Console(file=said, width=180))
    assert "sampled anew" not in said.getvalue()
    assert figures(broken) == figures(whole)
    first, second = adapter(whole), adapter(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)

    longer = of(method, tmp_path / "whole", **{**settings, "sft__max_steps": 9})
    fit(longer, resume="latest", console=Console(file=said, width=180))
    assert "step 8 lies inside the 3 passes over one batch of answers: the batch is sampled anew" in said.getvalue()


@pytest.mark.parametrize("method", REWARDED)
def test_prompts_need_no_caption_where_no_reward_reads_one(
    of: Callable[..., TrainParams], tmp_path: Path, method: str
) -> None:
    for split, count in (("train", 16), ("validation", 4)):
        rows = [{"title": f"{split} {i}", "prompt": f"Write {i} as JSON.", "language": "en"} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    params = of(method, data__data=str(tmp_path), data__languages=("en",), rl__rewards=("json",), sft__max_steps=2)
    assert fit(params, console=QUIET).status == "finished"
    with pytest.raises(UserError, match=r"caption"):
        fit(of(method, tmp_path / "other", data__data=str(tmp_path), data__languages=("en",)), console=QUIET)


def test_a_method_changed_on_resume_is_refused(of: Callable[..., TrainParams]) -> None:
    fit(of("dpo", sft__max_steps=3), console=QUIET)
    with pytest.raises(UserError, match="method: 'dpo' -> 'orpo'"):
        fit(of("orpo", sft__max_steps=5), resume="latest", console=QUIET)


def test_rows_without_a_rejected_answer_are_refused(of: Callable[..., TrainParams], captions_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'chosen'|no column 'rejected'"):
        fit(of("dpo", data__data=str(captions_dir)), console=QUIET)


def test_too_few_prompts_for_a_step_of_grpo_are_told(of: Callable[..., TrainParams]) -> None:
    params = of("grpo", sft__gradient_accumulation_steps=50)
    with pytest.raises(UserError, match=r"an optimizer step has 50 prompts .* only 40 rows are left"):
        fit(params, console=QUIET)


@pytest.mark.parametrize("change", [{"lora__init": "pissa"}, {"lora__bias": "all"}])
def test_what_changes_the_base_is_refused_where_it_is_the_reference(
    of: Callable[..., TrainParams], change: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=r"turning the adapters off, and lora\.\w+=\w+ changes weights of the base"):
        fit(of("dpo", **change), console=QUIET)


def test_long_preferences_are_dropped_by_their_longer_side(
    of: Callable[..., TrainParams], tmp_path: Path, preferences: Path
) -> None:
    rows = [{"chosen": "x", "rejected": "y" * (90 if i == 3 else 2), "title": f"t{i}"} for i in range(12)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({**row, "language": "en"}) + "\n" for row in rows), encoding="utf-8")
    long = {"data__data": str(file), "data__languages": ("en",), "basic__max_length": 128, "data__eval_fraction": 0.0}
    with pytest.raises(UserError, match=r"1 row \(.*line 4.*would have more than basic\.max_length=128 tokens"):
        fit(of("dpo", **long), dry_run=True, console=QUIET)
    said = StringIO()
    fit(of("dpo", sft__over_length="drop", **long), dry_run=True, console=Console(file=said, width=160))
    assert "left out: 1 longer than 128 tokens" in said.getvalue()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_stops_the_run(
    of: Callable[..., TrainParams], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method_trainer = {
        "dpo": "DPORunTrainer",
        "orpo": "ORPORunTrainer",
        "grpo": "GRPORunTrainer",
        "ppo": "PPORunTrainer",
    }[method]
    trainer = getattr(import_module(f"inft.training.methods.{method}"), method_trainer)
    compute = trainer.compute_loss

    def poisoned(self: Any, *args: Any, **options: Any) -> Any:
        return compute(self, *args, **options) * (math.nan if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    params = of(method, sft__save_steps=1)
    with pytest.raises(UserError, match=r"step 3: the loss is nan; .* The last good checkpoint is .*checkpoint-2"):
        fit(params, console=QUIET)
