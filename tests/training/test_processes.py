"""Runs in two real processes, started by torchrun and joined by gloo."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from inft.training.plan import count_steps
from inft.training.resume import checkpoints, damage
from inft.training.run import fit
from inft.training.runlog import read_events
from params import CraftParams, TrainParams, UserError
from params.resolve import dump_yaml

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}

# Runs one job after the other in the same two processes, since starting them takes longer than training here.
WORKER = """
import dataclasses, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rich.console import Console
from safetensors.torch import save_file
from inft.training import prepare, run
from inft.training.trainer import CaptionTrainer
from params import UserError
from params.resolve import load_params

rank, trainers, seen = int(os.environ["RANK"]), [], []
begin, step, load = CaptionTrainer.__init__, CaptionTrainer.training_step, prepare.load_samples

def without_every_other_image(config, **options):
    loaded = load(config, **options)
    if job.get("do") != "mix":
        return loaded
    train = [dataclasses.replace(row, image=None) if i % 2 else row for i, row in enumerate(loaded.train)]
    return dataclasses.replace(loaded, train=train)

def remember(self, **options):
    begin(self, **options)
    trainers.append(self)

def poisoned(self, model, inputs, items=None):
    seen.append("pixel_values" in inputs)
    if job.get("at") == self.state.global_step and rank == 1:
        if job["do"] == "nan":
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).fill_(float("nan"))
        elif job["do"] == "mistake":
            raise UserError("row 7 cannot be read")
        else:
            os.kill(os.getppid() if job["do"] == "stop" else os.getpid(), int(job["signal"]))
            job.pop("at")
    return step(self, model, inputs, items)

CaptionTrainer.__init__, CaptionTrainer.training_step = remember, poisoned
prepare.load_samples = without_every_other_image
for job in json.loads(Path(sys.argv[1]).read_text()):
    seen.clear()
    try:
        result = run.fit(load_params(Path(job["params"])), resume=job.get("resume"), dry_run=job.get("dry", False))
        said = result.status
    except UserError as error:
        if job.get("do") == "mistake":
            from inft.training.processes import wait_for_main
            wait_for_main()
            raise
        said = f"UserError: {error}"
    weights = {n: p.detach().clone() for n, p in trainers[-1].model.named_parameters() if p.requires_grad}
    save_file(weights, f"{job['params']}.rank{rank}.safetensors")
    Path(f"{job['params']}.rank{rank}.said").write_text(said)
    Path(f"{job['params']}.rank{rank}.images").write_text(json.dumps(seen))
"""


@dataclass
class Ended:
    """How a torchrun ended."""

    out: str
    err: str
    seconds: float

    def messages(self, start: str = "error:") -> list[str]:
        return [line for line in (self.out + self.err).splitlines() if line.startswith(start)]


def torchrun(*command: str) -> Ended:
    """Two processes; standard output and error of all of them, and of torchrun."""
    began = time.monotonic()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    done = subprocess.run(launch, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    return Ended(out=done.stdout, err=done.stderr, seconds=time.monotonic() - began)


def work(root: Path, *jobs: dict[str, Any]) -> Ended:
    (root / "worker.py").write_text(WORKER)
    (root / "jobs.json").write_text(json.dumps(jobs))
    return torchrun(str(root / "worker.py"), str(root / "jobs.json"))


def job(root: Path, name: str, params: TrainParams, **more: Any) -> dict[str, Any]:
    file = root / f"{name}.yaml"
    file.write_text(dump_yaml(params))
    return {"params": str(file), **more}


def events(params: TrainParams, kind: str) -> list[dict[str, Any]]:
    log = Path(params.basic.logs_dir) / f"trainer_{params.task}.jsonl"
    return [event for event in read_events(log) if event["event"] == kind]


def by_step(params: TrainParams, kind: str) -> dict[int, set[tuple[str, ...]]]:
    keys = ("loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "languages", "tokens")
    found: dict[int, set[tuple[str, ...]]] = {}
    for event in events(params, kind):
        found.setdefault(event["step"], set()).add(tuple(str(event.get(key)) for key in keys))
    return found


@dataclass
class Runs:
    """What the runs in two processes left behind."""

    root: Path
    whole: TrainParams
    broken: TrainParams
    halved: TrainParams
    pictures: TrainParams
    ends: dict[str, Ended]

    def said(self, name: str) -> list[str]:
        return [(self.root / f"{name}.yaml.rank{rank}.said").read_text() for rank in (0, 1)]

    def weights(self, name: str) -> list[dict[str, torch.Tensor]]:
        return [load_file(self.root / f"{name}.yaml.rank{rank}.safetensors") for rank in (0, 1)]


def pictures_of(root: Path) -> Path:
    """Ten pictures with a caption; the worker takes every other one away."""
    from PIL import Image

    data = root / "data"
    data.mkdir()
    rows = []
    for number in range(10):
        Image.new("RGB", (64, 48), (20 * number, 90, 30)).save(data / f"{number}.png")
        image = {"image": f"{number}.png", "title": f"t{number}", "content": "news"}
        rows.append({**image, "caption": f"a red disc, {number} of ten", "language": "en"})
    for split, part in (("train", rows[:8]), ("validation", rows[8:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, params_below: Make) -> Runs:
    root = tmp_path_factory.mktemp("processes")

    def text(name: str, **changes: Any) -> TrainParams:
        settings = {"sft__max_steps": 10, "sft__save_steps": 3, "sft__logging_steps": 2, "sft__eval_steps": 4}
        return params_below(root / name, **{**settings, **changes})

    exact = {"lora__dropout": 0.0, "sft__gradient_accumulation_steps": 1, "sft__logging_steps": 1}
    whole, broken, halved = text("whole"), text("broken"), text("halved", **exact)
    failing = text("failing")
    pictures = text(
        "pictures",
        model_name="",
        processor_name="",
        data__data=str(pictures_of(root)),
        data__languages=("en",),
        sft__max_steps=4,
        sft__per_device_train_batch_size=1,
        sft__gradient_accumulation_steps=1,
        basic__max_length=512,
    )
    pictures = dataclasses.replace(pictures, model="llama32")
    contrasted = dataclasses.replace(
        pictures,
        output_dir=str(root / "contrasted" / "run"),
        best_model_dir=str(root / "contrasted" / "run" / "best"),
        task="contrasted",
        craft=CraftParams(enabled=True, learnable_temperature=True),
    )
    ends = {
        "stopped": work(root, job(root, "broken", broken, do="stop", at=4, signal=signal.SIGTERM)),
        "killed": work(root, job(root, "broken", broken, resume="latest", do="kill", at=8, signal=signal.SIGKILL)),
        "all": work(
            root,
            job(root, "broken", broken, resume="latest"),
            job(root, "whole", whole),
            job(root, "halved", halved),
            job(root, "pictures", pictures, do="mix"),
            job(root, "contrasted", contrasted, do="mix"),
            job(root, "again", whole),
            job(root, "nan", text("nan"), do="nan", at=5),
            job(root, "failing", failing, do="mistake", at=5),
        ),
    }
    return Runs(root=root, whole=whole, broken=broken, halved=halved, pictures=pictures, ends=ends)


def test_replicas_are_identical_after_ten_steps(runs: Runs) -> None:
    assert runs.said("whole") == ["finished", "finished"], runs.ends["all"].err
    first, second = runs.weights("whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(weights.any() for name, weights in first.items() if "lora_B" in name)


def test_two_processes_train_as_one_that_accumulates_twice_as_much_and_evaluate_the_same(
    runs: Runs, params_below: Make
) -> None:
    same = {"lora__dropout": 0.0, "sft__gradient_accumulation_steps": 2, "sft__logging_steps": 1}
    steps = {"sft__max_steps": 10, "sft__save_steps": 3, "sft__eval_steps": 4}
    one = params_below(runs.root / "one", **same, **steps)
    fit(one, console=QUIET)
    for kind in ("log", "eval"):
        alone, shared = events(one, kind), events(runs.halved, kind)
        assert [event["step"] for event in alone] == [event["step"] for event in shared]
        assert [event["loss"] for event in shared] == pytest.approx([event["loss"] for event in alone], rel=1e-5)
    for before, now in zip(events(one, "eval"), events(runs.halved, "eval"), strict=True):
        assert before["tokens"] == now["tokens"]
        assert now["languages"] == pytest.approx(before["languages"], rel=1e-5)


def test_a_run_stopped_and_killed_in_two_processes_has_the_losses_of_a_whole_one_to_the_bit(runs: Runs) -> None:
    assert runs.said("broken") == ["finished", "finished"], runs.ends["all"].err
    assert [event["resumed_from_step"] for event in events(runs.broken, "run_start")] == [None, 5, 6]
    assert events(runs.broken, "run_end")[0]["status"] == "interrupted"
    assert by_step(runs.broken, "log") == by_step(runs.whole, "log")
    assert by_step(runs.broken, "eval") == by_step(runs.whole, "eval")
    assert events(runs.broken, "run_end")[-1]["train_loss"] == events(runs.whole, "run_end")[-1]["train_loss"]
    whole, broken = runs.weights("whole")[1], runs.weights("broken")[1]
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_killed_process_ends_the_run_with_a_message(runs: Runs) -> None:
    (error,) = events(runs.broken, "error")
    assert "another process of this run has ended without a word" in error["message"]


def test_a_stopped_run_is_saved_once_and_says_how_to_go_on(runs: Runs) -> None:
    ended = runs.ends["stopped"]
    assert len(ended.messages("Stopping:")) == 1
    assert ended.messages("  torchrun --nproc-per-node 2 -m inft train text --config")
    (line,) = ended.messages("stopped after step")
    assert "step 5" in line


def test_every_process_keeps_its_random_state_in_every_checkpoint(runs: Runs) -> None:
    for _, path in checkpoints(Path(runs.whole.output_dir)):
        assert damage(path) is None
        states = [torch.load(path / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
        assert not torch.equal(*states)


def test_the_first_process_alone_talks_and_writes(runs: Runs) -> None:
    out = runs.ends["all"].out
    assert out.count("8 rows a step (4 × 1 accumulated × 2 processes)") == 1
    assert out.count("2 processes of 1 CPU thread") == 7  # jobs, but for the one that was refused
    starts = events(runs.whole, "run_start")
    assert [event["hardware"]["processes"] for event in starts] == [2]
    assert not list(Path(runs.whole.output_dir).glob(".*"))


def test_images_in_one_process_and_none_in_the_other_do_not_hang(runs: Runs) -> None:
    assert runs.said("pictures") == ["finished", "finished"], runs.ends["all"].err
    images = [json.loads((runs.root / f"pictures.yaml.rank{rank}.images").read_text()) for rank in (0, 1)]
    assert any(here != there for here, there in zip(*images, strict=True))
    first, second = runs.weights("pictures")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(weights.any() for name, weights in first.items() if "cross_attn" in name and "lora_B" in name)


def test_images_in_one_process_and_none_in_the_other_are_negatives_of_each_other(runs: Runs) -> None:
    assert runs.said("contrasted") == ["finished", "finished"], runs.ends["all"].err
    images = [json.loads((runs.root / f"contrasted.yaml.rank{rank}.images").read_text()) for rank in (0, 1)]
    assert any(here != there for here, there in zip(*images, strict=True))
    first, second = runs.weights("contrasted")
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = events(run_of(runs, "contrasted"), "log")
    # Two rows a step, one in each process: without negatives across them the loss would be 0.
    assert logs
    assert all(log["loss/craft_contrast"] > 0 for log in logs)


def test_what_the_first_process_finds_wrong_is_raised_in_all(runs: Runs) -> None:
    first, second = runs.said("again")
    assert first == second
    assert "holds another run" in first


def test_a_loss_that_is_not_finite_in_one_process_stops_all_at_the_same_step(runs: Runs) -> None:
    for said in runs.said("nan"):
        assert said.startswith("UserError: step 6: the loss is nan"), said


def test_a_mistake_that_one_process_meets_is_one_message_and_ends_all_with_status_2(runs: Runs) -> None:
    ended = runs.ends["all"]
    assert ended.messages() == ["error: row 7 cannot be read"], ended.err
    assert "exitcode  : 2" in ended.err
    (error,) = events(run_of(runs, "failing"), "error")
    assert (error["message"], error["process"]) == ("row 7 cannot be read", 1)


def run_of(runs: Runs, name: str) -> TrainParams:
    from params.resolve import load_params

    return load_params(runs.root / f"{name}.yaml")


def test_a_mistake_on_the_command_line_is_told_once(tmp_path: Path) -> None:
    ended = torchrun("-m", "inft", "train", "text", "--data", str(tmp_path / "nowhere"))
    assert len(ended.messages()) == 1, ended.err
    assert "exitcode  : 2" in ended.err
    assert "UserError" not in ended.err


def test_a_resume_in_another_number_of_processes_is_refused(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"saved by 2 processes and this run has 1.*torchrun --nproc-per-node 2"):
        fit(runs.whole, resume="latest", console=QUIET)


def test_a_world_size_without_a_launcher_is_an_error(make_params: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"but not RANK, LOCAL_RANK.*torchrun --nproc-per-node N"):
        fit(make_params(), console=QUIET)


@pytest.mark.parametrize(("rows", "processes", "steps"), [(40, 2, 3), (41, 2, 3), (3, 2, 1), (49, 3, 3)])
def test_steps_of_several_processes_take_their_rows_together(
    make_params: Make, rows: int, processes: int, steps: int
) -> None:
    counted = count_steps(make_params(sft__max_steps=None), rows, processes=processes)
    assert (counted.per_epoch, counted.effective_batch) == (steps, 8 * processes)
