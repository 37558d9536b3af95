"""The commands of text encoders: their arguments, refusals and lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.cli.dotted import parted, with_latest
from inft.cli.logtext import run_row
from params.describe import describe
from params.encoder_resolve import ENCODER

WORDS = st.lists(st.sampled_from(["neobert", "run.yaml", "--demo", "-o", "out", "--resume", "latest"]), max_size=5)
PAIRS = st.lists(st.sampled_from([["--trainer.max_steps", "3"], ["--seed.x=1"], ["--a.b", "-1"]]), max_size=4)


def test_dotted_arguments_are_set_aside_with_their_values():
    own, dotted = parted(["neobert", "--trainer.max_steps", "3", "run.yaml", "--model.rope=false", "--overwrite"])
    assert own == ["neobert", "run.yaml", "--overwrite"]
    assert dotted == ["--trainer.max_steps", "3", "--model.rope=false"]


@given(words=WORDS, pairs=PAIRS, order=st.randoms())
def test_nothing_is_lost_wherever_dotted_arguments_stand(words, pairs, order):
    pieces = [[word] for word in words] + pairs
    order.shuffle(pieces)
    own, dotted = parted([text for piece in pieces for text in piece])
    assert sorted(own + dotted) == sorted(words + [text for pair in pairs for text in pair])
    assert sorted(own) == sorted(words)


def test_a_lone_resume_means_the_latest():
    assert with_latest(["neobert", "--resume"]) == ["neobert", "--resume", "latest"]
    assert with_latest(["--resume", "--overwrite"]) == ["--resume", "latest", "--overwrite"]
    assert with_latest(["--resume", "out/checkpoints/5"]) == ["--resume", "out/checkpoints/5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "bert"], "unknown encoder 'bert'; known: neobert"),
        (["pretrain", "neobert", "--demo", "x.yaml"], "--demo brings its own"),
        (["pretrain", "neobert", "x.yaml", "--continue-from", "run"], "leave CONFIG out"),
        (["pretrain", "neobert", "x.yaml"], "x.yaml: no such file. These ship: configs/"),
        (["pretrain", "neobert"], "there is no data: give dataset.path"),
        (["pretrain", "neobert", "--dataset.path", "x", "--trainer.max_step", "3"], "did you mean trainer.max_steps"),
        (["pretrain", "neobert", "--continue-from", "nowhere"], "holds no pretraining run"),
        (["finetune-encoder", "configs/pretraining/pretrain_neobert.yaml"], "inft pretrain neobert runs it"),
        (["preprocess", "--task", "captions"], "choose pretraining or contrastive"),
        (["list-params", "torchao"], "It is one of --encoder"),
    ],
)
def test_a_mistake_is_a_message_and_status_2(inft, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    ended = inft(*arguments)
    assert ended.status == 2
    assert words in " ".join(ended.err.split())
    assert list(tmp_path.iterdir()) == []


def test_preprocess_does_not_write_over_what_is_there(inft, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    ended = inft("preprocess", "--dataset.path", "x", "-o", str(tmp_path / "out"))
    assert ended.status == 2
    assert "give --overwrite" in ended.err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_every_parameter_of_encoders_is_listed(inft):
    out = inft("list-params", "--encoder").out
    names = [text.name for section in ENCODER.sections for text in describe(section, ENCODER)]
    assert [name for name in names if name not in out] == []


def test_a_log_row_names_the_encoder_and_its_data():
    params = {"model": {"name": None, "num_hidden_layers": 4, "hidden_size": 128}, "dataset": {"path": "texts"}}
    start = {"event": "run_start", "time": 0.0, "params": params}
    assert run_row("neobert", [start])[1:4] == ("neobert", "new, 4 x 128", "texts")
    params["model"]["name"] = "outputs/neobert/model_checkpoints/9"
    assert run_row("neobert", [start])[2] == "outputs/neobert/model_checkpoints/9"
