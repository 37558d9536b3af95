"""Two processes train one policy: same replicas, own prompts, figures and whitening over both."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import letters

SCRIPT = Path(__file__).with_name("ppo_two_processes.py")
RUNS = ["plain", "self_align", "paired_dataset"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    """What ppo_two_processes.py saw; one launch serves every test."""
    out = tmp_path_factory.mktemp("ppo_processes")
    tokenizer.save_pretrained(out / "tokenizer")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    run = subprocess.run(
        [*launch, str(SCRIPT), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    seen: dict[str, Any] = json.loads((out / "found.json").read_text(encoding="utf-8"))
    return seen


@pytest.mark.parametrize("run", RUNS)
def test_replicas_stay_equal_and_the_value_head_is_trained(found, run):
    assert found[run]["identical"]
    assert found[run]["value"] > 0


@pytest.mark.parametrize("run", RUNS)
def test_each_process_completes_prompts_of_its_own(found, run):
    numbers = [[n for rows, _ in rollouts for n in rows] for rollouts in found[run]["rollouts"]]
    assert not set(numbers[0][:16]) & set(numbers[1][:16])
    assert sorted(numbers[0][:16] + numbers[1][:16]) == list(range(32))
    first, second = (rollouts[0][1] for rollouts in found[run]["rollouts"])
    assert first != second


def test_both_processes_log_and_evaluate_the_same_figures_over_both(found):
    for run in RUNS:
        first, second = found[run]["logs"]
        assert [{k: v for k, v in entry.items() if k not in ("grad_norm",)} for entry in first] == [
            {k: v for k, v in entry.items() if k not in ("grad_norm",)} for entry in second
        ]
        rewards = [reward for rollouts in found[run]["rollouts"] for reward in letters(rollouts[0][1])]
        assert first[0]["reward"] == pytest.approx(statistics.fmean(rewards))
        assert first[0]["reward_std"] == pytest.approx(statistics.pstdev(rewards))
        if run == "plain":  # the loss is the mean over the tokens of both
            own = first[0]["policy_loss"] + 0.1 * first[0]["value_loss"]
            assert first[0]["loss"] == pytest.approx(own, abs=1e-5)
        assert found[run]["evaluated"][0] == found[run]["evaluated"][1]


def test_one_prompt_is_completed_differently_by_each_process(found):
    first, second = (rollouts[0] for rollouts in found["one prompt"]["rollouts"])
    assert first[0] == second[0] == [0] * 8
    assert first[1] != second[1]


def test_whitening_is_over_the_tokens_of_both(found):
    tokens = [value for part in found["whitened"]["x"] for value in part]
    mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens)
    white = [value for part in found["whitened"]["white"] for value in part]
    assert white == pytest.approx([(value - mean) / deviation for value in tokens])
