"""The layout of a batch, what becomes of long and empty documents, static shapes, evaluation, loader settings."""

import os
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
from encoder_batches import TOKENIZER, data_params, documents, equal, loader, take, token_ids
from encoder_data import language_of, sentences, write_jsonl

from inft.encoders.data import reader
from inft.encoders.data.batches import EvaluationBatches, PretrainingBatches
from inft.encoders.data.counts import Counts
from inft.encoders.data.documents import open_data
from inft.encoders.data.flat import rounded_up
from inft.encoders.data.reader import loader_settings
from inft.encoders.data.tokenised import Reading, pieces_of
from params.encoder import DatasetParams
from params.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    texts = sentences(260)
    languages = [language_of(i) for i in range(260)]
    write_jsonl(root / "train.jsonl", texts[:200], language=languages[:200])
    write_jsonl(root / "validation.jsonl", texts[200:], language=languages[200:])
    return root


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_is_documents_in_a_row_with_positions_from_zero(data, packed):
    params = data_params(data, datacollator__pack_sequences=packed, dataset__language_column="language")
    for batch in take(loader(params), 10):
        ends = batch.cu_seqlens.tolist()
        lengths = [b - a for a, b in pairwise(ends)]
        assert batch.cu_seqlens.dtype == torch.int32
        assert ends[0] == 0
        assert ends[-1] == batch.tokens == len(batch.input_ids_T) == len(batch.labels_T)
        assert batch.position_ids_T.tolist() == [i for length in lengths for i in range(length)]
        assert batch.max_seqlen == max(lengths) <= 64
        assert batch.masked == int((batch.labels_T != -100).sum())
        assert len(batch.keys) == len(batch.languages) == len(lengths)
        assert batch.languages == tuple(language_of(key) for key in batch.keys)
        for ids in documents(batch):
            assert (ids[0], ids[-1]) == (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id)
        if not packed:
            assert len(batch.keys) == 4


def test_full_packed_batches_are_full_and_undersized_ones_hold_as_many_documents(data):
    full = take(loader(data_params(data, datacollator__pack_sequences=True)), 20)
    assert sum(batch.tokens for batch in full) / (20 * 4 * 64) > 0.95
    undersized = data_params(data, datacollator__pack_sequences=True, trainer__enforce_full_packed_batches=False)
    assert [len(batch.keys) for batch in take(loader(undersized), 20)] == [4] * 20


@pytest.mark.parametrize("packed", [True, False])
def test_static_batches_have_one_shape_and_padding_that_predicts_nothing(data, packed):
    how = {"datacollator__pack_sequences": packed, "dataset__max_seq_length": 96}
    plain, static = loader(data_params(data, **how)), loader(data_params(data, **how, trainer__torch_compile=True))
    shapes = set()
    for batch in take(static, 12):
        ends, real = batch.cu_seqlens.tolist(), len(batch.keys)
        shapes.add((len(batch.input_ids_T), len(ends), batch.max_seqlen))
        assert ends[real] == batch.tokens <= len(batch.input_ids_T) == ends[-1] == 4 * 96
        assert all(b - a <= 96 for a, b in pairwise(ends))
        assert (batch.input_ids_T[batch.tokens :] == TOKENIZER.pad_token_id).all()
        assert (batch.labels_T[batch.tokens :] == -100).all()
        assert (batch.position_ids_T < 96).all()
    assert len(shapes) == 1
    if not packed:  # the documents are those of batches without padding
        again = take(loader(data_params(data, **how, trainer__torch_compile=True)), 5)
        for one, other in zip(take(plain, 5), again, strict=True):
            assert one.input_ids_T.equal(other.input_ids_T[: other.tokens])
            assert one.labels_T.equal(other.labels_T[: other.tokens])
    dynamic = data_params(data, **how, trainer__torch_compile=True, trainer__torch_compile_dynamic=True)
    assert next(loader(dynamic)).tokens == len(next(loader(dynamic)).input_ids_T)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("multiple", [16, 128])
def test_a_batch_is_rounded_up_by_documents_no_longer_than_its_longest(data, multiple, compiled):
    params = data_params(data, trainer__per_device_train_batch_size=1, trainer__torch_compile=compiled)
    for batch in take(loader(params), 12):
        found = rounded_up(batch, multiple, 7)
        ends = found.cu_seqlens.tolist()
        assert len(found.input_ids_T) == len(found.labels_T) == len(found.position_ids_T) == ends[-1]
        assert ends[-1] % multiple == 0
        assert ends[-1] - len(batch.input_ids_T) < multiple
        assert ends[: len(batch.cu_seqlens)] == batch.cu_seqlens.tolist()
        assert ends[len(found.keys)] == found.tokens == batch.tokens
        lengths = [b - a for a, b in pairwise(ends)]
        assert max(lengths) == found.max_seqlen == batch.max_seqlen if not compiled else max(lengths) <= 64
        assert found.position_ids_T.tolist() == [i for length in lengths for i in range(length)]
        padding = len(batch.input_ids_T)
        assert (found.input_ids_T[padding:] == 7).all()
        assert (found.labels_T[padding:] == -100).all()


def test_the_epoch_grows_with_the_documents_that_are_taken(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", sentences(40))
    for streaming in (True, False):
        params = data_params(tmp_path, dataset__streaming=streaming, dataset__shuffle_buffer_size=1000)
        batches = loader(params)
        epochs = []
        for _ in range(20):
            next(batches)
            epochs.append(round(batches.epoch, 9))
        assert epochs == [round(4 * (i + 1) / 40, 9) for i in range(20)]


@pytest.mark.parametrize("what", ["training", "evaluation"])
def test_a_reading_process_that_is_killed_is_told_with_a_remedy(data, monkeypatch, what):
    monkeypatch.setattr(reader, "block_documents", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    params = data_params(data, dataset__num_workers=1)
    kind = PretrainingBatches if what == "training" else EvaluationBatches
    batches = kind(open_data(params, TOKENIZER), TOKENIZER, params)
    with pytest.raises(UserError, match=r"reading process .*memory.*dataset\.num_workers"):
        next(iter(batches))


def test_long_documents_are_split_between_their_special_tokens(tmp_path):
    long = " ".join(sentences(10))
    write_jsonl(tmp_path / "train.jsonl", [long, "the red boat"])
    batches = loader(data_params(tmp_path, dataset__max_seq_length=32, trainer__per_device_train_batch_size=1))
    found: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    while batches.state().cursor.epoch == 0:
        batch = next(batches)
        if batches.state().cursor.epoch == 0:
            found[batch.keys[0]] += documents(batch)
    assert found[1] == [token_ids("the red boat")]
    pieces = found[0]
    whole = token_ids(long)
    assert all(len(piece) <= 32 and piece[0] == whole[0] and piece[-1] == whole[-1] for piece in pieces)
    assert [len(piece) for piece in pieces[:-1]] == [32] * (len(pieces) - 1)
    assert [token for piece in pieces for token in piece[1:-1]] == list(whole[1:-1])


def test_pieces_of_one_document_are_masked_differently(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["old " * 200])
    batch = next(loader(data_params(tmp_path, trainer__per_device_train_batch_size=3)))
    length = batch.max_seqlen
    masks = [tuple((batch.labels_T[i * length : (i + 1) * length] != -100).tolist()) for i in range(3)]
    assert len(set(batch.keys)) == 1
    assert len(set(masks)) == 3


def test_long_and_empty_documents_are_counted(tmp_path):
    long = " ".join(sentences(10))
    write_jsonl(tmp_path / "train.jsonl", ["the red boat", long, "", "  \n ", None, "old man"])
    split = loader(data_params(tmp_path, trainer__per_device_train_batch_size=1))
    next(split)
    assert split.counts.asdict() == {"documents": 6, "split": 1, "dropped": 0, "empty": 3, "bad": 0}
    params = data_params(tmp_path, dataset__long_documents="drop", trainer__per_device_train_batch_size=2)
    dropped = loader(params)
    assert sorted(documents(next(dropped))) == sorted([token_ids("the red boat"), token_ids("old man")])
    assert dropped.counts.asdict() == {"documents": 6, "split": 0, "dropped": 1, "empty": 3, "bad": 0}


def test_counts_in_words_name_what_there_is():
    assert Counts(documents=1204).words() == "1,204 documents read"
    told = Counts(documents=1204, split=60, dropped=3, empty=1, bad=2).words()
    assert told == "1,204 documents read: 60 split, 3 dropped, 1 empty, 2 unreadable"
    assert Counts(documents=1, empty=1).words() == "1 document read: 1 empty"


def test_data_without_a_single_document_end_the_run_with_the_counts(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["", " ", "\t"])
    with pytest.raises(UserError, match=r"every document is empty \(6 were\)"):
        next(loader(data_params(tmp_path)))


def test_a_special_tokens_name_in_a_text_is_an_ordinary_word(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["the [MASK] boat [SEP] home"])
    params = data_params(tmp_path, trainer__per_device_train_batch_size=1)
    (ids,) = documents(next(loader(params)))
    assert TOKENIZER.mask_token_id not in ids
    assert ids.count(TOKENIZER.sep_token_id) == 1
    assert TOKENIZER.mask_token_id in TOKENIZER("the [MASK] boat")["input_ids"]  # for others it is what it was


def test_pieces_hold_unknown_words_and_nothing_of_empty_documents():
    cls, sep, unk = (TOKENIZER.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "[UNK]"))
    reading = Reading(
        tokenizer=TOKENIZER, text_column="text", language_column=None, max_length=3, long_documents="split"
    )

    def pieces(*ids: int) -> list[list[int]]:
        tokens = np.array(ids)
        return [piece.tolist() for piece in pieces_of(tokens, reading.words(tokens), 3)]

    assert pieces(cls, unk, unk, sep) == [[cls, unk, sep], [cls, unk, sep]]
    assert pieces(cls, sep) == pieces() == []


def test_evaluation_is_the_same_each_time_and_in_every_run(data):
    def batches(**changed):
        params = data_params(data, trainer__per_device_eval_batch_size=8, **changed)
        return EvaluationBatches(open_data(params, TOKENIZER), TOKENIZER, params)

    first = batches()
    whole = list(first)
    assert [len(batch.keys) for batch in whole] == [8] * 7 + [4]
    assert all(map(equal, whole, list(first)))
    for changed in ({"seed": 9}, {"datacollator__mlm_probability": 0.4}, {"dataset__num_workers": 1}):
        again = list(batches(**changed))
        assert len(again) == len(whole)
        assert all(map(equal, whole, again)), changed
    assert all((batch.input_ids_T[batch.labels_T != -100] == 4).all() for batch in batches(datacollator__mask_all=True))


def test_processes_share_the_evaluation_and_its_limit(data):
    params = data_params(data, trainer__per_device_eval_batch_size=8, trainer__eval_max_batches=5)
    found = open_data(params, TOKENIZER)
    whole = list(EvaluationBatches(found, TOKENIZER, params))
    assert len(whole) == 5
    shares = [list(EvaluationBatches(found, TOKENIZER, params, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 2]
    assert all(equal(whole[i], shares[i % 2][i // 2]) for i in range(5))
    # A limited evaluation is not of the first rows alone.
    assert max(key for batch in whole for key in batch.keys) > 45


def test_a_streamed_evaluation_has_a_limit_of_its_own_which_can_be_set(data):
    params = data_params(data, dataset__streaming=True, trainer__per_device_eval_batch_size=1)
    assert EvaluationBatches(open_data(params, TOKENIZER), TOKENIZER, params).max_batches == 64
    params = data_params(data, dataset__streaming=True, trainer__eval_max_batches=3)
    assert len(list(EvaluationBatches(open_data(params, TOKENIZER), TOKENIZER, params))) == 2  # 60 rows of 32 at a time
    whole = data_params(data)
    assert EvaluationBatches(open_data(whole, TOKENIZER), TOKENIZER, whole).max_batches is None


def test_cuda_gets_settings_for_throughput_where_none_are_made():
    unset = loader_settings(DatasetParams(), "cuda", cpus=8)
    assert (unset.num_workers, unset.pin_memory, unset.persistent_workers, unset.prefetch_factor) == (4, True, True, 4)
    assert "dataset.num_workers" in unset.notices[0]
    told = DatasetParams(num_workers=2, pin_memory=False, persistent_workers=False, prefetch_factor=7)
    kept = loader_settings(told, "cuda", cpus=8)
    assert (kept.num_workers, kept.pin_memory, kept.persistent_workers, kept.prefetch_factor) == (2, False, False, 7)
    assert "dataset.pin_memory" in kept.notices[0]


def test_settings_without_effect_are_told():
    plain = loader_settings(DatasetParams(), "cpu")
    assert (plain.num_workers, plain.pin_memory, plain.persistent_workers, plain.prefetch_factor) == (
        0,
        False,
        False,
        None,
    )
    assert plain.notices == ()
    told = loader_settings(DatasetParams(pin_memory=True, prefetch_factor=3, persistent_workers=True), "cpu")
    words = " ".join(told.notices)
    assert all(name in words for name in ("pin_memory", "prefetch_factor", "persistent_workers"))
    assert not told.pin_memory
    assert loader_settings(DatasetParams(num_workers=2), "cpu").prefetch_factor == 2
