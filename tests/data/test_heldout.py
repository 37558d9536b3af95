from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.data.heldout import article_groups, article_key, hold_out, spread, unit_hash

KEYS = st.lists(
    st.tuples(st.sampled_from(["", "a", "A ", "b", "c", "d", "e"]), st.sampled_from(["", "1", "2", "3", "4", "5"])),
    max_size=40,
)


@given(KEYS, st.floats(min_value=0, max_value=0.99), st.integers(min_value=0, max_value=5))
def test_no_title_and_no_image_is_on_both_sides(keys: list[tuple[str, str]], fraction: float, seed: int) -> None:
    held = hold_out(keys, fraction=fraction, seed=seed)
    for part in (lambda key: article_key(key[0]), lambda key: key[1]):
        inside = {part(key) for key, out in zip(keys, held, strict=True) if not out}
        outside = {part(key) for key, out in zip(keys, held, strict=True) if out}
        assert not (inside & outside) - {""}


@given(KEYS, st.floats(min_value=0.001, max_value=0.99))
def test_at_least_one_article_is_on_each_side(keys: list[tuple[str, str]], fraction: float) -> None:
    held = hold_out(keys, fraction=fraction, seed=0)
    assert set(held) == ({True, False} if len(set(article_groups(keys))) > 1 else set(held) & {False})


def test_a_fraction_of_zero_holds_nothing_out() -> None:
    assert not any(hold_out([(str(i), "") for i in range(50)], fraction=0, seed=1))


def test_the_share_is_about_the_fraction() -> None:
    held = hold_out([(f"title {i}", "") for i in range(5000)], fraction=0.05, seed=42)
    assert 0.04 < sum(held) / 5000 < 0.06


def test_added_rows_move_no_others() -> None:
    keys = [(f"title {i // 3}", f"image {i // 3}") for i in range(900)]
    more = [(f"new title {i}", f"new image {i}") for i in range(300)] + keys
    assert hold_out(more, fraction=0.1, seed=3)[300:] == hold_out(keys, fraction=0.1, seed=3)


def test_an_article_larger_than_the_share_trains() -> None:
    keys = [("one big section", "")] * 500 + [(f"title {i}", "") for i in range(500)]
    for seed in range(30):
        assert not any(hold_out(keys, fraction=0.2, seed=seed)[:500])


def test_another_seed_holds_out_other_articles() -> None:
    keys = [(f"title {i}", "") for i in range(300)]
    assert hold_out(keys, fraction=0.1, seed=1) != hold_out(keys, fraction=0.1, seed=2)


@pytest.mark.parametrize(("one", "other"), [("Café", "Cafe\u0301"), (" A  B ", "a b"), ("STRASSE", "straße")])
def test_titles_that_differ_in_form_only_are_one_article(one: str, other: str) -> None:
    assert article_key(one) == article_key(other)
    assert len(set(article_groups([(one, ""), (other, "")]))) == 1


def test_titles_that_share_an_image_are_one_article() -> None:
    groups = article_groups([("a", "1"), ("b", "2"), ("c", "2"), ("d", "1"), ("a", "2"), ("", ""), ("", "")])
    assert len(set(groups[:5])) == 1
    assert len(set(groups)) == 3


def test_the_hash_is_the_same_in_every_process() -> None:
    assert unit_hash(42, "held out", "title") == pytest.approx(0.12399321, abs=1e-7)


def test_a_limit_is_spread_evenly_over_the_languages() -> None:
    languages = ["en"] * 100 + ["si"] * 3 + ["ur"] * 50
    chosen = spread(languages, [i % 7 / 7 for i in range(153)], 23)
    assert Counter(languages[i] for i in chosen) == {"en": 10, "ur": 10, "si": 3}
    assert chosen == sorted(chosen)


def test_no_limit_keeps_every_row() -> None:
    assert spread(["en", "ur"], [0.5, 0.1], None) == [0, 1]
    assert spread(["en", "ur"], [0.5, 0.1], 2) == [0, 1]
