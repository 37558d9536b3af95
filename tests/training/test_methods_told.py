"""What a user is told of rewards, lengths and rows that a method cannot train on, and where checkpoints lie."""

import json
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import METHODS, QUIET, REWARDED, adapter, events, figures
from rich.console import Console

from inft.models.collate import CaptionCollator
from inft.training.callbacks import GracefulStop
from inft.training.run import fit
from params import TrainParams, UserError


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
