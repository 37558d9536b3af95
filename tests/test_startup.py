"""The command line answers before anything heavy is imported."""

import json
import os
import subprocess
import sys

import pytest

from inft.__main__ import TELEMETRY_SWITCHES
from inft.cli import COMMANDS

# typer itself imports pydantic; nothing of ours does for a help text
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "matplotlib", "numpy", "yaml")
LOGS = ("tail", "show", "plot")
HELP = [["--help"], *([name, "--help"] for name in COMMANDS), *(["logs", name, "--help"] for name in LOGS)]
SECONDS = 0.4


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in TELEMETRY_SWITCHES}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, env={**clean, **env}, timeout=60
    )


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_answers_at_once_and_imports_nothing_heavy(args):
    code = (
        "import json, sys\n"
        "from inft.__main__ import main\n"
        "try:\n"
        f"    main({args!r})\n"
        "finally:\n"
        f"    print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)\n"
    )
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
    assert "Usage: inft" in found.stdout
    assert json.loads(found.stderr.splitlines()[-1]) == []


def processor_seconds() -> float:
    """What the processes that this one has waited for have used."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_takes_less_than_four_tenths_of_a_second(args):
    seconds = []
    for _ in range(5):  # the least of five, in seconds of a processor: a busy machine only ever adds to it
        began = processor_seconds()
        assert python("-m", "inft", *args).returncode == 0
        seconds.append(processor_seconds() - began)
        if seconds[-1] < SECONDS:
            return
    assert min(seconds) < SECONDS, seconds


def test_params_import_the_standard_library_alone_and_little_of_it():
    code = (
        "import json, sys, time\n"
        "before = set(sys.modules)\n"
        "began = time.process_time()\n"
        "import params\n"
        "seconds = time.process_time() - began\n"
        "print(json.dumps([seconds, sorted({name.partition('.')[0] for name in set(sys.modules) - before})]))\n"
    )
    seconds, modules = json.loads(python("-c", code).stdout)
    assert set(modules) - sys.stdlib_module_names == {"params"}
    assert seconds < 0.5  # about 0.005 on an idle machine


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["lama32", "--set", "sft.lrr=1"], "did you mean llama32?"),
        (["text", "--data", "absent.jsonl"], "absent.jsonl"),
        (["text", "--data", "sample", "--model", "./absent"], "no model directory at ./absent"),
        (["text", "--demo", "--output-dir", "used"], "--overwrite"),
    ],
)
def test_a_users_mistake_is_told_without_importing_torch(tmp_path, args, complaint):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "params.yaml").write_text("", encoding="utf-8")
    code = (
        "import os, sys\n"
        "from inft.__main__ import main\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "try:\n"
        f"    main({['train', *args]!r})\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    found = python("-c", code)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert complaint in found.stderr


@pytest.mark.parametrize("face", ["inft.llama32_inft", "inft.aya_inft"])
def test_the_guides_entry_points_import_nothing_heavy(face):
    code = f"import json, sys, {face}; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert json.loads(python("-c", code).stdout) == []


def test_no_library_sends_telemetry_unless_the_user_asks():
    code = (
        "from inft.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    from huggingface_hub import constants\n"
        "    print(constants.HF_HUB_DISABLE_TELEMETRY)\n"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "True"
    assert python("-c", code, HF_HUB_DISABLE_TELEMETRY="0").stdout.splitlines()[-1] == "False"
