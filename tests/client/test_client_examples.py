"""The flat examples of the training client: short, with their command on top, and they reach what they say."""

import ast
import random
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from client_services import served

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., list[str]]]:
    """run("client_loop", "--steps", 2): the lines that an example prints, run in this process."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def main(name: str, *arguments: object) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    yield main
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@pytest.mark.parametrize("name", ["client_loop", "client_rl"])
def test_an_example_is_flat_short_and_opens_with_its_command(name: str):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) < 150
    assert f"    python scripts/examples/{name}.py\n" in (ast.get_docstring(tree, clean=False) or "")
    functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert functions == ({"client_loop": [], "client_rl": ["reward"]}[name])


def test_the_loop_runs_in_process_and_over_http_alike(run: Callable[..., list[str]], tmp_path: Path):
    here = run("client_loop", "--steps", 2, "--batch-size", 2)
    with served(state_dir=str(tmp_path / "service"), device="cpu") as url:
        there = run("client_loop", "--steps", 2, "--batch-size", 2, "--url", url)

    def comparable(lines: list[str]) -> list[str]:
        return [re.sub(r"(tc|art)-[0-9a-f]{24}|\d+\.\d s|\d+ bytes", "*", line) for line in lines]

    assert comparable(here) == comparable(there)
    assert sum(line.startswith("step ") for line in here) == 1
    assert (tmp_path / "outputs" / "client").is_dir(), "where an engine in process keeps its state"


def test_the_rewards_example_runs(run: Callable[..., list[str]]):
    lines = run("client_rl", "--rounds", 1, "--prompts", 1, "--group-size", 2)
    assert lines[0].startswith("round   0: mean reward ")
    assert lines[-1].startswith("saved art-")


@pytest.mark.slow
def test_the_loop_teaches_a_language_that_the_model_never_saw(run: Callable[..., list[str]]):
    lines = run("client_loop")
    found = [re.match(r"(before|after) *: (\d+) of 36 captions are right", line) for line in lines]
    right = {each[1]: int(each[2]) for each in found if each}
    assert right["before"] == 0
    assert right["after"] >= 27


@pytest.mark.slow
def test_the_rewards_example_raises_its_reward(run: Callable[..., list[str]]):
    lines = run("client_rl")
    rewards = [float(found[1]) for line in lines if (found := re.search(r"mean reward (\d\.\d+)", line))]
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.6


@pytest.mark.parametrize("name", ["client_loop", "client_rl"])
def test_what_is_missing_is_one_line_and_no_traceback(name: str, tmp_path: Path, run: Callable[..., list[str]]):
    with pytest.raises(SystemExit, match=r"^error: .*no_such_model") as stopped:
        run(name, "--model", "embedded/no_such_model")
    assert "\n" not in str(stopped.value)


def test_a_language_that_there_is_not_is_named_with_those_that_there_are(
    run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        run("client_loop", "--language", "xx")
    assert "invalid choice: 'xx' (choose from 'ar', 'en'" in capsys.readouterr().err
