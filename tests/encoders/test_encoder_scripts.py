"""The commands of the guide, with small local data in place of the hub's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from encoder_data import sentences
from encoder_runs import TINY, write_data

ROOT = Path(__file__).parents[2]
CONFIG = "configs/pretraining/pretrain_neobert.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("scripts"))


def small(place: Path, **changed: object) -> list[str]:
    """Arguments that make a configuration that ships a tiny run."""
    values = {
        **{key: value for key, value in TINY.items() if not key.startswith("dataset.language")},
        "tokenizer.name": place / "tokenizer",
        "trainer.logs_dir": place / "logs",
        "trainer.torch_compile": "false",
        "dataset.num_workers": 0,
        **{key.replace("__", "."): value for key, value in changed.items()},
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def script(name: str, *arguments: object, cwd: Path) -> str:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_basic_launch_overridden_knobs_and_resume(place, tmp_path):
    told = small(
        place, dataset__path=place / "data", trainer__output_dir=tmp_path / "run", dataset__eval_samples="none"
    )
    script("pretraining/pretrain.py", CONFIG, *told, "--trainer.gradient_accumulation_steps", 2, cwd=tmp_path)
    assert (tmp_path / "run/model_checkpoints/6/model.safetensors").is_file()
    out = script(
        "pretraining/pretrain.py",
        CONFIG,
        *told,
        *("--trainer.gradient_accumulation_steps", 2),
        *("--trainer.resume_from_checkpoint", "latest"),
        cwd=tmp_path,
    )
    assert "resuming from" in out
    longer = ("--trainer.max_steps", 2, "--dataset.max_seq_length", 64)
    script("pretraining/longer_seq.py", tmp_path / "run", *longer, cwd=tmp_path)
    assert (tmp_path / "run_longer/model_checkpoints/2/model.safetensors").is_file()


def test_offline_preprocessing_and_training_on_what_it_wrote(place, tmp_path):
    told = small(place, dataset__path=place / "data", dataset__eval_samples="none", dataset__streaming="false")
    script("pretraining/preprocess.py", CONFIG, *told, "-o", tmp_path / "tokens", cwd=tmp_path)
    told[told.index("--dataset.path") + 1] = str(tmp_path / "tokens")
    script("pretraining/pretrain.py", CONFIG, *told, "--trainer.output_dir", tmp_path / "run", cwd=tmp_path)
    assert (tmp_path / "run/model_checkpoints/6").is_dir()


def test_the_standalone_tokenizer_writes_the_same_kind_of_data(place, tmp_path):
    script(
        "pretraining/tokenize_dataset.py",
        *("--dataset", place / "data", "--output", tmp_path / "tokens", "--tokenizer", place / "tokenizer"),
        *("--max-length", 32),
        cwd=tmp_path,
    )
    told = small(
        place,
        dataset__path=tmp_path / "tokens",
        dataset__eval_samples="none",
        dataset__streaming="false",
        trainer__output_dir=tmp_path / "run",
    )
    script("pretraining/pretrain.py", CONFIG, *told, cwd=tmp_path)
    assert (tmp_path / "run/model_checkpoints/6").is_dir()


def test_contrastive_preprocessing_and_fine_tuning(place, tmp_path):
    texts = sentences(40, seed=3)
    rows = [{"query": text, "pos": [text + " x"], "neg": [texts[i - 1]]} for i, text in enumerate(texts)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    run = small(
        place, dataset__path=place / "data", trainer__output_dir=tmp_path / "base", dataset__eval_samples="none"
    )
    script("pretraining/pretrain.py", CONFIG, *run, cwd=tmp_path)
    config = "configs/contrastive/contrastive_neobert.yaml"
    told = {
        "model.name": tmp_path / "base/model_checkpoints/6",
        "tokenizer.name": place / "tokenizer",
        "dataset.max_seq_length": 32,
        "dataset.eval_samples": 8,
        "trainer.mixed_precision": "no",
        "trainer.max_steps": 3,
        "scheduler.warmup_steps": 0,
        "trainer.per_device_train_batch_size": 8,
        "trainer.output_dir": tmp_path / "run",
        "trainer.logs_dir": tmp_path / "logs",
    }
    arguments = [text for key, value in told.items() for text in (f"--{key}", str(value))]
    script(
        "contrastive/preprocess.py",
        config,
        *arguments,
        "--dataset.path",
        pairs,
        "-o",
        tmp_path / "tokens",
        cwd=tmp_path,
    )
    script("contrastive/finetune.py", config, *arguments, "--dataset.path", tmp_path / "tokens", cwd=tmp_path)
    assert (tmp_path / "run/model_checkpoints/3/model.safetensors").is_file()


def test_a_user_s_mistake_is_a_message_and_status_2(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/pretraining/pretrain.py"), CONFIG, "--trainer.max_step", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "did you mean trainer.max_steps" in run.stderr
    assert "Traceback" not in run.stderr
