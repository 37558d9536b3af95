"""Packing: nothing lost, nothing late, hardly any room left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.encoders.data.packing import Packer, Piece


def piece(length: int, key: int, arrived: int = 0) -> Piece:
    ids = np.zeros(length, np.int32)
    return Piece(input_ids_T=ids, labels_T=ids, key=key, piece=0, language=None, arrived=arrived)


def packed(packer: Packer, lengths, count: int) -> list[list[list[Piece]]]:
    """Batches of documents whose lengths are drawn from an iterator."""
    batches, number = [], 0
    for _ in range(count):
        while packer.hungry:
            packer.add(piece(next(lengths), number, packer.batch))
            number += 1
        batches.append(packer.pack())
    return batches


def drawn(name: str):
    """Endless lengths of documents of up to 512 tokens."""
    draw = np.random.default_rng(0)
    while True:
        if name == "short":
            length = draw.lognormal(4.0, 0.6)
        elif name == "medium":
            length = draw.lognormal(5.3, 0.7)
        else:  # half of them as long as a sequence, as pieces of long documents are
            length = 512 if draw.random() < 0.5 else draw.uniform(5, 512)
        yield int(np.clip(length, 5, 512))


@pytest.mark.parametrize("name", ["short", "medium", "long"])
@pytest.mark.parametrize("sequences", [4, 16, 64])
def test_sequences_are_97_percent_full(name, sequences):
    packer = Packer(sequences=sequences, capacity=512)
    batches = packed(packer, drawn(name), 20 + 400 // sequences)
    fill = [sum(map(len, sequence)) / 512 for batch in batches[10:] for sequence in batch]
    assert np.mean(fill) > 0.97, np.mean(fill)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(1, 5), st.booleans())
def test_every_document_is_packed_once_and_no_sequence_overflows(lengths, sequences, limited):
    packer = Packer(sequences=sequences, capacity=40, limited=limited)
    for key, length in enumerate(lengths):
        packer.add(piece(length, key))
    found = []
    while packer.pool:
        batch = packer.pack()
        assert 0 < len(batch) <= sequences
        for sequence in batch:
            assert sequence
            assert sum(map(len, sequence)) <= 40
            assert not limited or len(sequence) <= 5
            found += [document.key for document in sequence]
    assert sorted(found) == list(range(len(lengths)))


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_no_document_waits_for_ever(sequences):
    # Every document fills more than half a sequence, so that the shorter ones are always the last choice.
    draw = np.random.default_rng(1)
    lengths = iter(lambda: int(draw.integers(260, 400)), 0)
    packer = Packer(sequences=sequences, capacity=512)
    waited = []
    for number, batch in enumerate(packed(packer, lengths, 3 * packer.patience + 50)):
        waited += [number - document.arrived for sequence in batch for document in sequence]
    assert max(waited) <= packer.patience + 150 // sequences + 1
    assert max(waited) >= packer.patience  # it would have waited longer


def test_full_batches_are_made_whenever_the_pool_is_not_hungry():
    packer = Packer(sequences=8, capacity=64)
    draw = np.random.default_rng(2)
    for batch in packed(packer, iter(lambda: int(draw.integers(1, 65)), 0), 50):
        assert len(batch) == 8


def test_packing_goes_on_from_its_state():
    lengths = [int(length) for length in np.random.default_rng(3).integers(1, 60, 3000)]
    whole = Packer(sequences=4, capacity=64)
    source = iter(lengths)
    batches = packed(whole, source, 20)
    cut = Packer(sequences=4, capacity=64)
    source = iter(lengths)
    packed(cut, source, 9)
    resumed = Packer(sequences=4, capacity=64)
    resumed.restore(tuple(cut.pool), cut.batch)
    for batch in batches[9:]:
        while resumed.hungry:
            resumed.add(piece(next(source), 0, resumed.batch))
        again = [[len(document) for document in sequence] for sequence in resumed.pack()]
        assert again == [[len(document) for document in sequence] for sequence in batch]


def test_a_document_that_fits_no_sequence_is_refused():
    with pytest.raises(ValueError, match="65 tokens does not fit"):
        Packer(sequences=1, capacity=64).add(piece(65, 0))
