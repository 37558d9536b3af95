"""Stratified samples of pairs: exact quotas, the same for any order of rows, and nothing that is no pair."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stratified import LeftOut, TextPair, quotas, select

SIZES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 500), min_size=1, max_size=8)


def pairs_of(sizes: dict[str, int]) -> list[TextPair]:
    return [
        TextPair(source=name, language=name.upper(), text=f"{name} {number}", text_tgt=f"{number} of {name}")
        for name, size in sizes.items()
        for number in range(size)
    ]


@given(SIZES, st.integers(1, 2000))
def test_quotas_are_exact_and_in_proportion(sizes, limit):
    found, total = quotas(sizes, limit), sum(sizes.values())
    assert sum(found.values()) == min(limit, total)
    for name, size in sizes.items():
        assert 0 <= found[name] <= size
        assert abs(found[name] - size * min(limit, total) / total) < 1


def test_what_rounding_leaves_goes_to_the_largest_remainders():
    assert quotas({"a": 50, "b": 30, "c": 20}, 7) == {"a": 4, "b": 2, "c": 1}  # shares 3.5, 2.1, 1.4
    assert quotas({"a": 1, "b": 1, "c": 1}, 2) == {"a": 1, "b": 1, "c": 0}  # ties go to the first


@given(SIZES, st.integers(1, 300), st.integers(0, 5))
def test_a_sample_has_its_quotas_whatever_the_order_of_the_rows(sizes, limit, seed):
    rows = pairs_of(sizes)
    first = select(rows, limit=limit, seed=seed)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert select(shuffled, limit=limit, seed=seed).pairs == first.pairs
    expected = quotas({name: sizes[name] for name in sorted(sizes)}, limit)
    assert Counter(pair.source for pair in first.pairs) == {name: n for name, n in expected.items() if n}
    assert len({(pair.text, pair.text_tgt) for pair in first.pairs}) == len(first.pairs)


def test_another_seed_gives_another_sample():
    rows = pairs_of({"a": 100})
    one, two = (select(rows, limit=20, seed=seed).pairs for seed in (1, 2))
    assert one != two
    assert {pair.text for pair in one} != {pair.text for pair in two}


def test_a_sample_is_spread_over_its_stratum():
    # A sample of the first rows only would miss what files sorted by length or score have later.
    rows = pairs_of({"a": 1000})
    places = sorted(int(pair.text.split()[1]) for pair in select(rows, limit=200, seed=0).pairs)
    assert places[0] < 50
    assert places[-1] > 950
    assert 400 < sum(places) / 200 < 600


def test_without_a_limit_every_pair_is_taken_once():
    rows = pairs_of({"a": 5, "b": 3})
    found = select([*rows, *rows], limit=None, seed=0)
    assert sorted(pair.text for pair in found.pairs) == sorted(pair.text for pair in rows)
    assert found.left_out[("a", "A")] == {"seen before": 5}


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [("", "x", "empty text"), ("x", " \n", "empty text"), ("same", "same", "equal texts"), ("a ", "a", "equal texts")],
)
def test_what_is_no_pair_is_left_out_and_counted(text, target, reason):
    rows = [*pairs_of({"a": 2}), TextPair(source="a", language="A", text=text, text_tgt=target)]
    found = select([*rows, LeftOut(source="a", language="A", reason="neutral")], limit=None, seed=0)
    assert len(found.pairs) == 2
    assert found.left_out == {("a", "A"): {reason: 1, "neutral": 1}}
