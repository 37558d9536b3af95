"""Methods in two processes: the replicas stay equal, and held-out figures are those of all rows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_scores import log_probs, tuned
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from inft.data.batches import load_samples
from inft.evaluation.generate import generate_captions
from inft.models.preferences import sides
from inft.rewards.functions import length
from inft.training.runlog import read_events
from params import TrainParams
from params.resolve import dump_yaml

METHODS = ("dpo", "orpo", "grpo", "ppo")

# One method after the other in the same two processes, since starting them takes longer than training here.
WORKER = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rich.console import Console
from safetensors.torch import save_file
from inft.training import runtrainer
from inft.training.run import fit
from inft.training.runtrainer import RunTrainer
from params.resolve import load_params

trainers, begin = [], RunTrainer.__init__
write = runtrainer.save_adapter

def counted(model, directory):
    with open(f"{file}.writers", "a") as writers:
        writers.write(os.environ["RANK"])
    write(model, directory)

runtrainer.save_adapter = counted

def remember(self, **options):
    begin(self, **options)
    trainers.append(self)

RunTrainer.__init__ = remember
for file in sys.argv[1:]:
    fit(load_params(Path(file)), console=Console(quiet=True))
    weights = {n: p.detach().clone() for n, p in trainers[-1].model.named_parameters() if p.requires_grad}
    save_file(weights, f"{file}.rank{os.environ['RANK']}")
"""


@pytest.fixture
def runs(tmp_path: Path, make_params: Callable[..., TrainParams]) -> dict[str, TrainParams]:
    """The parameters of a short run of each method, with an odd number of rows."""
    for split, count in (("train", 22), ("validation", 7)):
        rows = [
            {"title": f"{split} {i}", "content": "abc", "chosen": "xy" * (i % 4 + 1), "rejected": "z" * (i % 3 + 1)}
            for i in range(count)
        ]
        text = "".join(json.dumps({**row, "caption": row["chosen"], "language": "en"}) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    made = {}
    for method in METHODS:
        own: dict[str, Any] = {"data__data": str(tmp_path), "data__languages": ("en",), "method": method}
        if method in ("grpo", "ppo"):
            own |= {"sft__best_metric": "reward", "rl__max_completion_length": 5, "rl__num_generations": 4}
            own |= {"rl__rewards": ("length",), "rl__kl_coef": 0.05}
        steps = {"sft__max_steps": 3, "sft__eval_steps": 3, "sft__gradient_accumulation_steps": 1}
        made[method] = make_params(tmp_path / method, **own, **steps, lora__dropout=0.0)
        (tmp_path / f"{method}.yaml").write_text(dump_yaml(made[method]))
    return made


def test_replicas_stay_equal_and_evaluate_every_row_once(tmp_path: Path, runs: dict[str, TrainParams]) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    files = [str(tmp_path / f"{method}.yaml") for method in METHODS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*launch, str(tmp_path / "worker.py"), *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for method, params in runs.items():
        first, second = (load_file(tmp_path / f"{method}.yaml.rank{rank}") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first), method
        assert any(weight.any() for name, weight in first.items() if "lora_B" in name), method
        assert (tmp_path / f"{method}.yaml.writers").read_text() == "0", method  # of checkpoint-3
        log = read_events(Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl")
        (told,) = [event for event in log if event["event"] == "eval"]
        assert told["step"] == 3
        if method == "dpo":
            assert told["loss"] == pytest.approx(_loss_of_dpo(params), rel=1e-4)
        elif method in ("grpo", "ppo"):
            assert told["reward"] == pytest.approx(_reward(params))


def _loss_of_dpo(params: TrainParams) -> float:
    """The mean over the held-out rows, one by one."""
    base, model, collator = tuned(params)
    heldout = load_samples(params.data, quarantine_file=None, with_images=False, kind="preferences").heldout
    assert len(heldout) == 7
    losses = []
    for row in heldout:
        chosen, rejected = (log_probs(model, collator, s)[0] - log_probs(base, collator, s)[0] for s in sides(row))
        losses.append(-float(logsigmoid(torch.tensor(0.1 * (chosen - rejected)))))
    return sum(losses) / len(losses)


def _reward(params: TrainParams) -> float:
    """The mean reward of greedy answers to the held-out rows, one by one."""
    _, model, collator = tuned(params)
    heldout = load_samples(params.data, quarantine_file=None, with_images=False).heldout
    answers = generate_captions(model, collator, heldout, max_new_tokens=5, batch_size=1)
    values = length(answers, references=[sample.answer for sample in heldout])
    return sum(values) / len(values)
