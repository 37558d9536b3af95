import pytest

from inft.dataloader import MUNIChusLoadConfig, build_dataloader, build_processed_dataset
from params.errors import UserError


def test_the_training_and_the_held_out_rows_are_apart(write_jsonl, news_rows) -> None:
    config = MUNIChusLoadConfig(data=str(write_jsonl(news_rows(articles=50))), eval_fraction=0.2)
    train = build_processed_dataset(config)
    heldout = build_processed_dataset(config, "validation")
    assert len(train) + len(heldout) == 100
    assert not {s.meta["title"] for s in train} & {s.meta["title"] for s in heldout}
    assert train.loaded.fingerprint == heldout.loaded.fingerprint


def test_another_split_is_read_whole(write_jsonl, news_rows) -> None:
    write_jsonl(news_rows(articles=7), name="test.jsonl")
    config = MUNIChusLoadConfig(data=str(write_jsonl(news_rows())))
    assert len(build_processed_dataset(config, "test")) == 14


def test_bad_rows_are_listed_where_the_caller_says(write_jsonl, news_rows, tmp_path) -> None:
    rows = news_rows()
    rows[0]["image"] = None
    config = MUNIChusLoadConfig(data=str(write_jsonl(rows)), max_bad_fraction=0.5)
    file = tmp_path / "quarantine.jsonl"
    for split in (None, "validation"):
        build_processed_dataset(config, split, quarantine_file=file)
        assert "train.jsonl line 1" in file.read_text()
        file.unlink()


def test_a_split_that_a_file_does_not_have_is_an_error(write_jsonl, news_rows) -> None:
    config = MUNIChusLoadConfig(data=str(write_jsonl(news_rows(), name="pets.jsonl") / "pets.jsonl"))
    with pytest.raises(UserError, match="has no split 'test'"):
        build_processed_dataset(config, "test")


def test_the_loader_shuffles_by_the_seed_and_keeps_the_batch_size(write_jsonl, news_rows) -> None:
    config = MUNIChusLoadConfig(data=str(write_jsonl(news_rows())), batch_size=8, num_workers=2, eval_fraction=0.0)

    def answers(config: MUNIChusLoadConfig, split: str | None = None) -> list[list[str]]:
        return list(build_dataloader(config, lambda samples: [sample.answer for sample in samples], split))

    batches = answers(config)
    assert [len(batch) for batch in batches] == [8] * 5
    assert batches == answers(config)
    in_order = [sample.answer for sample in build_processed_dataset(config)]
    drawn = [answer for batch in batches for answer in batch]
    assert drawn != in_order
    assert sorted(drawn) == sorted(in_order)
