"""Exact resume: batches after a reload are those of an uninterrupted run, to the bit, whoever reads."""

import json
from pathlib import Path

import pytest
import torch
from encoder_batches import data_params, equal, loader, take
from encoder_data import sentences, write_jsonl, write_parquet

from inft.encoders.data import blocks
from inft.encoders.data.batches import LoaderState, PretrainingBatches
from params.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, Path]:
    """The same 700 texts, long ones among them, as jsonl and as parquet, in three shards."""
    root = tmp_path_factory.mktemp("shards")
    texts = [text if i % 50 else " ".join([text] * 12) for i, text in enumerate(sentences(700))]
    for i in range(3):
        some = texts[i * 250 : (i + 1) * 250]
        write_jsonl(root / "jsonl" / f"train-{i}.jsonl", some)
        write_parquet(root / "parquet" / f"train-{i}.parquet", some)
    return {"jsonl": root / "jsonl", "parquet": root / "parquet"}


def reload(batches: PretrainingBatches, directory: Path) -> LoaderState:
    """The state after it went through files."""
    batches.state().save(directory)
    return LoaderState.load(directory)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_batches_after_a_reload_equal_those_of_an_uninterrupted_run(shards, kind, streaming, packed, tmp_path):
    params = data_params(shards[kind], dataset__streaming=streaming, datacollator__pack_sequences=packed)
    whole = take(loader(params), 230)  # of more than two epochs
    cut = loader(params)
    for step in (1, 2, 37, 110, 200):
        take(cut, step - cut.state().batch)
        resumed = loader(params, reload(cut, tmp_path))
        assert resumed.counts == cut.counts
        for batch, again in zip(whole[step : step + 25], take(resumed, 25), strict=True):
            assert equal(batch, again), step
        assert resumed.epoch >= cut.epoch


@pytest.mark.parametrize("streaming", [True, False])
def test_every_process_goes_on_where_it_stopped_and_reserved_rows_stay_out(shards, tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 16)
    params = data_params(
        shards["parquet"],
        dataset__streaming=streaming,
        dataset__eval_samples=260,
        datacollator__pack_sequences=True,
    )
    for rank in (0, 1):
        whole = take(loader(params, rank=rank, world_size=2), 60)
        cut = loader(params, rank=rank, world_size=2)
        take(cut, 31)
        resumed = loader(params, reload(cut, tmp_path), rank=rank, world_size=2)
        assert all(map(equal, whole[31:], take(resumed, 29)))
        # Shard 0 is reserved whole, and of shard 1 the first ten rows.
        assert min(key for batch in whole for key in batch.keys) >= (1 << 40) + 10
        assert resumed.epoch > 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_batches_do_not_depend_on_workers_and_a_resume_may_change_them(shards, streaming, packed, tmp_path):
    params = data_params(shards["jsonl"], dataset__streaming=streaming, datacollator__pack_sequences=packed)
    whole = take(loader(params), 60)

    def with_workers(count: int, persistent: bool | None = None):
        return data_params(
            shards["jsonl"],
            dataset__streaming=streaming,
            datacollator__pack_sequences=packed,
            dataset__num_workers=count,
            dataset__persistent_workers=persistent,
        )

    two = loader(with_workers(2))
    assert all(map(equal, whole[:33], take(two, 33)))
    state = reload(two, tmp_path)
    two.close()
    for params in (with_workers(1, persistent=False), with_workers(0)):
        resumed = loader(params, state)
        assert all(map(equal, whole[33:60], take(resumed, 27)))
        resumed.close()


def test_workers_that_do_not_persist_go_through_the_epochs(shards):
    params = data_params(shards["jsonl"], trainer__per_device_train_batch_size=64)
    changed = data_params(
        shards["jsonl"],
        trainer__per_device_train_batch_size=64,
        dataset__num_workers=1,
        dataset__persistent_workers=False,
    )
    ended = loader(changed)
    assert all(map(equal, take(loader(params), 40), take(ended, 40)))
    assert ended.epoch > 2
    ended.close()


def test_the_random_numbers_of_training_do_not_depend_on_who_reads(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        batches = loader(data_params(shards["jsonl"], dataset__num_workers=workers))
        take(batches, 2)
        batches.close()
        assert torch.equal(torch.get_rng_state(), before)


def test_a_resume_with_other_settings_is_refused(shards, tmp_path):
    params = data_params(shards["jsonl"])
    batches = loader(params)
    take(batches, 3)
    state = reload(batches, tmp_path)
    changed = data_params(shards["jsonl"], datacollator__mlm_probability=0.2, dataset__max_seq_length=32)
    with pytest.raises(UserError, match=r"max_seq_length 64 -> 32.*mlm_probability 0.15 -> 0.2"):
        loader(changed, state)
    with pytest.raises(UserError, match="processes 1 -> 2"):
        loader(params, state, world_size=2)
    loader(data_params(shards["jsonl"], dataset__num_workers=2, dataset__prefetch_factor=4), state)


def spoil(directory: Path, every: int, first: int = 3) -> Path:
    """Three shards of texts, of whose rows every so many cannot be read."""
    texts = sentences(700)
    for i in range(3):
        path = write_jsonl(directory / f"train-{i}.jsonl", texts[i * 250 : (i + 1) * 250])
        rows = path.read_text(encoding="utf-8").splitlines()
        for row in range(first, len(rows), every):
            rows[row] = '{"text": ' + ("7}" if row % 2 else "")
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_unreadable_rows_are_passed_over_whoever_reads_and_after_a_resume(tmp_path, streaming, packed):
    place = spoil(tmp_path / "data", 60)

    def params(**changed):
        how = {"dataset__streaming": streaming, "datacollator__pack_sequences": packed, **changed}
        return data_params(place, dataset__max_bad_fraction=0.1, **how)

    whole = loader(params())
    batches = take(whole, 230)
    assert whole.counts.bad > 13  # more than one epoch
    assert len(whole.bad_rows) == 5
    assert all("train-" in row and " line " in row for row in whole.bad_rows)
    (tmp_path / "clean").mkdir()
    write = sentences(700)
    for i in range(3):
        write_jsonl(tmp_path / "clean" / f"train-{i}.jsonl", write[i * 250 : (i + 1) * 250])
    clean = {}
    for batch in take(loader(data_params(tmp_path / "clean", trainer__per_device_train_batch_size=1)), 700):
        clean[batch.keys[0]] = batch.input_ids_T.tolist()
    single = loader(params(trainer__per_device_train_batch_size=1, datacollator__pack_sequences=False))
    while not single.state().cursor.epoch:
        batch = next(single)
        if not single.state().cursor.epoch:  # the same key and the same masks as if no row were corrupt
            assert clean[batch.keys[0]] == batch.input_ids_T.tolist()
    cut = loader(params(dataset__num_workers=2))
    assert all(map(equal, batches[:71], take(cut, 71)))
    state = reload(cut, tmp_path)
    cut.close()
    resumed = loader(params(), state)
    assert (resumed.counts, resumed.bad_rows) == (cut.counts, cut.bad_rows)
    assert all(map(equal, batches[71:], take(resumed, 159)))
    assert (resumed.counts, resumed.bad_rows) == (whole.counts, whole.bad_rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_unreadable_rows_than_are_allowed_end_the_run_which_goes_on_when_they_are(tmp_path, workers):
    place = spoil(tmp_path / "data", 20, first=15)

    def params(fraction: float):
        return data_params(
            place,
            dataset__streaming=True,
            dataset__shuffle_buffer_size=1,
            dataset__num_workers=workers,
            dataset__max_bad_fraction=fraction,
        )

    words = r"train-0\.jsonl line 16: .*\b12 of 250 rows .*4\.8%.*dataset\.max_bad_fraction 0\.01"
    with pytest.raises(UserError, match=words):
        next(loader(params(0.01)))
    with pytest.raises(UserError, match=r"train-0\.jsonl line 16: .*max_bad_fraction 0 allows"):
        next(loader(params(0.0)))
    whole = take(loader(params(0.2)), 150)
    cut = loader(params(0.2))
    take(cut, 40)
    assert all(map(equal, whole[40:], take(loader(params(0.3), reload(cut, tmp_path)), 110)))


def test_few_rows_are_judged_at_the_end_of_the_data_and_none_is_allowed_to_be_corrupt_with_zero(tmp_path):
    texts = sentences(20)
    write_jsonl(tmp_path / "data" / "train.jsonl", [*texts[:5], 3, *texts[5:]])
    params = data_params(tmp_path / "data", trainer__per_device_train_batch_size=1)
    batches = loader(params)
    take(batches, 20)
    state = reload(batches, tmp_path)
    with pytest.raises(UserError, match=r"train\.jsonl line 6: .*1 of 21 rows"):
        next(batches)
    single = {"trainer__per_device_train_batch_size": 1}
    raised = loader(data_params(tmp_path / "data", dataset__max_bad_fraction=0.1, **single), state)
    take(raised, 60)
    assert raised.counts.bad == 4
    with pytest.raises(UserError, match=r"train\.jsonl line 6: .*1 of 21 rows"):
        next(loader(data_params(tmp_path / "data", dataset__max_bad_fraction=0.0)))


@pytest.mark.parametrize("fault", ["missing", "cut", "version"])
def test_a_state_that_is_not_whole_is_a_users_error(shards, tmp_path, fault):
    batches = loader(data_params(shards["jsonl"], datacollator__pack_sequences=True))
    take(batches, 1)
    batches.state().save(tmp_path)
    if fault == "missing":
        (tmp_path / "loader.safetensors").unlink()
    elif fault == "cut":
        whole = (tmp_path / "loader.safetensors").read_bytes()
        (tmp_path / "loader.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        words = json.loads((tmp_path / "loader.json").read_text())
        (tmp_path / "loader.json").write_text(json.dumps({**words, "version": 99}))
    with pytest.raises(UserError, match=r"loader\.json"):
        LoaderState.load(tmp_path)
