"""Masks: their shares, and that they depend on the document alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inft.encoders.data.counter import permuted, shuffled, uniform
from inft.encoders.data.masking import IGNORED, MaskRule, mask_documents, mask_tokens

RULE = {"probability": 0.15, "mask_all": False, "mask_token_id": 4, "vocab_size": 1000, "special_ids": (0, 1, 2, 3, 4)}
NUMBERS = {"seed": 3, "epoch": 0, "key": 7, "piece": 0}


def words(count: int, seed: int = 0) -> np.ndarray:
    """Tokens that are not special, between a 2 and a 3."""
    drawn = np.random.default_rng(seed).integers(5, 1000, count).astype(np.int32)
    return np.concatenate([[2], drawn, [3]]).astype(np.int32)


def near(count: int, total: int, share: float) -> bool:
    """Whether a count is within five standard deviations of its share."""
    return abs(count - total * share) < 5 * (total * share * (1 - share)) ** 0.5


def test_15_percent_are_predicted_of_which_80_10_10():
    tokens = words(400_000)
    seen, labels = mask_tokens(tokens, **NUMBERS, **RULE)
    predicted = labels != IGNORED
    assert near(predicted.sum(), 400_000, 0.15)
    masked = predicted & (seen == 4)
    stayed = predicted & (seen == tokens)
    other = predicted & ~masked & ~stayed
    assert near(masked.sum(), predicted.sum(), 0.8)
    assert near(stayed.sum(), predicted.sum(), 0.1 + 0.1 / 995)
    assert near(other.sum(), predicted.sum(), 0.1 - 0.1 / 995)
    assert (labels[predicted] == tokens[predicted]).all()
    assert (seen[~predicted] == tokens[~predicted]).all()
    # What is put in is spread over the whole vocabulary, special tokens excepted.
    drawn = seen[other]
    assert drawn.min() >= 5
    assert drawn.max() < 1000
    assert len(np.unique(drawn)) > 900


def test_mask_all_puts_the_mask_in_for_every_predicted_token():
    seen, labels = mask_tokens(words(10_000), **NUMBERS, **{**RULE, "mask_all": True})
    assert (seen[labels != IGNORED] == 4).all()
    assert near((labels != IGNORED).sum(), 10_000, 0.15)


def test_a_probability_of_one_predicts_everything_but_special_tokens():
    tokens = np.array([2, 9, 4, 10, 1, 11, 3, 0], np.int32)
    _, labels = mask_tokens(tokens, **NUMBERS, **{**RULE, "probability": 1.0})
    assert labels.tolist() == [-100, 9, -100, 10, -100, 11, -100, -100]


@given(st.data())
def test_masks_do_not_depend_on_the_documents_beside(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    keys = data.draw(st.lists(st.integers(0, 2**62), min_size=len(lengths), max_size=len(lengths)))
    pieces = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))
    probability = data.draw(st.sampled_from([0.15, 0.5, 1.0]))
    texts = [words(length, seed=i) for i, length in enumerate(lengths)]
    rule = MaskRule(seed=5, **{**RULE, "probability": probability})
    in_a_row = mask_documents(
        np.concatenate([texts[i] for i in order]),
        np.array([len(texts[i]) for i in order]),
        np.array([keys[i] for i in order]),
        np.array([pieces[i] for i in order]),
        rule=rule,
        epoch=2,
    )
    singly = [
        mask_tokens(texts[i], seed=5, epoch=2, key=keys[i], piece=pieces[i], **{**RULE, "probability": probability})
        for i in order
    ]
    for side in (0, 1):
        assert (in_a_row[side] == np.concatenate([found[side] for found in singly])).all()


def test_each_number_of_the_key_changes_the_masks():
    tokens = words(2000)
    _, first = mask_tokens(tokens, **NUMBERS, **RULE)
    for name in NUMBERS:
        _, other = mask_tokens(tokens, **{**NUMBERS, name: NUMBERS[name] + 1}, **RULE)
        both = ((first != IGNORED) & (other != IGNORED)).sum()
        assert near(both, 2000, 0.15**2), name


def test_documents_with_neighbouring_keys_are_masked_independently():
    texts = [words(1, seed=0)] * 100_000
    lengths = np.full(100_000, 3)
    rule = MaskRule(seed=0, **RULE)
    _, labels = mask_documents(
        np.concatenate(texts), lengths, np.arange(100_000), np.zeros(100_000, int), rule=rule, epoch=0
    )
    chosen = labels.reshape(-1, 3)[:, 1] != IGNORED
    assert near(chosen.sum(), 100_000, 0.15)
    assert near((chosen[1:] & chosen[:-1]).sum(), 100_000, 0.15**2)


@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_a_permutation_holds_every_number_once(count, key):
    assert sorted(permuted(np.arange(count), count, key).tolist()) == list(range(count))
    assert sorted(shuffled(count, key).tolist()) == list(range(count))


def test_a_permutation_of_many_is_made_place_by_place():
    count = 10**12
    some = permuted([0, 5, count - 1], count, 1)
    assert some.tolist() == [permuted([place], count, 1)[0] for place in (0, 5, count - 1)]
    assert ((some >= 0) & (some < count)).all()


def test_a_permutation_leaves_no_order_behind():
    found = permuted(np.arange(20_000), 20_000, 3)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(found, np.arange(20_000))[0, 1]) < 0.03
    assert (np.abs(np.diff(found)) == 1).sum() < 20


def test_uniform_numbers_are_uniform():
    drawn = uniform(1, np.arange(200_000))
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert all(near(int(count), 200_000, 0.05) for count in counts)
