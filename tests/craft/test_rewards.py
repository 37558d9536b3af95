"""Reward functions: what they may return, and how their mistakes are told."""

import functools

import pytest
import torch

from craft.rewards import checked_rewards, reward_name


def call(func, completions=("good", "bad", "ugly"), **columns):
    return checked_rewards(
        func,
        prompts=["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[1]] * len(completions),
        **columns,
    )


def length(completions, **columns):
    return [len(text) for text in completions]


def test_rewards_come_back_as_floats_in_order_with_none_kept():
    assert call(length) == [4.0, 3.0, 4.0]
    assert call(lambda completions, **c: (True, None, torch.tensor(2.5))) == [1.0, None, 2.5]
    assert call(lambda completions, **c: torch.tensor([1, 2, 3])) == [1.0, 2.0, 3.0]


def test_columns_reach_the_function():
    seen = {}
    call(lambda completions, **columns: seen.update(columns) or [0, 0, 0], reference=["a", "b", "c"], trainer_state=7)
    assert seen["reference"] == ["a", "b", "c"]
    assert seen["trainer_state"] == 7
    assert seen["prompts"] == ["p"] * 3
    assert seen["completion_ids"] == [[1]] * 3


def test_an_error_names_the_function_and_the_row_that_it_fails_on():
    def fussy(completions, reference, **columns):
        return [1.0 / len(r) for r in reference]

    with pytest.raises(ValueError, match=r"'fussy' raised ZeroDivisionError for row 1 \('bad'\)") as caught:
        call(fussy, reference=["x", "", "y"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_exits_is_told_and_ctrl_c_is_not_caught():
    def leaving(completions, **columns):
        raise SystemExit(3)

    def stopped(completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match=r"'leaving' raised SystemExit for row 0 \('good'\): 3"):
        call(leaving)
    with pytest.raises(KeyboardInterrupt):
        call(stopped)


def test_an_error_of_no_single_row_names_the_function():
    def only_singles(completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("one at a time")
        return [1.0]

    with pytest.raises(ValueError, match=r"'only_singles' raised RuntimeError: one at a time"):
        call(only_singles)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0, float("nan"), 2.0], r"returned nan for row 1 \('bad'\)"),
        ([1.0, 2.0, float("inf")], r"returned inf for row 2 \('ugly'\)"),
        (["high", 1.0, 1.0], r"returned 'high' for row 0 \('good'\)"),
        (None, "returned a NoneType"),
        (1.0, "returned a float"),
        ("abc", "returned a str"),
        ({"a": 1}, "returned a dict"),
    ],
)
def test_what_is_no_reward_is_refused(returned, words):
    def judge(completions, **columns):
        return returned

    with pytest.raises(ValueError, match=f"'judge' {words}"):
        call(judge)


def test_a_long_completion_is_shortened_and_a_chat_one_shows_its_text():
    message = [{"role": "assistant", "content": "word " * 100}]
    with pytest.raises(ValueError, match=r"row 0 \('word word .*…'\)") as caught:
        call(lambda completions, **c: [float("nan")], completions=[message])
    assert len(str(caught.value)) < 300


def test_names_of_functions_partials_objects_and_models():
    class Judge:
        def __call__(self, **columns):
            return []

    class Model:
        class config:
            _name_or_path = "some/reward-model/"

    assert reward_name(length) == "length"
    assert reward_name(functools.partial(length, scale=2)) == "length"
    assert reward_name(Judge()) == "Judge"
    assert reward_name(Model()) == "reward-model"
