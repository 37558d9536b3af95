"""Two processes train one model: same replicas, own rows, negatives across ranks, one all-reduce."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    """What two_processes.py saw; one launch serves every test."""
    out = tmp_path_factory.mktemp("processes")
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


@pytest.mark.parametrize("strategy", ["pairs", "self_align"])
def test_replicas_are_identical_after_ten_steps(found, strategy):
    # failure 8: replicas diverged
    assert found[strategy]["steps"] == 10
    assert found[strategy]["identical"]


@pytest.mark.parametrize("kind", ["sft", "craft"])
def test_each_rank_has_rows_of_its_own(found, kind):
    # failure 8: both ranks saw the same contrastive rows
    first, second = ({tuple(row) for row in seen[kind][:10]} for seen in found["pairs"]["seen"])
    assert len(first) == len(second) == 10
    assert not first & second


def test_both_ranks_log_the_same_figures(found):
    for strategy in ("pairs", "self_align"):
        first, second = found[strategy]["logs"]
        assert len(first) == 2
        assert first == second
        assert "loss/craft_contrast" in first[0]


@pytest.mark.parametrize(
    "case",
    ["exact pairs", "exact pairs, symmetric, GradCache", "exact self_align", "exact single steps"],
)
def test_the_gradient_is_that_of_one_process_with_all_negatives(found, case):
    assert found[case] <= 5e-7


@pytest.mark.parametrize("case", ["reduces", "reduces with GradCache"])
def test_gradients_are_reduced_once_a_step_and_never_by_ddp(found, case):
    assert found[case]["craft"]
    assert set(found[case]["craft"]) == set(found[case]["sft"]) == {1}
    assert found[case]["ddp"] == [0]
