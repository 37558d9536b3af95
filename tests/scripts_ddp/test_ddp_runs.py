"""Runs of train_craft.py on the embedded text model: in one process and in two."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import train_craft
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from stratified import quotas
from transformers import AutoModelForCausalLM, AutoTokenizer

from inft.models.loading import EMBEDDED

SCRIPTS = Path(__file__).parents[2] / "scripts" / "ddp"
JOBS = Path(__file__).with_name("ddp_jobs.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRAINING = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3 --logging_steps 2"
PARALLEL = "--languages sin_Sinh urd_Arab --max_contrastive_samples 40"


def command(sources, out, *more, words=()):
    """The flags of a run on the embedded model."""
    flags = ["--model_name_or_path", "", "--sft_data", str(sources["sft"]), "--output_dir", str(out)]
    pairs = ["--sources", *words, *PARALLEL.split()] if words else []
    return [*flags, *TRAINING.split(), *pairs, *" ".join(more).split()]


def weights_of(directory):
    return load_file(directory / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# One process


@pytest.fixture(scope="module")
def trained(sources, source_words, tmp_path_factory):
    """The output directory of four steps on every source."""
    out = tmp_path_factory.mktemp("runs") / "out"
    assert train_craft.main(command(sources, out, "--max_steps 4 --save_steps 2", words=source_words)) == 0
    return out


def test_the_adapter_loads_on_its_base_and_has_learnt(trained):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "text")
    tuned = PeftModel.from_pretrained(model, trained / "adapter")
    ids = AutoTokenizer.from_pretrained(trained / "adapter")("red circle", return_tensors="pt").input_ids
    with torch.no_grad():
        after = tuned(ids).logits
        with tuned.disable_adapter():
            before = tuned(ids).logits
    assert not torch.allclose(before, after)
    assert not any("head" in name or "projector" in name for name in weights_of(trained / "adapter"))
    assert (trained / "checkpoint-4" / "craft_head.safetensors").is_file()


def test_a_finished_run_is_not_written_over(trained, sources, source_words, capsys):
    assert train_craft.main(command(sources, trained, "--max_steps 4", words=source_words)) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rate 0.5", r"learning_rate: 0\.001 -> 0\.5"),
        ("--craft_alpha 0.9", r"craft_alpha: 0\.6 -> 0\.9"),
        ("--lora_r 4", "lora_r: 16 -> 4"),
        ("--max_contrastive_samples 39", "max_pairs: 40 -> 39"),
        ("--seed 1", "seed: 42 -> 1"),
        ("--resume_from_checkpoint nowhere", "there is no such directory. Whole checkpoints: .*checkpoint-4"),
    ],
)
def test_a_run_goes_on_with_the_same_flags_only(trained, sources, source_words, capsys, flags, message):
    argv = command(sources, trained, "--resume_from_checkpoint latest --max_steps 6", flags, words=source_words)
    assert train_craft.main(argv) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_damaged_checkpoint_is_passed_over(trained, sources, source_words, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    weights = out / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    argv = command(sources, out, "--resume_from_checkpoint latest --max_steps 4 --save_steps 2", words=source_words)
    assert train_craft.main(argv) == 0
    assert f"going on from {out / 'checkpoint-2'}" in capsys.readouterr().out
    assert (out / "checkpoint-4" / "inft_checkpoint.json").is_file()


def test_a_dry_run_tells_what_would_be_trained_on_and_writes_nothing(sources, source_words, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_craft.main(command(sources, out, "--dry_run", words=source_words)) == 0
    told = capsys.readouterr().out
    assert not out.exists()
    rows = {tuple(line.split()[:2]): line.split()[2:4] for line in told.splitlines() if len(line.split()) > 3}
    usable, kept = (
        {name: int(counts[place]) for name, counts in rows.items() if name[0] in sources} for place in (0, 1)
    )
    assert usable["flores", "eng_Latn-urd_Arab"] == 25
    assert usable["nllb", "eng_Latn-sin_Sinh"] == usable["all-nli", "eng_Latn"] == 20
    assert {name for name, _ in usable} == sources.keys() - {"sft"}
    assert kept == quotas(usable, 40)
    assert sum(kept.values()) == 40
    assert "contradiction 20, neutral 20" in told
    assert "score below 1.25 20" in told
    assert "no duplicate 30" in told


def test_pairs_are_the_same_whatever_is_trained(trained, sources, source_words, tmp_path):
    argv = command(sources, tmp_path / "out", "--max_steps 1 --craft_preset large_batch", words=source_words)
    assert train_craft.main(argv) == 0
    first, second = (load_from_disk(str(out / "data" / "pairs")).to_list() for out in (trained, tmp_path / "out"))
    assert len(first) == 40
    assert first == second


def test_without_sources_prompts_are_set_against_answers_in_four_bits(sources, tmp_path, capsys):
    assert train_craft.main(command(sources, tmp_path / "out", "--max_steps 2 --use_qlora")) == 0
    told = capsys.readouterr().out
    assert "CRAFT: self_align" in told
    assert "over 4-bit NF4 weights" in told
    assert weights_of(tmp_path / "out" / "adapter")


def test_the_checkpoint_with_the_lowest_held_out_loss_is_saved(sources, tmp_path, jsonl, capsys):
    # The loss of other words rises while those of the SFT rows are learnt.
    held_out = jsonl(tmp_path / "held_out.jsonl", [{"prompt": "Zu:", "completion": " qxj vkw"} for _ in range(4)])
    more = f"--max_steps 6 --save_steps 1 --eval_data {held_out} --learning_rate 0.1 --lr_scheduler_type constant"
    out = tmp_path / "out"
    assert train_craft.main(command(sources, out, more)) == 0
    told = capsys.readouterr().out
    best = re.search(r"saved: .*, of (checkpoint-\d) with the lowest held-out loss, ([\d.]+)", told)
    history = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert len(losses) == 6
    lowest = min(losses, key=losses.get)
    assert lowest < 6
    assert best is not None
    assert best[1] == f"checkpoint-{lowest}"
    assert float(best[2]) == pytest.approx(losses[lowest], abs=1e-4)
    assert same(weights_of(out / "adapter"), weights_of(out / best[1]))


def test_hard_negatives_reach_the_trainer(sources, tmp_path):
    words = [f"all-nli={sources['all-nli']}"]
    flags = ["--hard_negatives", "true", "--max_steps", "1", "--sources", *words]
    assert train_craft.main([*command(sources, tmp_path / "out"), *flags]) == 0
    assert set(load_from_disk(str(tmp_path / "out" / "data" / "pairs")).column_names) == {
        "text",
        "text_tgt",
        "text_neg",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_target_modules", "nothing"], "Target modules {'nothing'} not found"),
        (["--use_qlora", "--use_lora", "false"], "it needs adapters"),
        (["--model_name_or_path", "./nowhere"], "no model directory at ./nowhere"),
        (["--max_length", "1"], "no SFT row is left to train on"),
    ],
)
def test_a_mistake_is_told_and_the_mended_command_runs(sources, tmp_path, capsys, flags, message):
    argv = command(sources, tmp_path / "out", "--max_steps 1")
    assert train_craft.main([*argv, *flags]) == 2
    assert message in capsys.readouterr().err
    assert train_craft.main(argv) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--craft_contrastive_keys", '{"anchor_labels": "mine"}'], "no token in them is marked"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_kwargs` (transformers.optimization, line"),
    ],
)
def test_what_the_trainer_refuses_is_no_traceback(sources, tmp_path, capsys, flags, message):
    assert train_craft.main([*command(sources, tmp_path / "out", "--max_steps 1"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--max_steps 1", "--dry_run"])
@pytest.mark.parametrize("below", ["", "out"])
def test_an_output_directory_that_is_a_file_is_told(sources, tmp_path, capsys, below, flags):
    file = tmp_path / "file"
    file.write_text("kept")
    assert train_craft.main(command(sources, file / below, flags)) == 2
    assert f"{file} is a file. Choose another" in capsys.readouterr().err
    assert file.read_text() == "kept"


# Two processes


@dataclass(frozen=True)
class Processes:
    """What two processes left behind."""

    root: Path
    out: str

    def weights(self, name):
        return [load_file(self.root / f"{name}.rank{rank}.safetensors") for rank in (0, 1)]

    def said(self, name):
        return [(self.root / f"{name}.rank{rank}.said").read_text(encoding="utf-8") for rank in (0, 1)]


def torchrun(*argv):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    path = os.pathsep.join([str(SCRIPTS), *sys.path])
    return subprocess.run(
        launch,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**ENVIRONMENT, "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def processes(sources, source_words, tmp_path_factory):
    """One launch: a whole run, the same interrupted after half, its continuation, and a mistake."""
    root = tmp_path_factory.mktemp("processes")
    more = (
        "--save_steps 3 --lr_scheduler_type constant --craft_negative_strategy queue --craft_negative_queue_size 30 "
        "--craft_learnable_temperature true --craft_gradient_balancing loss_scale --craft_use_gradcache true "
        "--craft_gradcache_chunk_size 1"
    )
    whole, broken = root / "whole", root / "broken"
    jobs = {
        "whole": command(sources, whole, more, "--max_steps 6", words=source_words),
        "half": command(sources, broken, more, "--max_steps 3", words=source_words),
        "rest": command(sources, broken, more, "--max_steps 6 --resume_from_checkpoint latest", words=source_words),
        "mistake": command(sources, whole, more, "--max_steps 6 --seed 1 --resume_from_checkpoint latest"),
    }
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = torchrun(str(JOBS), str(root))
    assert done.returncode == 0, done.stderr[-4000:]
    return Processes(root=root, out=done.stdout)


def test_both_processes_hold_the_same_weights(processes):
    first, second = processes.weights("whole")
    assert same(first, second)
    assert any("head" in name for name in first)
    assert "2 processes x 2 micro-batches x 2 rows" in processes.out


def test_a_resumed_run_equals_an_uninterrupted_one(processes):
    whole, half, rest = (processes.weights(name)[0] for name in ("whole", "half", "rest"))
    assert same(whole, rest)
    assert not same(whole, half)
    assert same(*(weights_of(processes.root / name / "adapter") for name in ("whole", "broken")))


def test_the_first_process_alone_tells_of_a_run(processes):
    assert processes.out.count("SFT rows: 40") == 2  # of the whole run and the half: the rest reads what was written
    assert processes.out.count("saved: ") == 3


def test_a_mistake_of_the_data_is_known_to_both_processes(processes):
    first, second = processes.said("mistake")
    assert first == second
    assert "the data of the run to go on with was another" in first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [("--craft_alhpa 1", "did you mean '--craft_alpha'"), ("--max_length 1", "no SFT row is left to train on")],
)
def test_a_mistake_in_two_processes_is_told_once(sources, tmp_path, flags, message):
    done = torchrun(str(SCRIPTS / "train_craft.py"), *command(sources, tmp_path / "out", flags))
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert "exitcode  : 2" in done.stderr
    assert 'train_craft.py", line' not in done.stderr
