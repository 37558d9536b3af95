"""An encoder's run in two real processes, started by torchrun and joined by gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from encoder_data import sentences, write_jsonl
from encoder_runs import command_line, events, losses, run_tiny, write_data
from safetensors.torch import load_file

from inft.encoders.checkpoints import STATES
from params.errors import UserError

TOLD = {"datacollator__pack_sequences": True, "scheduler__decay_steps": 6, "model__dropout_prob": 0.1}


def torchrun(directory: Path, **changed: object) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    inft = command_line(directory, **changed)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *inft], capture_output=True, text=True, env=environment, timeout=180, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_data(tmp_path_factory.mktemp("processes"))
    texts = sentences(1200, seed=7)  # several blocks, so that each process has its own
    write_jsonl(directory / "data" / "train-2.jsonl", texts, language=["en"] * len(texts))
    whole = torchrun(directory, trainer__run_name="whole", trainer__output_dir=str(directory / "whole"), **TOLD)
    assert whole.returncode == 0, whole.stderr
    first = torchrun(directory, trainer__max_steps=3, **TOLD)
    assert first.returncode == 0, first.stderr
    second = torchrun(directory, trainer__resume_from_checkpoint="latest", **TOLD)
    assert second.returncode == 0, second.stderr
    return directory


def test_two_processes_resume_with_equal_losses(place):
    assert losses(place) == losses(place, "whole")
    assert [e["loss"] for e in events(place, "eval")][-1] == [e["loss"] for e in events(place, "eval", "whole")][-1]


def test_one_process_speaks_and_each_has_its_place_in_the_data(place):
    assert len(events(place, "run_start", "whole")) == 1
    checkpoint = place / "whole" / STATES / "6"
    assert json.loads((checkpoint / "run.json").read_text())["processes"] == 2
    assert {path.name for path in checkpoint.iterdir()} >= {"data_0", "data_1", "random_0.safetensors"}
    states = [load_file(checkpoint / f"random_{rank}.safetensors")["cpu"] for rank in (0, 1)]
    assert len(states[0]) == len(states[1])


def test_the_heldout_figures_are_those_of_one_process(place):
    run_tiny(place, trainer__run_name="alone", trainer__output_dir=str(place / "alone"), trainer__max_steps=1)
    alone, both = (events(place, "eval", name)[0] for name in ("alone", "whole"))
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert both["tokens"] == alone["tokens"]


def test_another_number_of_processes_is_refused(place):
    told = {"trainer__output_dir": str(place / "whole"), "trainer__run_name": "other"}
    with pytest.raises(UserError, match="processes: 2 -> 1"):
        run_tiny(place, trainer__resume_from_checkpoint="latest", **told, **TOLD)


def test_a_mistake_is_told_once(place, tmp_path):
    ended = torchrun(place, trainer__output_dir=str(place / "run"), **TOLD)
    assert ended.returncode != 0
    assert ended.stderr.count("holds another run") == 1
    assert "Traceback" not in ended.stderr.split("torch/distributed")[0]
