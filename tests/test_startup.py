"""The command line answers before anything heavy is imported."""

import json
import os
import subprocess
import sys
import time

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


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_takes_less_than_four_tenths_of_a_second(args):
    seconds = []
    for _ in range(5):  # the least of five: a busy machine only ever adds to it
        began = time.perf_counter()
        assert python("-m", "inft", *args).returncode == 0
        seconds.append(time.perf_counter() - began)
        if seconds[-1] < SECONDS:
            return
    assert min(seconds) < SECONDS, seconds


def test_params_import_in_ten_milliseconds_with_the_standard_library_alone():
    code = (
        "import collections.abc, dataclasses, sys, time, typing\n"
        "began = time.process_time()\n"
        "import params\n"
        "print(time.process_time() - began)\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('pydantic', 'yaml', 'typer', 'rich')])\n"
    )
    seconds, heavy = zip(*(python("-c", code).stdout.splitlines() for _ in range(8)), strict=True)
    assert min(float(value) for value in seconds) < 0.010, seconds
    assert set(heavy) == {"[]"}


def test_a_users_mistake_is_told_without_importing_torch():
    code = (
        "import sys\n"
        "from inft.__main__ import main\n"
        "try:\n"
        "    main(['train', 'lama32', '--set', 'sft.lrr=1'])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    found = python("-c", code)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert "did you mean llama32?" in found.stderr


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
