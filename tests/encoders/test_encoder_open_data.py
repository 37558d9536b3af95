"""Which documents are trained on and evaluated on, what identifies them, and what is wrong with data or tokenizer."""

import json

import pytest
from encoder_batches import TOKENIZER, data_params, documents, take, token_ids
from encoder_data import make_tokenizer, sentences, write_jsonl, write_parquet

from inft.encoders.data.batches import EvaluationBatches, PretrainingBatches
from inft.encoders.data.documents import differences, open_data
from params.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")

TEXTS = sentences(120)


def read(path, epochs: int = 1, **changed):
    """(texts' ids trained on, those evaluated on, keys of both) of the data at a path."""
    params = data_params(path, trainer__per_device_train_batch_size=1, dataset__max_seq_length=128, **changed)
    data = open_data(params, TOKENIZER)
    train = PretrainingBatches(data, TOKENIZER, params)
    trained, keys = set(), set()
    while train.state().cursor.epoch < epochs:
        batch = next(train)
        trained |= set(documents(batch))
        keys |= set(batch.keys)
    if data.heldout is None:
        return trained, None, (keys, None)
    held = list(EvaluationBatches(data, TOKENIZER, params))
    evaluated = {ids for batch in held for ids in documents(batch)}
    return trained, evaluated, (keys, {key for batch in held for key in batch.keys})


def ids(texts):
    return set(map(token_ids, texts))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["validation", "valid", "val", "eval", "test", "dev"])
def test_a_validation_style_split_is_found(tmp_path, name, streaming):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:80])
    write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[80:])
    trained, evaluated, _ = read(tmp_path, dataset__streaming=streaming)
    assert trained == ids(TEXTS[:80])
    assert evaluated == ids(TEXTS[80:])


def test_validation_comes_before_eval_test_and_dev(tmp_path):
    for i, name in enumerate(["train", "dev", "test", "eval", "validation"]):
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[i * 20 : i * 20 + 20])
    for expected in ("validation", "eval", "test", "dev"):
        assert open_data(data_params(tmp_path), TOKENIZER).heldout.split == expected
        (tmp_path / f"{expected}.jsonl").unlink()
    data = open_data(data_params(tmp_path), TOKENIZER)
    assert data.heldout is None
    assert "evaluation is skipped" in data.describe()


def test_a_named_split_is_taken_and_a_missing_one_refused_with_those_that_there_are(tmp_path):
    for i, name in enumerate(["train", "validation", "dev"]):
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[i * 20 : i * 20 + 20])
    assert open_data(data_params(tmp_path, dataset__eval_split="dev"), TOKENIZER).heldout.split == "dev"
    assert open_data(data_params(tmp_path, dataset__train_split="dev"), TOKENIZER).train.split == "dev"
    for field in ("eval_split", "train_split"):
        with pytest.raises(UserError, match=rf"no split 'tset'; it has dev, train, validation.*dataset\.{field}"):
            open_data(data_params(tmp_path, **{f"dataset__{field}": "tset"}), TOKENIZER)
    with pytest.raises(UserError, match="is the split that is trained on"):
        open_data(data_params(tmp_path, dataset__eval_split="train"), TOKENIZER)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("samples", [1, 50, 70, 99])
def test_reserved_rows_are_the_first_and_are_never_trained_on(tmp_path, streaming, samples):
    write_jsonl(tmp_path / "train-0.jsonl", TEXTS[:50])
    write_jsonl(tmp_path / "train-1.jsonl", TEXTS[50:100])
    params = {"dataset__streaming": streaming, "dataset__eval_samples": samples}
    trained, evaluated, (keys, held) = read(tmp_path, epochs=3, **params)
    assert evaluated == ids(TEXTS[:samples])
    assert trained == ids(TEXTS[samples:100])
    assert not keys & held
    assert len(keys) + len(held) == 100


@pytest.mark.parametrize("streaming", [True, False])
def test_reserving_everything_is_refused(tmp_path, streaming):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:50])
    for samples in (50, 51):
        with pytest.raises(UserError, match=rf"eval_samples {samples} leaves nothing to train on.* has 50 rows"):
            read(tmp_path, dataset__eval_samples=samples, dataset__streaming=streaming)


def test_eval_samples_beside_a_split_is_told_to_be_unused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:50])
    write_jsonl(tmp_path / "test.jsonl", TEXTS[50:60])
    data = open_data(data_params(tmp_path, dataset__eval_samples=5), TOKENIZER)
    assert (data.reserved, data.heldout.split) == (0, "test")
    assert any("eval_samples is not used" in notice for notice in data.notices)


def test_the_fingerprint_changes_with_the_data_and_with_nothing_else(tmp_path):
    def opened(directory, **changed):
        return open_data(data_params(directory, **changed), TOKENIZER)

    for place in ("a", "b"):  # the same files elsewhere
        write_jsonl(tmp_path / place / "train-0.jsonl", TEXTS[:20])
        write_jsonl(tmp_path / place / "train-1.jsonl", TEXTS[20:40])
    before = opened(tmp_path / "a")
    assert opened(tmp_path / "b").fingerprint == before.fingerprint
    assert opened(tmp_path / "a", dataset__num_workers=2, seed=4).fingerprint == before.fingerprint
    described = json.loads(json.dumps(before.description()))
    assert differences(described, opened(tmp_path / "b").description()) == []
    write_jsonl(tmp_path / "b" / "train-1.jsonl", [*TEXTS[20:39], TEXTS[39][::-1]])
    write_jsonl(tmp_path / "b" / "train-2.jsonl", TEXTS[40:50])
    after = opened(tmp_path / "b", dataset__eval_samples=3)
    assert after.fingerprint != before.fingerprint
    found = differences(described, after.description())
    assert "reserved for evaluation: 0 -> 3" in found
    assert "train: train-1.jsonl: other content" in found
    assert "train: train-2.jsonl is new" in found
    assert not any("train-0" in line for line in found)
    assert "evaluation: None -> split train" in found


def test_empty_shards_are_named_and_skipped(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", [])
    write_jsonl(tmp_path / "train-1.jsonl", TEXTS[:30])
    write_parquet(tmp_path / "train-2.parquet", [])
    trained, _, _ = read(tmp_path)
    assert trained == ids(TEXTS[:30])
    data = open_data(data_params(tmp_path), TOKENIZER)
    assert "empty shards of split train are skipped: train-0.jsonl, train-2.parquet." in data.describe()
    streamed, _, _ = read(tmp_path, dataset__streaming=True, epochs=2)
    assert streamed == trained


@pytest.mark.parametrize("streaming", [True, False])
def test_data_of_empty_shards_alone_are_refused(tmp_path, streaming):
    for i in range(2):
        write_jsonl(tmp_path / f"train-{i}.jsonl", [])
    with pytest.raises(UserError, match=r"every shard of split train is empty: train-0.jsonl, train-1.jsonl"):
        read(tmp_path, dataset__streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_missing_text_column_is_refused_with_those_that_there_are(tmp_path, write, streaming):
    write(tmp_path / f"train.{write.__name__.removeprefix('write_')}", TEXTS[:5], column="content", language=["en"] * 5)
    with pytest.raises(UserError, match=r"no column 'text'\. Its columns are: content, language.*dataset\.text_column"):
        open_data(data_params(tmp_path, dataset__streaming=streaming), TOKENIZER)
    open_data(data_params(tmp_path, dataset__streaming=streaming, dataset__text_column="content"), TOKENIZER)


def test_a_missing_language_column_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", TEXTS[:5])
    with pytest.raises(UserError, match=r"no column 'lang'.*dataset\.language_column"):
        open_data(data_params(tmp_path, dataset__language_column="lang"), TOKENIZER)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_language_column_that_no_row_of_json_has_is_refused(tmp_path, suffix, streaming):
    rows = [{"text": text, "language": "en", **({"id": 4} if i else {})} for i, text in enumerate(TEXTS[:5])]
    lines = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"train.{suffix}").write_text(lines)
    how = {"dataset__streaming": streaming}
    with pytest.raises(UserError, match=r"no column 'lang'\. Its columns are: text, language, id.*language_column"):
        open_data(data_params(tmp_path, dataset__language_column="lang", **how), TOKENIZER)
    open_data(data_params(tmp_path, dataset__language_column="language", **how), TOKENIZER)


def test_a_document_must_have_room_beside_its_special_tokens(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:5])
    with pytest.raises(UserError, match=r"dataset\.max_seq_length 2 .* 2 special tokens"):
        open_data(data_params(tmp_path, dataset__max_seq_length=2), TOKENIZER)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("value", [17, ["a", "b"], {"text": "x"}, True])
def test_something_else_than_text_is_refused_with_its_row(tmp_path, value, workers):
    write_jsonl(tmp_path / "train.jsonl", [*TEXTS[:6], value, *TEXTS[6:9]])
    with pytest.raises(UserError, match=rf"train\.jsonl line 7: its text is {type(value).__name__}") as caught:
        read(tmp_path, dataset__num_workers=workers)
    assert "Traceback" not in str(caught.value)


def test_nothing_to_read_is_refused_with_a_remedy(tmp_path):
    cases = {
        str(tmp_path / "no"): "neither a file, a directory nor a glob",
        str(tmp_path): "holds no file",
        "owner/name": "dataset.name: owner/name",
        None: "dataset.path",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words):
            open_data(data_params(path), TOKENIZER)


def test_a_path_beside_a_name_is_read_and_told(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:5])
    data = open_data(data_params(tmp_path, dataset__name="owner/name"), TOKENIZER)
    assert "dataset.name owner/name is not" in data.describe()


def test_a_tokenizer_that_does_not_serve_is_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:5])
    with pytest.raises(UserError, match=r"no mask token.*add_special_tokens"):
        open_data(data_params(tmp_path), make_tokenizer(mask=False))
    with pytest.raises(UserError, match=rf"has {len(TOKENIZER)} tokens, model\.vocab_size is 150.*at least"):
        open_data(data_params(tmp_path, model__vocab_size=150), TOKENIZER)
    open_data(data_params(tmp_path, model__vocab_size=len(TOKENIZER)), TOKENIZER)  # as many, or fewer, will do
    open_data(data_params(tmp_path, model__vocab_size=150, model__name="stored"), TOKENIZER)  # it brings its own


def test_documents_longer_than_the_models_context_are_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:5])
    with pytest.raises(UserError, match=r"max_seq_length 256 is above model\.max_position_embeddings 128"):
        open_data(data_params(tmp_path, dataset__max_seq_length=256), TOKENIZER)


def test_languages_follow_their_documents_and_may_be_missing_in_a_row(tmp_path):
    rows = [{"text": "the red boat", "lang": "en"}, {"text": "der alte Mann"}, {"text": "la fille", "lang": None}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    params = data_params(tmp_path, dataset__language_column="lang", trainer__per_device_train_batch_size=3)
    (batch,) = take(PretrainingBatches(open_data(params, TOKENIZER), TOKENIZER, params), 1)
    assert dict(zip(batch.keys, batch.languages, strict=True)) == {0: "en", 1: None, 2: None}
