"""`inft train` from the command line to the files it leaves, on the embedded text model."""

import json
import os
import subprocess
import sys

import pytest

from params.resolve import load_params

EVERY_STEP = [f"--set=sft.{name}_steps=1" for name in ("eval", "save", "logging")]
COMMAND = ["train", "text", "--demo", "--languages", "ur", "--max-rows-per-lang", "24", "--max-steps", "2", *EVERY_STEP]
COMMAND += ["--set", "sft.per_device_train_batch_size=4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def captions(here):
    """A data set of its own, so that no captions are generated around the run."""
    row = {"content": "red, circle", "caption": "ایک سرخ دائرہ", "language": "ur"}
    rows = [json.dumps({**row, "title": f"scene {number}"}) for number in range(30)]
    (here / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return ["--data", "train.jsonl"]


def test_a_dry_run_shows_the_plan_and_writes_nothing(inft, here):
    found = inft(*COMMAND, "--dry-run")
    assert found.status == 0, found.err
    for text in ("lr: 0.003", "self-attention", "outputs/text_basic_demo", "every adapter gets a gradient"):
        assert text in found.out
    assert list(here.iterdir()) == []


def test_a_run_leaves_its_parameters_its_adapter_and_its_log_and_is_not_overwritten(inft, here, captions):
    command = [*COMMAND, *captions]
    found = inft(*command)
    assert found.status == 0, found.err
    output = here / "outputs" / "text_basic_demo"
    assert load_params(output / "params.yaml").sft.max_steps == 2
    assert (output / "best" / "adapter_model.safetensors").exists()
    assert "finished" in inft("logs", "show").out
    assert inft("logs", "plot").status == 0

    refused = inft(*command)
    assert refused.status == 2
    assert "--overwrite" in refused.err
    assert "--resume" in refused.err
    assert inft(*command, "--overwrite").status == 0


def test_a_lone_resume_goes_on_from_the_latest_checkpoint(inft, here, captions):
    assert inft(*COMMAND, *captions).status == 0
    found = inft(*COMMAND, *captions, "--max-steps", "4", "--resume")
    assert found.status == 0, found.err
    assert "checkpoint-2" in found.out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--languages", "ur,fr"], "'fr'"),
        (["--model", "absent/dir/model"], "absent/dir/model"),
        (["--set", "basic.attn_impl=fast"], "fast"),
        (["--set", "lora.target_modules=mm_projector"], "mm_projector"),
        (["--resume", "--overwrite"], "contradict"),
    ],
)
def test_a_mistake_ends_the_run_before_it_begins(inft, here, captions, args, complaint):
    found = inft(*COMMAND, *captions, *args)
    assert found.status == 2
    assert "error: " in found.err
    assert complaint in found.err
    assert "Traceback" not in found.err


def test_without_a_hub_the_message_names_the_demo_and_a_local_path(here, captions):
    command = [sys.executable, "-m", "inft", "train", "text", "--languages", "ur", *captions]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "hub")}
    found = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert "--demo" in found.stderr
    assert "--model PATH" in found.stderr
