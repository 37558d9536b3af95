"""The shell scripts, as far as they can be tried without installing anything."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPTS = ("scripts/setup", "scripts/test", "scripts/demo", "scripts/ddp/launch_craft.sh", ".ci/run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_executable_and_parses(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_an_old_python_is_refused_with_a_remedy(tmp_path):
    env = {**os.environ, "PYTHON": "/bin/false", "INFT_VENV": str(tmp_path / "venv")}
    found = subprocess.run([ROOT / "scripts/setup"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "inft needs Python 3.11 or newer" in found.stderr
    assert not (tmp_path / "venv").exists()


def test_the_constraints_pin_every_requirement_to_a_version_that_it_allows():
    lines = (ROOT / "scripts/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])  # not the kernels of particular GPUs, which no script installs
    assert len(everything.extras) > 5
    wanted = [*project["dependencies"], *(item for name in (*everything.extras, "test") for item in extras[name])]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
