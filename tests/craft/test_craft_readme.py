"""craft/README.md: its code runs in order as it stands, and its tables are those of the code."""

import ast
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_policies import llama
from transformers import PreTrainedTokenizerFast, Trainer

import craft
from craft.config import CRAFTConfigMixin
from craft.fields import DEFAULT_KEYS, ContrastiveKeys
from craft.ppo import journal as ppo_journal
from craft.ppo.config import PPOConfig, PPOSettings
from craft.trainers import journal
from craft.trainers.encode import OWN_KEYS

ROOT = Path(craft.__file__).parents[1]
PATH = ROOT / "craft" / "README.md"
TEXT = PATH.read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # that the page names; here a folder of this name
BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RATIO = re.compile(r"(\d\.\d\d) ×")
NOT_LOGGED = {journal.CONTRASTED, ppo_journal.REWARD_SQUARED}


def prose(text: str = TEXT) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(first: str, text: str = TEXT) -> Iterator[dict[str, str]]:
    """The rows of every table whose first heading is ``first``, by heading."""
    headings: list[str] = []
    for line in prose(text).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            headings = []
        elif not headings:
            headings = cells
        elif headings[0] == first and set(cells[0]) != {"-"}:
            yield dict(zip(headings, cells, strict=True))


def literal(cell: str) -> Any:
    """The value of a cell that holds code."""
    code = cell.removeprefix("`").removesuffix("`")
    return ContrastiveKeys() if code == "ContrastiveKeys()" else ast.literal_eval(code)


def named(cell: str) -> str:
    """The one name in a cell."""
    (name,) = re.findall(r"`([^`]+)`", cell)
    return str(name)


def default_of(found: Field[Any]) -> Any:
    return found.default if found.default_factory is MISSING else found.default_factory()


# The code


@dataclass
class Walk:
    """What was left after all blocks: their module, and every trainer that was trained."""

    script: ModuleType = field(default_factory=lambda: ModuleType("craft_readme"))
    trainers: list[Any] = field(default_factory=list)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Walk:
    """All blocks run in order, in a folder that has a tiny model under the name that the page gives."""
    torch.set_num_threads(1)
    place, done = tmp_path_factory.mktemp("readme"), Walk()
    llama().save_pretrained(place / MODEL)
    tokenizer.save_pretrained(place / MODEL)
    train = Trainer.train

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.trainers.append(self)
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(Trainer, "train", recorded)
        patch.setitem(sys.modules, done.script.__name__, done.script)  # checkpoints pickle the arguments by name
        for block in BLOCKS.finditer(TEXT):
            above = TEXT[: block.start(1)].count("\n")  # so that a traceback names the page's own line
            exec(compile("\n" * above + block.group(1), str(PATH), "exec"), vars(done.script))
    return done


def test_every_block_runs_as_it_stands(walk):
    assert walk.script.model == MODEL
    for trainer in walk.trainers:
        assert trainer.state.global_step == 2
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(math.isfinite(value) for entry in logs for value in entry.values())
        assert {journal.SFT_LOSS, journal.CONTRASTIVE_LOSS} <= set().union(*logs)


def test_every_public_trainer_is_trained(walk):
    trained = {cls.__name__ for trainer in walk.trainers for cls in type(trainer).__mro__}
    public = {name for name in craft.__all__ if name.startswith("CRAFT") and name.endswith("Trainer")}
    assert public | {"CRAFTTrainerMixin", "CRAFTJointMixin"} <= trained


def test_both_strategies_are_shown(walk):
    assert {trainer.craft_bundle.strategy for trainer in walk.trainers} == {"self_align", "paired_dataset"}


def test_what_it_says_of_dpo_and_of_the_total_holds(walk):
    (dpo,) = (trainer for trainer in walk.trainers if isinstance(trainer, craft.CRAFTDPOTrainer))
    first = next(entry for entry in dpo.state.log_history if "loss" in entry)
    assert first[journal.SFT_LOSS] == pytest.approx(math.log(2), abs=1e-3)
    for trainer in walk.trainers:
        for entry in trainer.state.log_history:
            if journal.TOTAL_LOSS in entry:
                assert entry["loss"] == pytest.approx(entry[journal.TOTAL_LOSS], abs=1e-3)


# The tables


def test_every_field_of_craft_is_in_a_table_with_its_default():
    listed = [(named(row["field"]), literal(row["default"])) for row in tables("field") if "costs" in row]
    assert dict(listed) == {f.name: default_of(f) for f in fields(CRAFTConfigMixin)}
    assert len(listed) == len(dict(listed))


def test_every_row_of_a_field_says_what_it_does_when_to_change_it_and_what_it_costs():
    assert all(all(row.values()) for row in tables("field") if "costs" in row)


def test_every_field_of_ppo_is_in_a_table_with_its_default():
    listed = [(named(row["field"]), literal(row["default"])) for row in tables("field") if "costs" not in row]
    own = {f.name for f in fields(PPOSettings)} | set(PPOConfig.__annotations__)
    assert dict(listed) == {f.name: default_of(f) for f in fields(PPOConfig) if f.name in own}
    assert len(listed) == len(dict(listed))


def test_the_table_of_presets_has_every_value_of_each():
    found = {
        named(row["preset"]): {named(h): cell for h, cell in row.items() if h != "preset"} for row in tables("preset")
    }
    shown = {name: {h: literal(cell) for h, cell in row.items() if cell != "–"} for name, row in found.items()}
    assert shown == {name: dict(values) for name, values in craft.CRAFT_PRESETS.items()}


def test_the_table_of_roles_is_that_of_the_code():
    rows = {
        named(row["role of `craft_contrastive_keys`"]): named(row["column"])
        for row in tables("role of `craft_contrastive_keys`")
    }
    assert rows == dict(DEFAULT_KEYS)


def test_every_log_key_exists_and_every_key_is_told():
    keys = [named(row["log key"]) for row in tables("log key")]
    assert sorted(keys) == sorted({*journal.NAMES, journal.TOTAL_LOSS} - NOT_LOGGED)


def test_every_log_key_of_ppo_exists_and_every_key_is_told():
    keys = [named(row["log key of PPO"]) for row in tables("log key of PPO")]
    names = {*ppo_journal.Journal(["<name>"], torch.device("cpu")).names, ppo_journal.REWARD_STD}
    assert sorted(keys) == sorted(names - NOT_LOGGED)


def test_measured_figures_are_those_of_the_readme_of_the_project():
    measured = [*tables("what", (ROOT / "README.md").read_text(encoding="utf-8"))]
    there = {row["what"] for row in measured}
    quoted = [row for row in tables("what") if row["what"] in there]
    assert len(quoted) >= 9
    assert [row for row in quoted if row not in measured] == []


def test_costs_in_the_text_are_rounded_from_the_table():
    ratios = {f"{float(row['ratio or value']):.2f}" for row in tables("what") if row["ms"]}
    said = [cost for row in [*tables("field"), *tables("strategy")] for cost in RATIO.findall(row.get("costs", ""))]
    assert len(said) >= 5
    assert set(said) <= ratios


def test_each_method_is_measured_or_left_to_the_bench():
    source = (ROOT / "scripts" / "bench" / "craft" / "method_steps.py").read_text(encoding="utf-8")
    methods = set(re.findall(r'"(\w+)": [\w.]*Trainer', source))
    measured = {
        match.group() for row in tables("what") if (match := re.match(r"\w+(?= step with self_align)", row["what"]))
    }
    assert methods
    assert measured == (set() if "<!-- methods -->" in TEXT else methods)


# The words


@pytest.mark.parametrize("name", craft.__all__)
def test_every_public_name_is_mentioned(name):
    assert re.search(rf"\b{name}\b", TEXT)


def test_every_word_of_craft_is_one_of_the_code():
    own = set(re.findall(r"^class (\w+)", "".join(BLOCKS.findall(TEXT)), re.MULTILINE))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "craft").rglob("*.py"))
    known = set(re.findall(r"\w+", " ".join([sources, *journal.NAMES, *OWN_KEYS])))
    words = set(re.findall(r"\b_?(?:craft_|CRAFT)\w+", TEXT))
    assert len(words) > 60
    assert words - known - own == set()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", prose()))))
def test_every_link_leads_somewhere(target):
    path, _, anchor = target.partition("#")
    page = (PATH.parent / path).resolve() if path else PATH
    assert page.exists()
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not anchor or anchor in slugs


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`((?:scripts|craft)/[\w./]+)", prose()))))
def test_every_file_that_is_named_exists(place):
    assert (ROOT / place).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(craft\.\w+\.\w+)`", prose()))))
def test_every_dotted_name_exists(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(__import__(module, fromlist=[attribute]), attribute)
