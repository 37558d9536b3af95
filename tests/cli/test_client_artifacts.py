"""A checkpoint of the training client is used as it was pulled: merged, and captioning."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from inft.client.bases import Bases
from inft.client.checkpoints import write_checkpoint
from inft.client.learner import Learner, prepare
from inft.models import load_spec
from inft.models.loading import EMBEDDED, load_model
from params.basic import BasicParams
from params.client import EngineParams
from params.client_resolve import training_config

LORA = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def refused(*args, **more):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    yield
    torch.set_num_threads(threads)


def artifact(directory: Path, model_ref: str, **engine) -> torch.Tensor:
    """Write a trained client's checkpoint; return its logits."""
    base = Bases(EngineParams(device="cpu", **engine)).get(model_ref)
    config = training_config({"model_ref": model_ref, "lora_config": LORA, "seed": 1})
    learner = Learner(base, "tc-1", config)
    batch = {"prompt": ["Name a colour."], "completion": ["red"]}
    for _ in range(2):
        learner.forward_backward(prepare(base, config, {"batch": batch}))
        learner.optim_step({"learning_rate": 0.02})
    directory.mkdir(parents=True)
    options = {"include_optimizer": True, "include_gradients": False, "info": {}}
    write_checkpoint(directory, learner.state(), base=base, config=learner.config, **options)
    return logits(base.model, base.using(learner.name))


def logits(model, within=None):
    ids = torch.arange(40, 60).reshape(2, 10)
    with torch.no_grad(), within or torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["text", "aya", "llama32"])
def test_an_artifact_of_an_embedded_model_is_merged(inft, tmp_path, family):
    mine = artifact(tmp_path / "art", f"embedded/{family}")
    done = inft("merge", "--adapter", str(tmp_path / "art"), "-o", str(tmp_path / "merged"))
    assert done.status == 0, done.err
    assert f"the embedded {family}" in done.out
    basic = BasicParams(attn_impl="sdpa", dtype="float32")
    merged = logits(load_model(load_spec(family), str(tmp_path / "merged"), basic=basic))
    assert float((merged - mine).abs().max()) < 1e-3
    plain = logits(load_model(load_spec(family), "", basic=basic))
    assert float((plain - mine).abs().max()) > 1e-2


def test_an_artifact_of_aya_captions_an_image(inft, tmp_path):
    artifact(tmp_path / "art", "embedded/aya")
    Image.new("RGB", (64, 40), (200, 0, 0)).save(tmp_path / "x.jpg")
    done = inft("caption", "aya", str(tmp_path / "x.jpg"), "--adapter", str(tmp_path / "art"))
    assert done.status == 0, done.err
    assert done.out
    without = inft("caption", "aya", str(tmp_path / "x.jpg"), "--demo")
    assert done.out != without.out
    wrong = inft("caption", "llama32", str(tmp_path / "x.jpg"), "--adapter", str(tmp_path / "art"))
    assert "of the family aya, not llama32" in wrong.err


def test_the_embedded_models_names_are_known_to_the_commands(inft, tmp_path):
    artifact(tmp_path / "art", "embedded/text")
    done = inft("merge", "--adapter", str(tmp_path / "art"), "--model", "embedded/text", "-o", str(tmp_path / "merged"))
    assert done.status == 0, done.err
    done = inft("merge", "--adapter", str(tmp_path / "art"), "--model", "embedded/aya", "-o", str(tmp_path / "two"))
    assert "is a cohere2_vision model" in done.err or "is a aya_vision model" in done.err, done.err


def test_the_adapters_two_files_alone_name_an_embedded_model_too(inft, tmp_path):
    artifact(tmp_path / "art", "embedded/text")
    (tmp_path / "art" / "state.json").unlink()
    done = inft("merge", "--adapter", str(tmp_path / "art"), "-o", str(tmp_path / "merged"))
    assert done.status == 0, done.err


def test_an_artifact_names_the_directory_that_the_services_name_stands_for(inft, tmp_path, monkeypatch):
    shutil.copytree(EMBEDDED / "text", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    artifact(tmp_path / "art", "small", models={"small": "model"})
    named = json.loads((tmp_path / "art" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "model")
    base = json.loads((tmp_path / "art" / "state.json").read_text())["base"]
    assert (base["name"], base["family"]) == (named, "text")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = inft("merge", "--adapter", str(tmp_path / "art"), "-o", "merged")
    assert done.status == 0, done.err


def test_an_artifact_is_not_put_on_other_weights(inft, tmp_path):
    artifact(tmp_path / "art", "embedded/text")
    other = load_model(load_spec("text"), "", basic=BasicParams(dtype="float32"))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    shutil.copytree(EMBEDDED / "text", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    out = str(tmp_path / "merged")
    done = inft("merge", "--adapter", str(tmp_path / "art"), "--model", str(tmp_path / "other"), "-o", out)
    assert "has other weights" in done.err


def test_a_changed_file_of_an_artifact_is_told(inft, tmp_path):
    artifact(tmp_path / "art", "embedded/text")
    file = tmp_path / "art" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    done = inft("merge", "--adapter", str(tmp_path / "art"), "-o", str(tmp_path / "merged"))
    assert "adapter_model.safetensors is missing or not as state.json says" in done.err
    assert not (tmp_path / "merged").exists()
