import os
import subprocess
import sys
from pathlib import Path

import pytest

from inft.__main__ import main
from inft.cli import COMMANDS, train
from params import UserError

ROOT = Path(__file__).parents[2]


def test_the_help_lists_every_command(inft):
    found = inft("--help")
    assert found.status == 0
    for name in COMMANDS:
        assert f"\n  {name} " in found.out


@pytest.mark.parametrize("args", [[], ["logs"]])
def test_no_summary_of_a_command_is_cut(inft, args):
    summaries = inft(*args, "--help").out.partition("Commands:\n")[2].splitlines()
    assert summaries
    assert not [line for line in summaries if line.endswith("...")]


@pytest.mark.parametrize("command", ["train", "list-params", "list-modules", "logs show", "logs tail", "logs plot"])
def test_a_metavar_has_no_double_brackets_and_a_literal_keeps_its_case(inft, command):
    found = inft(*command.split(), "--help").out
    assert "[[" not in found
    assert "Munichus" not in found
    assert "Trainer_" not in found


def test_an_unknown_command_is_refused(inft):
    found = inft("trian")
    assert found.status == 2
    assert "trian" in found.err


def test_a_users_mistake_is_a_message_on_stderr_and_status_2(inft):
    found = inft("train", "lama32", "--max-steps", "0", "--set", "sft.lrr=1", "--languages", "en")
    assert found.status == 2
    assert found.out == ""
    assert found.err.startswith("error: 3 errors in the parameters:\n")
    assert "Traceback" not in found.err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(KeyError):
        main(["train", "aya", "--demo"])


@pytest.mark.parametrize(("error", "status"), [(UserError("x"), 2), (KeyboardInterrupt(), 130)])
def test_the_status_tells_how_a_command_ended(inft, monkeypatch, error, status):
    def ending(*args, **kwargs):
        raise error

    monkeypatch.setattr(train, "run", ending)
    assert inft("train", "aya", "--demo").status == status


@pytest.mark.parametrize("command", [["-m", "inft"], [f"{ROOT}/inft/llama32_inft.py"], [f"{ROOT}/inft/aya_inft.py"]])
@pytest.mark.parametrize("directory", [ROOT, ROOT / "tests"])
def test_every_entry_point_answers_from_any_directory(command, directory):
    found = subprocess.run(
        [sys.executable, *command, "--help"], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert "Usage: inft" in found.stdout


def test_the_guides_scripts_fix_the_model_and_pass_their_flags_on():
    for name, field in [("llama32_inft.py", "basic.llama_model_name="), ("aya_inft.py", "basic.aya_model_name=")]:
        found = subprocess.run(
            [sys.executable, f"inft/{name}", "--training-mode", "advancd", "--set", field],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONSAFEPATH": ""},
        )
        assert found.returncode == 2
        assert found.stderr == "error: unknown training mode 'advancd'; did you mean advanced?\n"


def test_the_guides_names_are_found_where_it_says():
    import inft.params

    assert inft.params.SFTParams.lr == 1.5e-4
    assert inft.params.MUNIChusLoadConfig().split == "train"


def test_the_guides_entry_points_have_the_names_it_mentions():
    from inft import aya_inft, llama32_inft
    from inft.models.aya import AyaCollator
    from inft.models.llama32 import LlamaCollator
    from inft.models.modules import list_linear_modules
    from params.resolve import resolve_train

    assert aya_inft.AyaCollator is AyaCollator
    assert aya_inft.list_linear_modules is list_linear_modules
    assert llama32_inft.LlamaCollator is LlamaCollator
    arguments = llama32_inft._build_sft_args(resolve_train("llama32"), rows=1600)
    assert (arguments.learning_rate, arguments.gradient_accumulation_steps) == (1.5e-4, 16)
    assert (arguments.max_steps, arguments.warmup_steps) == (100, 3)
    with pytest.raises(ImportError):
        from inft.aya_inft import LlamaCollator as _  # noqa: F401


def test_list_params_shows_every_field_of_a_section(inft):
    found = inft("list-params", "sft")
    assert found.status == 0
    assert "sft.lr " in found.out
    assert "peak, per optimizer step" in found.out
    assert "number, above 0" in found.out
    assert "cosine|linear|constant|constant_with_warmup" in found.out
    assert "lora.r" not in found.out
    assert "lora.r" in inft("list-params").out
    assert "known: basic, data" in inft("list-params", "sfd").err


def test_list_params_takes_several_sections_and_its_help_names_all(inft):
    from params.check import SECTIONS

    found = inft("list-params", "preference", "rl").out
    assert "preference.dpo_beta" in found
    assert "rl.rewards" in found
    assert "sft.lr" not in found
    assert "|".join(SECTIONS) in "".join(inft("list-params", "--help").out.split())
    assert "unknown section 'rk'" in inft("list-params", "sft", "rk").err
