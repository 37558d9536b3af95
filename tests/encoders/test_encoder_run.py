"""A pretraining run: what it leaves, how it goes on, what it refuses."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from encoder_data import sentences, write_jsonl
from encoder_runs import events, losses, run_tiny, tiny_params, write_data
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer

from inft.encoders.checkpoints import MODELS, STATES
from inft.encoders.pretrain import MaskedTokens, build, pretrain
from inft.encoders.run import Parts, run_encoder
from params.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def place(data: Path, tmp_path: Path) -> Path:
    """A directory of its own with the shared data."""
    for name in ("data", "tokenizer"):
        (tmp_path / name).symlink_to(data / name)
    return tmp_path


def test_a_run_learns_and_leaves_what_the_guide_names(place):
    result = run_tiny(place, trainer__max_steps=40, trainer__save_steps=20, datacollator__pack_sequences=True)
    found = losses(place)
    assert list(found) == list(range(1, 41))
    first, last = (sum(list(found.values())[part]) / 5 for part in (slice(0, 5), slice(-5, None)))
    assert last < first - 0.5
    model_dir = place / "run" / MODELS / "40"
    assert result.model_dir == model_dir
    assert {path.name for path in model_dir.iterdir()} >= {
        "model.safetensors",
        "config.yaml",
        "config.json",
        "tokenizer_info.json",
        "tokenizer",
    }
    assert sorted(path.name for path in (place / "run" / STATES).iterdir()) == ["20", "40"]
    evaluated = events(place, "eval")
    assert evaluated[0]["step"] == 0
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]
    assert set(evaluated[-1]["languages"]) == {"en", "de", "fr", "ru", "el", "ar", "hi", "zh"}


def test_the_stored_model_loads_with_transformers_alone_and_predicts_the_same(place):
    params = tiny_params(place)
    parts = []

    def kept(params, console):
        parts.append(build(params, console))
        return parts[0]

    result = run_encoder(params, kept, console=Console(quiet=True))
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir / "tokenizer")
    model = AutoModelForMaskedLM.from_pretrained(result.model_dir).eval()
    inputs = tokenizer(sentences(3), return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, parts[0].model.eval()(**inputs).logits)
    assert model.decoder.weight is model.model.encoder.weight


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(place, streaming, packed):
    told = {
        "dataset__streaming": streaming,
        "datacollator__pack_sequences": packed,
        "scheduler__decay_steps": 9,
    }
    run_tiny(place, trainer__max_steps=9, trainer__run_name="whole", trainer__output_dir=str(place / "whole"), **told)
    run_tiny(place, trainer__max_steps=5, **told)
    run_tiny(place, trainer__max_steps=9, trainer__resume_from_checkpoint="latest", **told)
    whole, resumed = losses(place, "whole"), losses(place)
    assert list(resumed) == list(range(1, 10))
    assert resumed == whole


def test_how_often_one_evaluates_and_saves_does_not_change_the_losses(place):
    run_tiny(place, trainer__run_name="often", trainer__eval_steps=1, trainer__save_steps=1, model__dropout_prob=0.2)
    run_tiny(
        place,
        trainer__run_name="rarely",
        trainer__output_dir=str(place / "other"),
        trainer__eval_steps=6,
        trainer__save_steps=6,
        model__dropout_prob=0.2,
    )
    assert losses(place, "often") == losses(place, "rarely")


def test_dropout_goes_on_from_its_random_state(place):
    told = {"model__dropout_prob": 0.3, "scheduler__decay_steps": 6}
    run_tiny(place, trainer__run_name="whole", trainer__output_dir=str(place / "whole"), **told)
    run_tiny(place, trainer__max_steps=4, **told)
    run_tiny(place, trainer__resume_from_checkpoint="latest", **told)
    assert losses(place) == losses(place, "whole")


def test_resume_with_other_parameters_is_refused_and_the_difference_shown(place):
    run_tiny(place)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.003 -> 0\.001"):
        run_tiny(place, trainer__resume_from_checkpoint="latest", optimizer__lr=1e-3)
    with pytest.raises(UserError, match=r"trainer\.max_steps: 6 -> 12"):
        run_tiny(place, trainer__resume_from_checkpoint="latest", trainer__max_steps=12)


def test_a_run_may_be_lengthened_where_its_learning_rates_stay(place):
    run_tiny(place, scheduler__decay_steps=6)
    run_tiny(place, scheduler__decay_steps=6, trainer__max_steps=8, trainer__resume_from_checkpoint="latest")
    assert max(losses(place)) == 8


def test_resume_with_other_data_is_refused_and_the_difference_shown(data, tmp_path):
    place = write_data(tmp_path)
    run_tiny(place)
    write_jsonl(place / "data" / "train-1.jsonl", sentences(31, seed=5), language=["en"] * 31)
    with pytest.raises(UserError, match=r"train-1\.jsonl"):
        run_tiny(place, trainer__resume_from_checkpoint="latest")


def test_resume_with_another_vocabulary_is_refused(tmp_path):
    from encoder_data import make_tokenizer

    place = write_data(tmp_path)
    run_tiny(place)
    make_tokenizer(place / "tokenizer", vocab_size=150)
    with pytest.raises(UserError, match="tokenizer"):
        run_tiny(place, trainer__resume_from_checkpoint="latest")


def test_a_damaged_checkpoint_is_passed_over_and_told(place):
    run_tiny(place)
    (place / "run" / STATES / "6" / "model.safetensors").write_bytes(b"cut")
    result = run_tiny(place, trainer__resume_from_checkpoint="latest")
    assert result.outcome.step == 6
    assert [e["resumed_from_step"] for e in events(place, "run_start")] == [None, 3]
    (place / "run" / STATES / "3" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="3 bytes"):
        run_tiny(place, trainer__resume_from_checkpoint=str(place / "run" / STATES / "3"))


def test_a_second_run_is_refused_unless_it_replaces_the_first(place):
    run_tiny(place)
    with pytest.raises(UserError, match="holds another run"):
        run_tiny(place)
    run_tiny(place, overwrite=True, trainer__max_steps=2)
    assert [path.name for path in (place / "run" / STATES).iterdir()] == ["2"]
    (place / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        run_tiny(place, overwrite=True)
    assert (place / "run" / STATES / "2").is_dir()


def test_the_oldest_checkpoints_go(place):
    run_tiny(place, trainer__save_steps=1, trainer__save_total_limit=2)
    for kind in (STATES, MODELS):
        assert sorted(path.name for path in (place / "run" / kind).iterdir()) == ["5", "6"]


def test_accumulated_micro_batches_weigh_by_their_masked_tokens(place):
    """Four micro-batches of two documents move the weights as one batch of eight does."""
    weights = []
    for number, (rows, accumulated) in enumerate(((8, 1), (2, 4))):
        result = run_tiny(
            place,
            trainer__per_device_train_batch_size=rows,
            trainer__gradient_accumulation_steps=accumulated,
            trainer__max_steps=1,
            trainer__output_dir=str(place / f"run{number}"),
            trainer__run_name=f"run{number}",
        )
        weights.append(AutoModelForMaskedLM.from_pretrained(result.model_dir).state_dict())
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-5, atol=1e-6)
    assert losses(place, "run0")[1] == pytest.approx(losses(place, "run1")[1], rel=1e-6)


class Poisoned(MaskedTokens):
    """Real masked tokens whose loss is not a number in some steps; the guards ask for a loss before the first."""

    bad: tuple[int, ...] = ()
    seen = -1

    def loss(self, model, batch):
        found = super().loss(model, batch)
        type(self).seen += 1
        return dataclasses.replace(found, sum=found.sum * (math.nan if self.seen in self.bad else 1))


def poisoned(bad: tuple[int, ...]):
    class Task(Poisoned):
        pass

    Task.bad = bad

    def made(params, console):
        parts = build(params, console)
        return Parts(tokenizer=parts.tokenizer, model=parts.model, task=Task(params, parts.tokenizer, parts.task.data))

    return made


def test_a_step_without_a_finite_loss_is_skipped_and_the_weights_stay_finite(place):
    result = run_encoder(tiny_params(place), poisoned((2, 4)), console=Console(quiet=True))
    assert [e["skipped_steps"] for e in events(place, "log")] == [0, 1, 0, 1, 0, 0]
    state = AutoModelForMaskedLM.from_pretrained(result.model_dir).state_dict()
    assert all(torch.isfinite(weight).all() for weight in state.values())


def test_too_many_such_steps_in_a_row_end_the_run_with_the_remedy(place):
    with pytest.raises(UserError, match=r"3 steps in a row up to step 5 .* Lower optimizer\.lr"):
        run_encoder(tiny_params(place, trainer__max_bad_steps=3), poisoned((3, 4, 5)), console=Console(quiet=True))
    assert events(place, "error")[0]["kind"] == "UserError"
    assert [path.name for path in (place / "run" / STATES).iterdir()] == ["3"]


def test_out_of_memory_is_told_and_not_swallowed(place):
    class Greedy(MaskedTokens):
        def loss(self, model, batch):
            raise torch.OutOfMemoryError("tried to allocate")

    def made(params, console):
        parts = build(params, console)
        return Parts(
            tokenizer=parts.tokenizer, model=parts.model, task=Greedy(params, parts.tokenizer, parts.task.data)
        )

    with pytest.raises(UserError, match=r"Lower trainer\.per_device_train_batch_size"):
        run_encoder(tiny_params(place), made, console=Console(quiet=True))


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_has_the_losses_of_the_plain_one(place, packed):
    told = {"datacollator__pack_sequences": packed}
    run_tiny(place, trainer__run_name="plain", **told)
    compiled = {"trainer__torch_compile": True, "trainer__torch_compile_backend": "aot_eager"}
    run_tiny(place, trainer__run_name="fast", trainer__output_dir=str(place / "fast"), **compiled, **told)
    plain, fast = losses(place, "plain"), losses(place, "fast")
    assert fast == pytest.approx(plain, rel=1e-5)
    names = AutoModelForMaskedLM.from_pretrained(place / "fast" / MODELS / "6").state_dict()
    assert not any("_orig_mod" in name for name in names)


def test_bfloat16_and_checkpointed_blocks_train_too(place):
    run_tiny(place, trainer__run_name="plain")
    told = {"trainer__mixed_precision": "bf16", "trainer__gradient_checkpointing": True}
    run_tiny(place, trainer__run_name="bf16", trainer__output_dir=str(place / "other"), **told)
    plain, half = losses(place, "plain"), losses(place, "bf16")
    assert half == pytest.approx(plain, rel=2e-2)
    assert half != plain


def test_muon_trains_and_resumes_exactly(place):
    told = {"optimizer__name": "muon", "scheduler__decay_steps": 6, "scheduler__name": "linear"}
    run_tiny(place, trainer__run_name="whole", trainer__output_dir=str(place / "whole"), **told)
    run_tiny(place, trainer__max_steps=3, **told)
    run_tiny(place, trainer__resume_from_checkpoint="latest", **told)
    assert losses(place) == losses(place, "whole")


def test_full_logits_and_masked_only_have_the_same_losses(place):
    run_tiny(place, trainer__run_name="masked")
    run_tiny(
        place,
        trainer__run_name="full",
        trainer__masked_logits_only_loss=False,
        trainer__output_dir=str(place / "full"),
    )
    assert losses(place, "full") == pytest.approx(losses(place, "masked"), rel=1e-5)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_numbers(place):
    with pytest.raises(UserError, match=r"400 tokens and the model 100: raise model\.vocab_size to 448"):
        run_tiny(place, model__vocab_size=100)
    assert not (place / "run" / STATES).exists()


def test_a_tokenizer_that_is_not_there_is_a_message(place):
    with pytest.raises(UserError, match=r"tokenizer\.name .*nowhere"):
        run_tiny(place, tokenizer__name=str(place / "nowhere"))


def test_without_heldout_documents_evaluation_is_skipped(place, tmp_path):
    alone = write_jsonl(tmp_path / "alone" / "texts.jsonl", sentences(30), language=["en"] * 30)
    run_tiny(place, dataset__path=str(alone))
    assert events(place, "eval") == []
    assert events(place, "run_end")[0]["status"] == "finished"


def test_the_log_says_what_ran(place):
    run_tiny(place)
    (start,) = events(place, "run_start")
    assert start["params"]["model"]["hidden_size"] == 32
    assert start["parameters"] > 10_000
    assert json.dumps(start["data"])
    assert all(event["tokens_per_second"] > 0 for event in events(place, "log"))


def test_a_longer_context_goes_on_from_the_weights(place):
    from inft.encoders.continued import continued_parameters
    from params.encoder_resolve import resolve_encoder

    run_tiny(place)
    base = continued_parameters(place / "run")
    arguments = ["--dataset.max_seq_length", "128", "--trainer.max_steps", "2"]
    params = resolve_encoder("pretraining", base=base, arguments=arguments)
    result = pretrain(params, console=Console(quiet=True))
    assert result.model_dir == place / "run_longer" / MODELS / "2"
    assert AutoModelForMaskedLM.from_pretrained(result.model_dir).config.max_position_embeddings == 128
    before = events(place, "eval")[-1]["loss"]
    assert events(place, "eval", "neobert_longer")[0]["loss"] == pytest.approx(before, abs=0.3)
    with pytest.raises(UserError, match="holds no pretraining run"):
        continued_parameters(place / "data")


@pytest.mark.parametrize("recipe", ["mxfp8_emulated", "float8_rowwise"])
def test_low_precision_trains_close_to_full_precision_and_stores_a_plain_model(place, recipe):
    pytest.importorskip("torchao", reason="the extra lowprecision is not installed")
    told = {"trainer__mixed_precision": "bf16", "model__hidden_size": 64, "model__intermediate_size": 96}
    run_tiny(place, trainer__run_name="plain", **told)
    low = {
        "torchao__enable": True,
        "torchao__recipe": recipe,
        "torchao__require_compile": False,
        **({"torchao__emulate": True} if recipe.startswith("float8") else {}),
    }
    result = run_tiny(place, trainer__run_name="low", trainer__output_dir=str(place / "low"), **told, **low)
    plain, found = losses(place, "plain"), losses(place, "low")
    assert found == pytest.approx(plain, rel=2e-2)
    assert found != plain
    state = AutoModelForMaskedLM.from_pretrained(result.model_dir).state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.float32}


def test_documents_are_tokenised_once_where_that_is_asked_for(place):
    run_tiny(place, trainer__run_name="text")
    told = {"dataset__pre_tokenize": True, "trainer__output_dir": str(place / "stored")}
    run_tiny(place, trainer__run_name="stored", **told)
    assert (place / "stored" / "pre_tokenized").is_dir()
    assert losses(place, "stored") == losses(place, "text"), "tokenised documents keep their masks"


def test_a_stored_model_brings_its_tokenizer_and_refuses_another(place, tmp_path):
    from encoder_data import make_tokenizer

    model_dir = run_tiny(place).model_dir
    told = {"model__name": str(model_dir), "trainer__output_dir": str(place / "second"), "trainer__max_steps": 1}
    run_tiny(place, trainer__run_name="second", tokenizer__name=None, **told)
    again = AutoTokenizer.from_pretrained(place / "second" / MODELS / "1" / "tokenizer")
    assert again.get_vocab() == AutoTokenizer.from_pretrained(model_dir / "tokenizer").get_vocab()
    make_tokenizer(tmp_path / "other", vocab_size=150)
    with pytest.raises(UserError, match="another tokenizer than the one"):
        run_tiny(place, overwrite=True, tokenizer__name=str(tmp_path / "other"), **told)
