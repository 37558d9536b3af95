"""MTEB's adapter; what needs the library runs where it is installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_text_encoders import tiny_sentence_encoder

from inft.encoders.evaluation.mteb import SUMMARY, MissingTask, exported_encoder, mteb_table, run_mteb
from params.errors import UserError

needs_mteb = pytest.mark.skipif(find_spec("mteb") is None, reason="the extra mteb is not installed")


@pytest.mark.skipif(find_spec("mteb") is not None, reason="the extra mteb is installed")
def test_without_the_library_the_command_to_install_it_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"pip install 'inft\[mteb\]'"):
        run_mteb(tmp_path, ["STS12"], tmp_path / "out")


@needs_mteb
def test_an_exported_encoder_is_scored_on_a_task_of_the_library(tmp_path: Path):
    from mteb.mocks.mock_tasks.sts import MockSTSTask

    directory = tiny_sentence_encoder(tmp_path / "model")
    scores = run_mteb(directory, [MockSTSTask()], tmp_path / "out")
    assert list(scores) == [MockSTSTask.metadata.name]
    assert -1 <= next(iter(scores.values())) <= 1
    assert (tmp_path / "out" / SUMMARY).is_file()
    assert mteb_table(scores).row_count == 1


@needs_mteb
def test_results_of_other_weights_are_not_taken_for_this_models(tmp_path: Path):
    one = exported_encoder(tiny_sentence_encoder(tmp_path / "a" / "model", seed=0)).mteb_model_meta
    other = exported_encoder(tiny_sentence_encoder(tmp_path / "b" / "model", seed=1)).mteb_model_meta
    assert one.name == other.name == "local/model"
    assert one.revision != other.revision
    copy = exported_encoder(tiny_sentence_encoder(tmp_path / "c" / "model", seed=0)).mteb_model_meta
    assert copy.revision == one.revision


@needs_mteb
def test_an_unknown_task_is_told_with_the_nearest(tmp_path: Path):
    with pytest.raises(MissingTask, match="STS12"):
        run_mteb(tiny_sentence_encoder(tmp_path / "model"), ["STS12x"], tmp_path / "out")


@needs_mteb
def test_a_directory_that_was_not_exported_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"modules\.json"):
        exported_encoder(tmp_path)


@needs_mteb
def test_data_out_of_reach_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded"):
        run_mteb(tiny_sentence_encoder(tmp_path / "model"), ["STS12"], tmp_path / "out")


def test_scores_of_another_model_are_not_replaced_unasked(tmp_path: Path):
    (tmp_path / SUMMARY).write_text(json.dumps({"model": "other", "scores": {}}))
    with pytest.raises(UserError, match=r"holds the scores of other: give --overwrite"):
        run_mteb(tmp_path, ["STS12"], tmp_path)
    (tmp_path / SUMMARY).write_text("[]")
    with pytest.raises(UserError, match=r"is no summary of scores"):
        run_mteb(tmp_path, ["STS12"], tmp_path)
