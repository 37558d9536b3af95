"""Two processes train with joint mode: same replicas, pairs of their own, one objective over both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from joint_trainers import make_joint, preference_rows
from tiny_runs import tiny_llama

SCRIPT = Path(__file__).with_name("joint_processes.py")
RUNS = ["dpo self_align", "dpo pairs", "dpo streamed pairs", "grpo self_align", "grpo pairs", "orpo self_align"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The directory of joint_processes.py after its one launch."""
    out = tmp_path_factory.mktemp("processes")
    tokenizer.save_pretrained(out / "tokenizer")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(SCRIPT), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads((out / "found.json").read_text(encoding="utf-8"))
    return seen


@pytest.mark.parametrize("run", RUNS)
def test_replicas_are_identical_after_five_steps(found, run):
    assert found[run]["identical"]


@pytest.mark.parametrize("run", RUNS)
def test_both_ranks_log_the_same_figures(found, run):
    first, second = found[run]["logs"]
    assert len(first) == 5
    assert first == second
    assert "loss/craft_contrast" in first[0]


@pytest.mark.parametrize("run", ["dpo pairs", "grpo pairs"])
def test_each_rank_contrasts_pairs_of_its_own(found, run):
    first, second = ({tuple(row) for row in rows[:4]} for rows in found[run]["pairs"])
    assert not first & second


def test_a_run_of_two_processes_that_goes_on_ends_as_one_that_never_stopped(found):
    assert found["resumed"] == [True, True]


def test_a_step_of_two_processes_is_that_of_one_with_all_rows(out, found, tmp_path, tokenizer):
    moved = torch.load(out / "moved.pt", weights_only=True)
    trainer = make_joint(
        "dpo",
        tmp_path,
        tokenizer,
        rows=preference_rows(4),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        max_steps=1,
        gradient_accumulation_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
    )
    start = [p.detach().clone() for p in tiny_llama().parameters()]
    trainer.train()
    wanted = torch.cat([(p - q).flatten() for p, q in zip(trainer.model.parameters(), start, strict=True)])
    assert float(wanted.norm()) > 0
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-4  # anchors of both processes, negatives of both
