"""Imports go one way: params <- craft <- inft <- scripts, tests; and the few rules within inft."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "matplotlib", "accelerate", "pyarrow"}
LIGHT_AT_IMPORT = (
    "params.",
    "inft.cli.",
    "inft.data.__init__",
    "inft.evaluation.metrics.__init__",
    "inft.data.prompts",
    "inft.training.runlog",
    "inft.training.logfiles",
    "inft.training.curves",
    "inft.models.__init__",
    "inft.models.spec",
    "inft.rewards.",
    "inft.client.__init__",
    "inft.client.losses.__init__",
    "inft.client.losses.registry",
    "inft.client.errors",
    "inft.client.operations",
    "inft.client.schedule",
    "inft.client.store",
    "inft.client.audit",
    "inft.client.manifest",
    "inft.client.sdk.",
    "inft.client.api.",
    "inft.sample",
)

# package -> packages of the project that it may import
ALLOWED = {
    "params": {"params"},
    "craft": {"params", "craft"},
    "inft": {"params", "craft", "inft"},
}
# room of inft -> rooms of inft that it may import
ROOMS = {
    "inft.models": {"inft.models", "inft.sample"},
    "inft.data": {"inft.data", "inft.sample"},
    "inft.training": {
        "inft.training",
        "inft.evaluation.generate",
        "inft.evaluation.metrics",
        "inft.rewards",
        "inft.models",
        "inft.data",
        "inft.sample",
    },
    "inft.rewards": {"inft.rewards", "inft.evaluation.metrics", "inft.sample"},
    "inft.evaluation": {
        "inft.evaluation",
        "inft.training",
        "inft.rewards",
        "inft.models",
        "inft.data",
        "inft.sample",
    },
    "inft.client": {
        "inft.client",
        "inft.training",
        "inft.evaluation.generate",
        "inft.rewards",
        "inft.models",
        "inft.data",
        "inft.sample",
    },
    "inft.encoders": {
        "inft.encoders",
        "inft.training",
        "inft.evaluation.metrics",
        "inft.models",
        "inft.data",
        "inft.sample",
    },
    # What training itself needs at an evaluation: these import nothing of training.
    "inft.evaluation.generate": {"inft.models", "inft.sample"},
    "inft.evaluation.metrics": {"inft.evaluation.metrics"},
}
STDLIB_AND = {"params": {"pydantic", "yaml"}}  # third-party packages of params, imported when it resolves


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def modules() -> list[tuple[str, ast.Module]]:
    paths = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
    return [(module_name(path), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, *, at_import_only: bool = False) -> Iterator[str]:
    """Names of imported modules, relative to nothing; those under TYPE_CHECKING do not run and are left out."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, at_import_only=at_import_only)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def violations(module: str, tree: ast.Module) -> list[str]:
    """What a module imports although it must not."""
    package = module.partition(".")[0]
    found = []
    for name in imports(tree):
        top = name.partition(".")[0]
        if top in {*ALLOWED, "scripts", "tests"} and top not in ALLOWED[package]:
            found.append(f"{module} imports {name}")
        for room, rooms in ROOMS.items():
            if within(module, {room}) and within(name, {"inft"}) and not within(name, rooms):
                found.append(f"{module} imports {name}")
    for name in imports(tree, at_import_only=True):
        top = name.partition(".")[0]
        if f"{module}.".startswith(LIGHT_AT_IMPORT) and top in HEAVY:
            found.append(f"{module} imports {name} at module level")
        if package == "params" and top in STDLIB_AND["params"]:
            found.append(f"{module} imports {name} at module level")
    return found


def mode_questions(tree: ast.Module) -> list[int]:
    """Lines that compare something with the name of a training mode."""
    modes = {"basic", "advanced"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in [node.left, *node.comparators]
        if isinstance(side, ast.Constant) and side.value in modes
    ]


def aya_mentions(tree: ast.Module) -> list[int]:
    """Lines of code (not of docstrings) that name a class or a module of Aya or Cohere."""
    words = ("AyaVision", "Cohere2", "aya_vision", "cohere2")
    found = []
    for node in ast.walk(tree):
        names = [node.id] if isinstance(node, ast.Name) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        names += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [node.lineno for name in names if any(word in name for word in words)]
    return found


MODULES = modules()


@pytest.mark.parametrize(("module", "tree"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_go_one_way(module, tree):
    assert violations(module, tree) == []


def test_only_the_presets_ask_for_a_mode():
    asking = {module: lines for module, tree in MODULES if (lines := mode_questions(tree))}
    assert set(asking) == {"params.presets"}, asking


def test_only_the_aya_family_names_ayas_classes():
    naming = {module: lines for module, tree in MODULES if (lines := aya_mentions(tree))}
    assert set(naming) <= {"inft.models.aya"}, naming


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("params.x", "import inft.models", "params.x imports inft.models"),
        ("params.x", "from craft import losses", "params.x imports craft.losses"),
        ("params.x", "import yaml", "params.x imports yaml at module level"),
        ("craft.x", "def f():\n    from inft.sample import Sample", "craft.x imports inft.sample.Sample"),
        ("inft.data.x", "from inft.models.aya import SPEC", "inft.data.x imports inft.models.aya.SPEC"),
        ("inft.models.x", "from inft.data import batches", "inft.models.x imports inft.data.batches"),
        ("inft.models.x", "from inft import cli", "inft.models.x imports inft.cli"),
        ("inft.training.x", "import inft.cli.app", "inft.training.x imports inft.cli.app"),
        ("inft.evaluation.x", "import tests.conftest", "inft.evaluation.x imports tests.conftest"),
        ("inft.cli.x", "import torch.nn", "inft.cli.x imports torch.nn at module level"),
        ("inft.cli.x", "class A:\n    import peft", "inft.cli.x imports peft at module level"),
        (
            "inft.cli.x",
            "try:\n    import trl\nexcept ImportError:\n    trl = None",
            "inft.cli.x imports trl at module level",
        ),
    ],
)
def test_the_walker_catches_a_violation(module, source, found):
    assert found in violations(module, ast.parse(source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inft.cli.x", "def f():\n    import torch"),
        ("inft.cli.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("inft.data.x", "from inft.sample import Sample"),
        ("inft.training.x", "import torch\nfrom inft.models import load_spec"),
        ("params.x", "def f():\n    import yaml"),
    ],
)
def test_the_walker_lets_pass_what_is_allowed(module, source):
    assert violations(module, ast.parse(source)) == []


def test_the_other_walkers_catch_a_violation():
    assert mode_questions(ast.parse('if run.training_mode == "advanced":\n    pass')) == [1]
    assert aya_mentions(ast.parse("from transformers import AyaVisionConfig")) == [1]
