"""launch_craft.sh: what it makes of its lists and of the flags that stand after its name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inft.models.loading import EMBEDDED

SCRIPTS = Path(__file__).parents[2] / "scripts" / "ddp"


def launch(*argv, script=SCRIPTS / "launch_craft.sh", **environment):
    return subprocess.run(
        [script, *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment},
    )


def launched(sources, out, **environment):
    # What stands on the command line counts more than what the script sets.
    words = [f"{name}={sources[name]}" for name in ("flores", "all-nli")]
    more = ["--sources", *words, "--languages", "sin_Sinh", "--load_in_4bit", "false", "--max_steps", "2"]
    return launch(*more, MODEL=str(EMBEDDED / "text"), SFT_DATA=str(sources["sft"]), OUTPUT_DIR=str(out), **environment)


def test_the_launcher_is_executable_and_parses():
    assert os.access(SCRIPTS / "launch_craft.sh", os.X_OK)
    subprocess.run(["bash", "-n", SCRIPTS / "launch_craft.sh"], check=True)


def test_the_launcher_without_a_model_is_told_what_to_edit(tmp_path):
    done = launch("--dry_run", MODEL=str(tmp_path / "model"), NPROC="1")
    assert done.returncode == 2
    assert "no model directory at" in done.stderr
    assert "Traceback" not in done.stderr


def edited(directory, **lists):
    """The launcher with other lists, and train_craft.py beside it."""
    text = (SCRIPTS / "launch_craft.sh").read_text()
    for name, words in lists.items():
        text, count = re.subn(rf"^{name}=\(.*?\)$", f"{name}=({words})", text, flags=re.MULTILINE | re.DOTALL)
        assert count == 1
    script = directory / "launch_craft.sh"
    script.write_text(text)
    script.chmod(0o755)
    (directory / "train_craft.py").symlink_to(SCRIPTS / "train_craft.py")
    return script


def dry_run(sources, tmp_path, *argv, **more):
    environment = {
        "MODEL": str(EMBEDDED / "text"),
        "SFT_DATA": str(sources["sft"]),
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    done = launch("--dry_run", *argv, NPROC="1", **environment, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_empty_list_of_sources_is_self_align(sources, tmp_path):
    told = dry_run(sources, tmp_path, script=edited(tmp_path, SOURCES=""))
    assert "contrastive pairs: none given" in told


def test_sources_after_the_name_replace_those_of_the_script_and_its_languages(sources, tmp_path):
    assert "mine" in dry_run(sources, tmp_path, "--sources", f"mine={sources['mine']}")


@pytest.mark.parametrize(
    ("lists", "argv", "expected"),
    [
        (
            {},
            [],
            "--sources flores all-nli quora-duplicates natural-questions --max_contrastive_samples 50000 "
            "--languages sin_Sinh urd_Arab yue_Hant",
        ),
        ({"SOURCES": ""}, [], ""),
        (
            {"SOURCES": "all-nli mine=flores.jsonl"},
            [],
            "--sources all-nli mine=flores.jsonl --max_contrastive_samples 50000",
        ),
        (
            {"SOURCES": "nllb=bitext/", "PAIR_FLAGS": ""},
            ["--language-pairs", "eng_Latn-sin_Sinh"],
            "--sources nllb=bitext/ --language-pairs eng_Latn-sin_Sinh",
        ),
        ({}, ["--sources=flores"], "--max_contrastive_samples 50000 --sources=flores"),
        ({"SOURCES": ""}, ["--sources", "all-nli"], "--max_contrastive_samples 50000 --sources all-nli"),
    ],
)
def test_flags_of_pairs_are_given_where_they_are_read(tmp_path, lists, argv, expected):
    done = launch(*argv, script=edited(tmp_path, FLAGS="--bf16 true", **lists), NPROC="1", PYTHON="echo")
    assert done.stdout.partition("--bf16 true")[2].strip() == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "2"])
def test_the_launcher_trains_in_one_process_or_in_several(sources, tmp_path, count):
    done = launched(sources, tmp_path / "out", NPROC=count)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{count} process{'es' if count == '2' else ''} x 4 micro-batches x 4 rows" in done.stdout
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
