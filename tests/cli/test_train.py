import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.core import TyperGroup

from inft.cli import app, train
from inft.cli.train import with_resume_value


@pytest.fixture
def asked(monkeypatch):
    """What the command asked for instead of training."""
    calls = []

    def run(params, **options):
        calls.append((params, options))
        return SimpleNamespace(status="finished")

    monkeypatch.setattr(train, "run", run)
    return calls


def test_every_flag_reaches_its_parameter(inft, asked, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("sft: {eval_steps: 50}\n", encoding="utf-8")
    words = "train aya --training-mode advanced --model /m --data x.jsonl --languages en,si --max-rows-per-lang 5"
    words += " --eval-fraction 0.2 --max-bad-fraction 0.5 --epochs 2 --seed 7 --no-quantize --output-dir out"
    words += " --task aya_first --eval-captions 12 --best-metric chrf"
    words += f" --config {config} --set sft.lr=1e-3 --set lora.r=4 --overwrite --resume last --dry-run"
    assert inft(*words.split()).status == 0
    [(params, options)] = asked
    assert (params.model, params.training_mode, params.model_name) == ("aya", "advanced", "/m")
    data = params.data
    assert params.task == "aya_first"
    assert (data.data, data.languages, data.max_rows_per_lang, data.seed) == ("x.jsonl", ("en", "si"), 5, 7)
    assert (data.eval_fraction, data.max_bad_fraction) == (0.2, 0.5)
    assert (params.sft.num_epochs, params.sft.lr, params.sft.eval_steps) == (2, 1e-3, 50)
    assert (params.sft.eval_captions, params.sft.best_metric) == (12, "chrf")
    assert (params.basic.seed, params.qlora.load_in_4bit, params.lora.r, params.output_dir) == (7, False, 4, "out")
    assert options == {"resume": "last", "overwrite": True, "dry_run": True}


def test_without_flags_nothing_is_overridden(inft, asked):
    assert inft("train", "llama32").status == 0
    [(params, options)] = asked
    assert (params.training_mode, params.demo, params.qlora.load_in_4bit, params.sft.max_steps) == (
        "basic",
        False,
        True,
        None,
    )
    assert options == {"resume": None, "overwrite": False, "dry_run": False}


@pytest.mark.parametrize(
    ("words", "enabled", "preset", "pairs"),
    [
        ("", False, None, ""),
        ("--craft", True, None, ""),
        ("--no-craft", False, None, ""),
        ("--craft-preset minimal", True, "minimal", ""),
        ("--craft-pairs translations", True, None, "translations"),
        ("--craft --craft-pairs translations", True, None, "translations"),
    ],
)
def test_craft_is_turned_on_by_its_flags(inft, asked, words, enabled, preset, pairs):
    assert inft("train", "aya", "--demo", *words.split()).status == 0
    [(params, _)] = asked
    assert (params.craft.enabled, params.craft.preset, params.craft.pairs) == (enabled, preset, pairs)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--craft-pairs absent.jsonl", "--craft-pairs 'absent.jsonl' is neither translations nor a data set"),
        ("--craft --craft-pairs translations --languages ur", "only 'ur' is read: name another with --languages"),
        ("--craft-preset lots", "'balanced'"),
    ],
)
def test_pairs_that_cannot_be_had_are_told_before_torch(inft, words, complaint):
    found = inft("train", "llama32", "--demo", "--no-quantize", *words.split())
    assert found.status == 2
    assert complaint in found.err


def readme_commands():
    """The words after `inft` of every command line in the README's bash blocks."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [" ".join(line[1:]) for line in lines if line[:1] == ["inft"]]


@pytest.mark.parametrize("words", readme_commands())
def test_every_command_line_of_the_readme_is_one(words, inft, asked):
    command, args, context = typer.main.get_command(app._typer), words.split(), None
    while isinstance(command, TyperGroup):
        context = command.make_context("inft", args, parent=context)
        _, command, args = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(command.name, args, parent=context)  # exits for an unknown flag
    if words.startswith("train "):
        assert inft(*words.split()).status == 0  # its parameters agree
        assert len(asked) == 1


def test_the_readme_shows_command_lines_of_each_kind():
    shown = {words.split()[0] for words in readme_commands()}
    assert {"train", "logs", "list-modules"} <= shown


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("aya --resume", "aya --resume latest"),
        ("--resume aya", "--resume latest aya"),
        ("aya --resume --overwrite", "aya --resume latest --overwrite"),
        ("aya --resume out/checkpoint-3", "aya --resume out/checkpoint-3"),
        ("aya --resume latest", "aya --resume latest"),
        ("aya --resume=latest", "aya --resume=latest"),
        ("aya", "aya"),
    ],
)
def test_resume_alone_means_the_latest_checkpoint(given, meant):
    assert with_resume_value(given.split()) == meant.split()


def test_an_interrupted_run_ends_with_status_130(inft, monkeypatch):
    monkeypatch.setattr(train, "run", lambda params, **options: SimpleNamespace(status="interrupted"))
    assert inft("train", "aya", "--demo").status == 130


def test_epochs_and_steps_together_are_refused(inft):
    found = inft("train", "aya", "--epochs", "1", "--max-steps", "5")
    assert found.status == 2
    assert "give one of them" in found.err


def test_a_bad_yaml_file_is_named_with_its_line(inft, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("sft:\n  lr: [\n", encoding="utf-8")
    found = inft("train", "aya", "--config", str(config))
    assert found.status == 2
    assert f"{config} line 3, column 1: not valid YAML" in found.err


def test_missing_extras_are_named_with_the_command_that_installs_them(inft, monkeypatch):
    for name in ("trl", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    found = inft("train", "text", "--data", "sample")
    assert found.status == 2
    assert found.err == "error: not installed here: trl, bitsandbytes. Install them: pip install 'inft[trl,hf,peft]'.\n"
    assert "not installed here: trl." in inft("train", "text", "--demo").err  # nothing is quantised


def test_captions_without_what_scores_them_name_the_extra(inft, monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    found = inft("train", "text", "--demo", "--eval-captions", "8")
    assert found.status == 2
    assert found.err == "error: not installed here: MeCab. Install them: pip install 'inft[eval]'.\n"
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "pip install 'inft[trl,hf,peft,eval]'" in inft("train", "text", "--demo", "--eval-captions", "8").err
    assert "MeCab" not in inft("train", "text", "--demo").err  # nothing is scored


def test_list_modules_names_the_extra_that_it_needs(inft, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "not installed here: peft." in inft("list-modules", "text", "--demo").err
