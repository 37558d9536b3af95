"""The examples: each shows its command and options, and, run as it is written, reaches what it says."""

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "scripts" / "examples"
EXAMPLES = {path.stem: path for path in sorted(HERE.glob("[0-9]*.py"))}
NAMES = {
    "01_craft_basic_sft",
    "02_craft_best_practices",
    "03a_craft_loss_transformers_trainer",
    "03b_craft_trl_sft",
    "03c_craft_trl_orpo",
    "04_craft_qlora_translation_eval",
}
Figures = dict[str, Any]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """shared("texts"): a module that the examples share."""
    monkeypatch.syspath_prepend(HERE)
    return lambda name: importlib.import_module(f"shared.{name}")


@pytest.fixture
def corpus(shared: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., Any]:
    """corpus(data="texts.tsv", target="fr"): the texts of an example with these options."""

    def make(**values: Any) -> Any:
        options = shared("options")
        own = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "output_dir": tmp_path}
        return shared("texts").corpus(options.Options(**{**options.DEFAULTS, **own, **values}))

    return make


def test_the_examples_are_those_that_were_promised():
    assert EXAMPLES.keys() == NAMES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_with_its_command_and_takes_its_output_directory_from_its_name(name):
    source = EXAMPLES[name].read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring is not None
    assert f"\n    python scripts/examples/{name}.py\n" in docstring
    assert f'name="{name}"' in source


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_shows_its_options_before_anything_heavy_is_imported(name, tmp_path):
    found = run("-X", "importtime", EXAMPLES[name], "--help", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for option in ("--model", "--data", "--steps", "--output-dir"):
        assert option in found.stdout
    assert not any(line.rstrip().endswith("| torch") for line in found.stderr.splitlines())
    assert not list(tmp_path.iterdir())


def test_held_out_scenes_are_none_of_those_trained_on(corpus):
    texts = corpus()
    assert len(texts.held_out) == 72
    assert not {each.text for each in texts.train} & {each.text for each in texts.held_out}
    assert all(each.wrong != each.translation for each in (*texts.train, *texts.held_out))


def rows_of(form: str, count: int) -> str:
    """The same texts and translations in each form of file."""
    texts = [(f"text {number}", f"texte {number}") for number in range(count)]
    if form == "tsv":
        return "".join(f"{one}\t{other}\n" for one, other in texts)
    if form == "pairs":
        return "".join(json.dumps({"text": one, "text_tgt": other}) + "\n" for one, other in texts)
    return "".join(
        json.dumps({"image": f"{number}.png", "language": language, "caption": caption}) + "\n"
        for number, captions in enumerate(texts)
        for language, caption in zip(("en", "fr"), captions, strict=True)
    )


@pytest.mark.parametrize("form", ["tsv", "pairs", "captions"])
def test_each_form_of_file_gives_the_same_texts_and_holds_out_a_tenth(form, tmp_path, corpus):
    file = tmp_path / f"texts.{'tsv' if form == 'tsv' else 'jsonl'}"
    file.write_text(rows_of(form, 40), encoding="utf-8")
    texts = corpus(data=str(file), target="fr")
    both = sorted((*texts.train, *texts.held_out), key=lambda each: int(each.text.split()[1]))
    assert [(each.text, each.translation) for each in both] == [(f"text {n}", f"texte {n}") for n in range(40)]
    assert len(texts.held_out) == 4


def test_a_text_that_comes_twice_is_never_on_both_sides(tmp_path, corpus):
    file = tmp_path / "texts.tsv"
    file.write_text("".join(f"text {n % 20}\tnumber {n}\n" for n in range(60)), encoding="utf-8")
    texts = corpus(data=str(file))
    assert len(texts.train) + len(texts.held_out) == 20
    assert not {each.text for each in texts.train} & {each.text for each in texts.held_out}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "one\tun\ntwo deux\n", "a.tsv line 2 has 1 columns"),
        ("a.jsonl", '{"text": "one", "text_tgt": "un"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '["one", "un"]\n', "a.jsonl line 1 is a JSON list"),
        ("a.jsonl", '{"text": "one"}\n', "a.jsonl line 1 has no text_tgt"),
        (
            "a.jsonl",
            '{"image": "a.png", "language": "en", "caption": "one"}\n{"language": "si", "caption": "un"}\n',
            "a.jsonl line 2 has no image",
        ),
        (
            "a.jsonl",
            '{"text": "one", "text_tgt": "un", "rejected": "un"}\n',
            "a.jsonl line 1: rejected is the translation itself",
        ),
        ("a.tsv", "one\tun\n", "1 different texts with a translation en -> si: at least 4"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_the_line(name, content, message, tmp_path, corpus):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        corpus(data=str(tmp_path / name))


def test_a_file_of_another_encoding_is_named(tmp_path, corpus):
    (tmp_path / "a.tsv").write_bytes("façade\tfaçade\n".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"a.tsv is not UTF-8 .* Convert it"):
        corpus(data=str(tmp_path / "a.tsv"))


@pytest.mark.parametrize(("flag", "value"), [("--learning-rate", "-1"), ("--batch-size", "1")])
def test_a_value_that_cannot_train_is_refused_at_once(flag, value, tmp_path):
    found = run(EXAMPLES["01_craft_basic_sft"], flag, value, cwd=tmp_path)
    assert found.returncode == 2
    assert f"argument {flag}" in found.stderr


def test_a_language_without_captions_is_an_error_that_lists_them(corpus):
    with pytest.raises(SystemExit, match="no captions in 'de': choose of ar, en"):
        corpus(target="de")


def test_an_empty_panel_is_an_error_and_no_empty_picture(shared, tmp_path):
    curves = shared("curves")
    panel = curves.Panel(title="Losses", y="nats", curves={"los": ""})
    with pytest.raises(ValueError, match="no log entry has los"):
        curves.draw(tmp_path / "a.png", [panel], {"run": [{"step": 1, "loss": 1.0}]})
    assert not (tmp_path / "a.png").exists()


def test_an_unknown_notebook_is_an_error_that_lists_the_examples(tmp_path):
    found = run(HERE / "make_notebooks", "05_nothing", cwd=tmp_path)
    assert found.returncode == 2
    assert "there is no example '05_nothing': choose of 01_craft_basic_sft" in found.stderr


def test_a_notebook_has_the_cells_of_its_script_and_the_shared_modules_beside_it(tmp_path):
    pytest.importorskip("jupytext", reason="the extra [notebooks] is not installed")
    found = run(HERE / "make_notebooks", "--output-dir", tmp_path, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for name, path in EXAMPLES.items():
        cells = json.loads((tmp_path / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        source = path.read_text(encoding="utf-8")
        assert len(cells) == source.count("\n# %%") + 1
        assert cells[0]["cell_type"] == "markdown"
        assert f"python scripts/examples/{name}.py" in "".join(cells[0]["source"])
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert ast.dump(ast.parse(code)) == ast.dump(ast.Module(ast.parse(source).body[1:], []))
    assert (tmp_path / "shared" / "texts.py").is_file()


def figures_of(name: str, directory: Path) -> Figures:
    """What an example wrote, after a look at its plots."""
    found = run(EXAMPLES[name], "--output-dir", directory, cwd=directory)
    assert found.returncode == 0, found.stderr[-3000:]
    plots = list(directory.glob("*.png"))
    assert plots
    assert all(plot.stat().st_size > 10_000 for plot in plots)
    figures: Figures = json.loads((directory / "figures.json").read_text(encoding="utf-8"))
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["01_craft_basic_sft", "02_craft_best_practices", "03c_craft_trl_orpo", "04_craft_qlora_translation_eval"],
)
def test_an_example_learns_to_translate_and_to_find_translations(name, tmp_path):
    figures = figures_of(name, tmp_path)
    before, after = figures["before"], figures["after"]
    assert before["BLEU"] < 5
    assert after["BLEU"] > 80
    assert before["translation found (%)"] < 10  # one of 72 by chance
    assert after["translation found (%)"] > 60


@pytest.mark.slow
def test_the_loss_by_hand_is_that_of_the_mixin(tmp_path):
    figures = figures_of("03a_craft_loss_transformers_trainer", tmp_path)
    assert figures["largest difference of the losses"] < 1e-3
    assert figures["scores"]["by hand"]["BLEU"] > 60


@pytest.mark.slow
def test_translations_are_found_with_the_contrast_and_not_without(tmp_path):
    figures = figures_of("03b_craft_trl_sft", tmp_path)["scores"]
    assert figures["plain"]["BLEU"] > 80
    assert figures["CRAFT"]["BLEU"] > 80
    assert figures["plain"]["translation found (%)"] < 20
    assert figures["CRAFT"]["translation found (%)"] > 60


@pytest.mark.slow
def test_a_notebook_runs_and_keeps_its_outputs(tmp_path):
    for module in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(module, reason="the extra [notebooks] is not installed")
    found = run(HERE / "make_notebooks", "--execute", "--output-dir", tmp_path, "01_craft_basic_sft", cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    cells = json.loads((tmp_path / "01_craft_basic_sft.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("translation found (%)" in "".join(output.get("text", [])) for output in outputs)
