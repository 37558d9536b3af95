import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inft.rewards import COLUMNS, REWARDS
from inft.rewards.load import load_rewards
from inft.rewards.score import refuse_unrewarded, score, score_all, weighted_sum
from inft.sample import Prompt, Sample
from params.describe import describe_field
from params.errors import UserError
from params.rl import RLParams

OWN = """
NUMBER = 3

def brief(completions, **columns):
    return [1 / (1 + len(text)) for text in completions]

def like_reference(completions, references, **columns):
    return [text == reference for text, reference in zip(completions, references)]

def maybe(completions, references=None, **columns):
    return [1.0] * len(completions)

async def later(completions, **columns):
    return []

class Counter:
    def __call__(self, completions, **columns):
        return [float(len(text)) for text in completions]

counted = Counter()

def choked(completions, **columns):
    return [1 / (text != "two") for text in completions]

def short(completions, **columns):
    return [1.0]

def unnumbered(completions, **columns):
    return [float("nan") if text == "two" else 0.5 for text in completions]

def worded(completions, **columns):
    return ["good"] * len(completions)

def unsure(completions, **columns):
    return [None if text == "two" else 2.0 for text in completions]

def told(completions, *, prompts, references, languages, samples, completion_ids, **columns):
    rows = zip(completions, prompts, references, languages, samples, completion_ids, strict=True)
    return [float(all(part for part in row)) for row in rows]
"""

SAMPLES = [
    Sample(image=None, prompt=Prompt(instruction="Say."), answer=word, language="en", meta={"where": f"row {word}"})
    for word in ("one", "two", "three")
]
TEXTS = ["one", "two", "4"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the current directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    written = []

    def write(text: str) -> str:
        name = f"own_rewards_{len(written)}"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def refused(*names: str) -> str:
    with pytest.raises(UserError) as caught:
        load_rewards(names)
    return str(caught.value)


def scored(name: str, texts=TEXTS):
    (reward,) = load_rewards([name])
    return score(reward, samples=SAMPLES, completions=texts, completion_ids=[[1]] * len(texts))


def test_every_registered_reward_loads_under_its_name():
    rewards = load_rewards(list(REWARDS))
    assert [reward.name for reward in rewards] == list(REWARDS)
    assert {reward.name for reward in rewards if reward.needs_references} == {"chrf", "exact", "length"}
    assert set(RLParams().rewards) <= set(REWARDS)
    assert describe_field("rl.rewards").help.startswith(f"of {', '.join(REWARDS)}, or module:function")


def test_a_function_of_the_user_s_own_is_found_in_the_current_directory(own):
    module = own(OWN)
    brief, like, maybe, counted = load_rewards(
        [f"{module}:{name}" for name in ("brief", "like_reference", "maybe", "counted")]
    )
    assert (brief.name, brief.needs_references) == (f"{module}:brief", False)
    assert (like.needs_references, maybe.needs_references) == (True, False)
    assert scored(counted.name) == [3.0, 3.0, 1.0]
    assert scored(like.name) == [1.0, 1.0, 0.0]


def test_a_file_of_the_current_directory_stands_for_no_installed_module(own, tmp_path):
    (tmp_path / "string.py").write_text("def capwords(completions, **columns): return [7.0] * len(completions)\n")
    assert "it needs 's', which there is not" in refused("string:capwords")


def test_what_cannot_be_loaded_is_refused_with_a_suggestion(own, tmp_path):
    module = own(OWN)
    assert "unknown reward 'chrff'; did you mean chrf?" in refused("chrff")
    assert "known: chrf, exact" in refused("quality")
    assert "named as my_rewards:function" in refused("./my_rewards.py")
    assert "name it my_rewards:fn and run inft in the directory" in refused("./my_rewards.py:fn")
    assert f"there is no module no_such_module, neither installed nor in {tmp_path}" in refused("no_such_module:fn")
    assert "has no function 'breif'; did you mean brief?" in refused(f"{module}:breif")
    assert "it has Counter, brief" in refused(f"{module}:xyz")
    assert "NUMBER is int, not a function" in refused(f"{module}:NUMBER")
    assert "async" in refused(f"{module}:later")
    for name in ("a b:c", ":fn", "module:", "a:b:c", "1x:y"):
        assert "expected module:function" in refused(name)


def test_a_module_that_fails_at_its_import_is_named_with_the_line(own):
    broken = own("x = 1\ny = 1 / 0")
    assert f"failed with ZeroDivisionError: division by zero ({broken}.py line 2)" in refused(f"{broken}:f")
    assert "failed with SyntaxError" in refused(f"{own('def f(')}:f")
    assert "needs nothing_of_the_kind: install it" in refused(f"{own('import nothing_of_the_kind')}:f")


def test_a_function_that_misbehaves_is_named_with_the_row(own):
    module = own(OWN)
    for name, parts in {
        "choked": ["ZeroDivisionError", "'two'", "[row two]", f"({module}.py line "],
        "short": ["returned 1 rewards for 3 completions"],
        "unnumbered": ["nan", "'two'", "[row two]"],
        "worded": ["'good'", "[row one]"],
    }.items():
        with pytest.raises(UserError) as caught:
            scored(f"{module}:{name}")
        assert str(caught.value).startswith(f"rl.rewards={module}:{name}: ")
        for part in parts:
            assert part in str(caught.value)


def test_a_function_gets_the_columns_of_the_convention(own):
    assert scored(f"{own(OWN)}:told") == [1.0, 1.0, 1.0]


SIGNATURES = """
import functools, random

def brevity(completions, prompts, references, languages):
    return [1 / (1 + len(text)) for text in completions]

def all_of_them(completions, **columns):
    return [float(len(columns)) for _ in completions]

class Judge:
    def __call__(self, completions, samples):
        return [float(sample.answer == text) for text, sample in zip(completions, samples, strict=True)]

judge = Judge()

def scaled(completions, scale, languages=("xx",)):
    return [scale * (languages == ["xx"]) * len(text) for text in completions]

triple = functools.partial(scaled, scale=3, languages=["xx"])
largest = max

def needing(completions, reference):
    return [0.0 for _ in completions]

def by_place(completions, /):
    return [0.0 for _ in completions]

def leaving(completions):
    raise SystemExit(3)

def by_library(completions):
    return [random.choice("") for _ in completions]  # line 32
"""


def test_a_function_gets_what_its_signature_takes(own):
    module = own(SIGNATURES)
    assert scored(f"{module}:brevity") == [0.25, 0.25, 0.5]
    assert scored(f"{module}:all_of_them") == [5.0, 5.0, 5.0]
    assert scored(f"{module}:judge") == [1.0, 1.0, 0.0]
    assert scored(f"{module}:triple") == [9.0, 9.0, 3.0]


def test_a_function_whose_signature_cannot_be_read_gets_everything(own):
    module = own(SIGNATURES)
    with pytest.raises(UserError, match=rf"rl\.rewards={module}:largest: .*'max' raised TypeError"):
        scored(f"{module}:largest")


def test_a_parameter_that_is_not_given_is_refused_before_the_first_step(own):
    module = own(SIGNATURES)
    told = refused(f"{module}:needing")
    assert f"rl.rewards={module}:needing: it needs 'reference', which there is not" in told
    assert all(name in told for name in COLUMNS)
    assert "'completions' is positional only" in refused(f"{module}:by_place")
    assert "it needs 'scale'" in refused(f"{module}:scaled")


def test_an_error_in_a_library_is_told_with_the_users_line(own):
    module = own(SIGNATURES)
    with pytest.raises(UserError, match=rf"raised IndexError .*\({module}\.py line 32\)"):
        scored(f"{module}:by_library")
    wrong = own("import json\n\nTABLE = json.loads('{')\n")
    assert f"({wrong}.py line 3)" in refused(f"{wrong}:f")


def test_a_function_or_module_that_exits_is_told_as_any_other_error(own):
    module = own(SIGNATURES)
    with pytest.raises(UserError, match=rf"raised SystemExit .*: 3 \({module}\.py line \d+\) \[row one\]"):
        scored(f"{module}:leaving")
    leaving = own("raise SystemExit(3)")
    assert f"failed with SystemExit: 3 ({leaving}.py line 1)" in refused(f"{leaving}:f")


def test_an_answer_that_no_function_rewards_is_refused_with_its_row():
    refuse_unrewarded({"a": [None, 1.0, None], "b": [0.0, None, 2.0]}, SAMPLES)
    with pytest.raises(UserError, match="the answer to row two has no reward: a, b returned None for it"):
        refuse_unrewarded({"a": [1.0, None, 1.0], "b": [None, None, None]}, SAMPLES)


def test_rewards_are_added_with_their_weights_and_none_adds_nothing(own):
    module = own(OWN)
    rewards = load_rewards(["exact", f"{module}:unsure"])
    found = score_all(rewards, samples=SAMPLES, completions=TEXTS, completion_ids=[[1]] * 3)
    assert found == {"exact": [1.0, 1.0, 0.0], f"{module}:unsure": [2.0, None, 2.0]}
    assert weighted_sum(found) == [3.0, 1.0, 2.0]
    assert weighted_sum(found, (1.0, -0.5)) == [0.0, 1.0, -1.0]
    with pytest.raises(UserError, match="answer 1 has no reward"):
        weighted_sum({"unsure": found[f"{module}:unsure"]})
