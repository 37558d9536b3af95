"""How an encoder's run ends and goes on where something went wrong: nothing that was accepted is lost."""

import shutil
from pathlib import Path

import pytest
import torch
from encoder_data import sentences, write_jsonl
from encoder_runs import events, losses, run_tiny, tiny_params, write_data
from rich.console import Console

from inft.encoders.checkpoints import MODELS, STATES, newest_model
from inft.encoders.pretrain import MaskedTokens, build, pretrain
from inft.encoders.run import Parts, run_encoder
from params.encoder_resolve import resolve_encoder
from params.errors import UserError

torch.set_num_threads(1)
QUIET = Console(quiet=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_after_going_back_the_newest_weights_are_those_written_last(place):
    run_tiny(place, trainer__save_steps=2, scheduler__decay_steps=6)
    back = {"trainer__resume_from_checkpoint": str(place / "run" / STATES / "2"), "scheduler__decay_steps": 6}
    run_tiny(place, trainer__save_steps=1, trainer__max_steps=3, trainer__save_total_limit=1, **back)
    assert steps(place / "run" / STATES) == ["3"]
    assert steps(place / "run" / MODELS) == ["3"]
    assert newest_model(place / "run") == place / "run" / MODELS / "3"


def test_a_model_that_was_not_stored_before_a_kill_is_stored_by_the_resume(place):
    run_tiny(place)
    weights = (place / "run" / MODELS / "6" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "run" / MODELS / "6")
    result = run_tiny(place, trainer__resume_from_checkpoint="latest")
    assert result.model_dir == place / "run" / MODELS / "6"
    assert (result.model_dir / "model.safetensors").read_bytes() == weights


def test_what_became_of_the_documents_is_logged_and_told(place, capsys):
    texts = [" ".join(sentences(12, seed=i)) for i in range(20)]
    write_jsonl(place / "data" / "train-1.jsonl", [*texts, ""], language=["en"] * 21)
    pretrain(tiny_params(place), console=Console())
    counts = events(place, "log")[-1]["documents"]
    assert counts["split"] >= 20
    assert counts["documents"] == counts["documents"] // 51 * 51, "whole epochs are read ahead of 24 documents"
    told = capsys.readouterr().out
    assert f"{counts['documents']:,} documents read: " in told
    assert f"{counts['split']:,} split" in told


class Broken(MaskedTokens):
    """Real masked tokens of which the fifth micro-batch cannot be read."""

    read = 0

    def next_batch(self):
        self.read += 1
        if self.read == 5:
            raise UserError("train-0.jsonl line 7: not JSON")
        return super().next_batch()


def broken(params, console):
    parts = build(params, console)
    task = Broken(params, parts.tokenizer, parts.task.data)
    return Parts(tokenizer=parts.tokenizer, model=parts.model, task=task)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mistake_in_the_data_ends_a_run_with_its_last_step_saved(place, packed):
    told = {"datacollator__pack_sequences": packed, "trainer__save_steps": 100, "scheduler__decay_steps": 6}
    with pytest.raises(UserError, match="line 7"):
        run_encoder(tiny_params(place, **told), broken, console=QUIET)
    assert steps(place / "run" / STATES) == steps(place / "run" / MODELS) == ["4"]
    run_tiny(place, trainer__resume_from_checkpoint="latest", **told)
    run_tiny(place, trainer__run_name="whole", trainer__output_dir=str(place / "whole"), **told)
    assert losses(place) == losses(place, "whole")


def test_an_evaluation_without_a_token_to_predict_is_refused(place):
    write_jsonl(place / "data" / "validation.jsonl", [""], language=["en"])
    with pytest.raises(UserError, match=r"no token to predict|every document is empty"):
        run_tiny(place)


def test_a_run_that_began_with_stored_weights_goes_on_without_them(place):
    first = run_tiny(place).model_dir
    told = {"model__name": str(first), "tokenizer__name": None, "trainer__output_dir": str(place / "second")}
    told |= {"trainer__run_name": "second", "scheduler__decay_steps": 6}
    run_tiny(place, trainer__max_steps=3, **told)
    shutil.rmtree(place / "run")
    result = run_tiny(place, trainer__max_steps=6, trainer__resume_from_checkpoint="latest", **told)
    assert result.outcome.step == 6


def test_a_launchers_variables_change_nothing(place, monkeypatch):
    run_tiny(place, trainer__run_name="plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run_tiny(place, trainer__run_name="launched", trainer__output_dir=str(place / "other"))
    assert losses(place, "launched") == losses(place, "plain")
    norms = [[event["grad_norm"] for event in events(place, "log", name)] for name in ("plain", "launched")]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(
    ("variable", "title"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_sharded_weights_are_refused_before_anything_is_made(place, monkeypatch, variable, title):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"under {title}.*torchrun"):
        run_tiny(place)
    assert not (place / "run").exists()


def test_a_step_without_any_masked_token_changes_no_weight(place):
    alone = write_jsonl(place / "one" / "one.jsonl", ["boat 1"])
    told = {"dataset__path": str(alone), "dataset__language_column": None, "datacollator__mlm_probability": 1e-9}
    params = tiny_params(place, optimizer__weight_decay=0.5, trainer__max_steps=2, **told)
    made = []

    def kept(params, console):
        made.append(build(params, console))
        made.append({name: weight.clone() for name, weight in made[0].model.state_dict().items()})
        return made[0]

    run_encoder(params, kept, console=QUIET)
    after = made[0].model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in made[1].items())


def test_longer_training_than_planned_says_what_would_have_kept_it_possible(place):
    run_tiny(place)
    with pytest.raises(UserError, match=r"give scheduler\.decay_steps from the start"):
        run_tiny(place, trainer__resume_from_checkpoint="latest", trainer__max_steps=12)


def test_a_directory_that_cannot_be_written_is_a_message(place):
    (place / "file").write_text("mine")
    with pytest.raises(UserError, match=r"trainer\.output_dir"):
        run_tiny(place, trainer__output_dir=str(place / "file"))


def test_a_hub_configuration_belongs_to_a_hub_data_set(place):
    with pytest.raises(UserError, match=r"dataset\.config is of a hub data set"):
        resolve_encoder("pretraining", arguments=["--dataset.path", "x", "--dataset.config", "en"])
