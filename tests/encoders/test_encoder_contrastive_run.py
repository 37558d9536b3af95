"""Contrastive runs: they learn, go on exactly, count what is held out, and store what loads elsewhere."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_pairs import LONGEST, bert, colour_rows, neobert, pair_params, tokenizer, vocabulary, write_rows
from transformers import MPNetConfig, MPNetModel

from inft.encoders.contrastive.encode import TextEncoder
from inft.encoders.contrastive.finetune import PairsTask, finetune
from inft.encoders.contrastive.heldout import HeldOut
from inft.encoders.contrastive.preprocess import preprocess_contrastive
from inft.encoders.contrastive.sources import locate_sources, open_sources
from inft.encoders.embed import open_embedder
from inft.training.runlog import read_events
from params.errors import UserError

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": LONGEST, "vocab_size": 64,
}  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def run_params(tmp_path, path=None, **sections):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = path or write_rows(tmp_path / "pairs.jsonl", colour_rows(100))
    told = {
        "tokenizer": {"name": str(tmp_path / "tokenizer")},
        "model": TINY,
        "scheduler": {"warmup_steps": 2},
        "optimizer": {"lr": 3e-3},
        "trainer": {"max_steps": 40, "save_steps": 1000, "eval_steps": 1000, "logging_steps": 1, "num_threads": 1},
        "dataset": {"eval_samples": 20},
    }
    for section, values in sections.items():
        told[section] = {**told.get(section, {}), **values}
    return pair_params(tmp_path, path, **told)


def losses(result) -> list[float]:
    return [event["loss"] for event in read_events(result.log_file) if event["event"] == "log"]


def test_a_run_learns_from_nothing_and_says_so(tmp_path):
    console = quiet()
    result = finetune(run_params(tmp_path, contrastive={"gradcache_chunk_size": 8}), console=console)
    evaluations = [event for event in read_events(result.log_file) if event["event"] == "eval"]
    first, last = evaluations[0], evaluations[-1]
    assert last["loss"] < first["loss"] / 3
    assert last["recall_at_5"] > 0.9 > first["recall_at_5"]
    assert {"recall_at_1", "recall_at_10", "ndcg_at_10", "mrr", "sources", "in_batch_accuracy"} <= last.keys()
    assert "rows: pairs 80 (80 with negatives); held out: pairs 20 (20 with negatives)" in console.file.getvalue()


@pytest.mark.parametrize(("chunk", "checkpointing"), [(None, False), (6, False), (6, True)])
def test_a_resumed_run_has_bit_equal_losses_and_weights(tmp_path, chunk, checkpointing):
    told = {
        "contrastive": {"simcse_share": 0.3, "gradcache_chunk_size": chunk, "max_hard_negatives": 1},
        "model": {"dropout_prob": 0.1},
        "dataset": {
            "path": None,
            "sources": {
                "a": str(write_rows(tmp_path / "a.jsonl", colour_rows(40))),
                "b": str(write_rows(tmp_path / "b.jsonl", colour_rows(30, first=50))),
            },
        },
        "trainer": {
            "max_steps": 9,
            "save_steps": 4,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": checkpointing,
        },
    }
    params = run_params(tmp_path, **told)
    straight = finetune(params, console=quiet())
    expected = load_file(straight.model_dir / "model.safetensors")
    for step in (8, 9):  # as if it had been killed after step 4
        for kind in ("checkpoints", "model_checkpoints"):
            shutil.rmtree(tmp_path / "run" / kind / str(step))
    again = replace(params.trainer, resume_from_checkpoint="latest", logs_dir=str(tmp_path / "logs2"))
    resumed = finetune(replace(params, trainer=again), console=quiet())
    assert losses(resumed) == losses(straight)[4:]
    found = load_file(resumed.model_dir / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_gradcache_changes_nothing_but_memory(tmp_path):
    runs = []
    for number, chunk in enumerate((None, 5)):
        told = {"max_steps": 5, "output_dir": str(tmp_path / str(number)), "logs_dir": str(tmp_path / f"logs{number}")}
        params = run_params(tmp_path, trainer=told, contrastive={"gradcache_chunk_size": chunk})
        runs.append(losses(finetune(params, console=quiet())))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


def test_a_resumed_run_refuses_other_rows(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(100))
    params = run_params(tmp_path, file, trainer={"max_steps": 2})
    finetune(params, console=quiet())
    write_rows(file, colour_rows(99))
    again = replace(params.trainer, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=r"data: train\.pairs\.rows: 80 -> 79"):
        finetune(replace(params, trainer=again), console=quiet())


def test_any_encoder_of_transformers_can_be_fine_tuned_and_embeds_what_was_trained(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    bert(dropout=0.1).save_pretrained(tmp_path / "bert")
    told = {
        "model": {"name": str(tmp_path / "bert")},
        "contrastive": {"pooling": "cls", "query_prefix": "query : ", "loss_type": "symmetric"},
        "trainer": {"max_steps": 10},
    }
    result = finetune(run_params(tmp_path, **told), console=quiet())
    ours = open_embedder(str(result.model_dir))
    assert ours.settings.query_prefix == "query : "
    theirs = sentence_transformers.SentenceTransformer(str(result.model_dir), device="cpu", local_files_only=True)
    texts = [row["query"] for row in colour_rows(5)]
    expected = theirs.encode(texts, prompt_name="query", show_progress_bar=False)
    np.testing.assert_allclose(ours.embed(texts, prompt="query"), expected, atol=1e-5)


def test_the_guides_two_commands_preprocess_and_finetune_fit_together(tmp_path):
    params = run_params(tmp_path, trainer={"max_steps": 2})
    out = preprocess_contrastive(params, tmp_path / "tokenised", quiet())
    result = finetune(replace(params, dataset=replace(params.dataset, path=str(out))), console=quiet())
    assert result.outcome.step == 2
    assert not (tmp_path / "run" / "pre_tokenized").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"dataset": {"max_seq_length": 64}}, "do not fit the model's 48 positions"),
        ({"model": {"vocab_size": 32}}, "the tokenizer has"),
        ({"model": {"name": "/nowhere/nothing"}}, "no model directory at /nowhere/nothing"),
        ({"dataset": {"path": "nowhere.jsonl"}}, "no such file"),
        ({"dataset": {"path": None, "sources": {"a/b": "x"}}}, "no name for a directory"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(tmp_path, sections, words):
    with pytest.raises(UserError, match=words):
        finetune(run_params(tmp_path, **sections), console=quiet())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"name": "/nowhere/nothing"}}, "no model directory"),
        ({"model": {"vocab_size": 32}}, "the tokenizer has"),
        ({"dataset": {"max_seq_length": 64}}, "positions"),
        ({"model": {"attn_backend": "flash_attn_varlen"}}, "flash_attn_varlen"),
        ({"dataset": {"path": "nowhere.jsonl"}}, "no such file"),
    ],
)
def test_a_model_that_does_not_fit_is_told_before_anything_is_tokenised(tmp_path, sections, words):
    params = run_params(tmp_path, **sections)
    with pytest.raises(UserError, match=words):
        finetune(params, console=quiet())
    assert not (tmp_path / "run" / "pre_tokenized").exists()


def test_a_path_that_is_missing_is_told_before_the_model_is_loaded(tmp_path):
    params = run_params(tmp_path, dataset={"path": "nowhere.jsonl"}, model={"name": "/nowhere/nothing"})
    with pytest.raises(UserError, match="no such file"):
        finetune(params, console=quiet())


def test_a_model_that_cannot_recompute_is_refused_with_checkpointing(tmp_path):
    config = MPNetConfig(
        vocab_size=vocabulary(), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LONGEST + 2,
    )  # fmt: skip
    MPNetModel(config).save_pretrained(tmp_path / "mpnet")
    params = run_params(
        tmp_path, model={"name": str(tmp_path / "mpnet")}, trainer={"gradient_checkpointing": True, "max_steps": 1}
    )
    with pytest.raises(UserError, match=r"trainer\.gradient_checkpointing"):
        finetune(params, console=quiet())


def guarded(tmp_path, rows, **sections):
    """The error of a run on some rows, and the checks that were made."""
    params = run_params(tmp_path, write_rows(tmp_path / "few.jsonl", rows), dataset={"eval_samples": None}, **sections)
    with pytest.raises(UserError) as error:
        finetune(params, console=quiet())
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    return str(error.value), [event["name"] for event in read_events(log) if event["event"] == "guard"]


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("chunk", [None, 2])
def test_rows_without_any_negative_are_told_before_gradients_are_looked_at(tmp_path, size, chunk):
    rows = colour_rows(1 if size == 8 else 20, negatives=0)
    trainer = {"per_device_train_batch_size": size}
    message, checks = guarded(tmp_path, rows, trainer=trainer, contrastive={"gradcache_chunk_size": chunk})
    assert "no row of the first batch has a negative" in message
    assert "trainer.per_device_train_batch_size" in message
    assert "mixed_precision" not in message
    assert checks == ["known words", "contrasted rows"]


def test_texts_that_the_tokenizer_does_not_know_are_told(tmp_path):
    rows = [{"query": f"πού {n}", "pos": f"εδώ {n}"} for n in "αβγδε"]
    message, checks = guarded(tmp_path, rows)
    assert "tokenizer.name" in message
    assert checks == ["known words"]


def test_a_sound_run_passes_every_check(tmp_path):
    params = run_params(tmp_path, trainer={"max_steps": 1})
    events = read_events(finetune(params, console=quiet()).log_file)
    checks = [(event["name"], event["ok"]) for event in events if event["event"] == "guard"]
    assert checks == [("known words", True), ("contrasted rows", True), ("gradients", True)]


def test_a_source_smaller_than_a_batch_is_named_on_the_console(tmp_path):
    console = quiet()
    params = run_params(tmp_path, trainer={"max_steps": 1, "per_device_train_batch_size": 256})
    result = finetune(params, console=console)
    assert "source pairs has 80 rows: its batches have 80 rows, not 256." in console.file.getvalue()
    (logged,) = [event for event in read_events(result.log_file) if event["event"] == "log"]
    assert logged["epoch"] == 1.0


def test_simcse_without_any_dropout_layer_is_refused(tmp_path):
    params = run_params(tmp_path, contrastive={"simcse_share": 0.5})
    sources = open_sources(params, tokenizer(), locate_sources(params, tokenizer(), quiet()))
    model = neobert()
    for block in model.transformer_encoder:
        block.dropout = torch.nn.Identity()
    with pytest.raises(UserError, match="no dropout layer"):
        PairsTask(params, sources, model, tokenizer())


def test_held_out_figures_do_not_depend_on_how_processes_share_them(tmp_path):
    """Two processes by hand: each embeds its texts, and together they have them all once."""
    params = run_params(tmp_path, trainer={"per_device_eval_batch_size": 8})
    sources = open_sources(params, tokenizer(), locate_sources(params, tokenizer(), quiet()))
    encoder = TextEncoder(model=neobert().eval(), pooling="mean", pad_token_id=0)
    with torch.no_grad():
        alone = HeldOut(sources.heldout, params).figures(encoder)
        halves = [HeldOut(sources.heldout, params, rank=rank, world_size=2) for rank in (0, 1)]
        assert sum(len(half.batches[half.rank :: 2]) for half in halves) == len(halves[0].batches)
    assert alone["sources"] == {"pairs": pytest.approx(alone["loss"])}
    whole = HeldOut(sources.heldout, params)
    assert len(whole.queries) == 20
    assert all(len(relevant) == 2 for relevant in whole.relevant)
    assert len(whole.documents) == len({text.tobytes() for text in whole.documents})
    few = replace(params, trainer=replace(params.trainer, eval_max_batches=1))
    assert len(HeldOut(sources.heldout, few).queries) == 7


def held_out(tmp_path, rows, size=8):
    told = {"eval_samples": None, "eval_split": "test"}
    params = run_params(tmp_path, trainer={"per_device_eval_batch_size": size}, dataset=told)
    write_rows(tmp_path / "test.jsonl", rows)
    sources = {"pairs": str(tmp_path / "pairs.jsonl"), "test": str(tmp_path / "test.jsonl")}
    params = replace(params, dataset=replace(params.dataset, path=None, sources=sources))
    found = open_sources(params, tokenizer(), locate_sources(params, tokenizer(), quiet()))
    return HeldOut(found.heldout, params)


def test_rows_that_nothing_is_contrasted_with_count_for_no_held_out_figure(tmp_path):
    encoder = TextEncoder(model=neobert().eval(), pooling="mean", pad_token_id=0)
    same = {"query": "where is the cat", "pos": "a cat", "neg": []}
    rows = [same, same, {"query": "a", "pos": "the old dog", "neg": ["a dog"]}]
    with torch.no_grad():
        batches = held_out(tmp_path, rows, size=2)
        assert [len(batch) for batch in batches.batches] == [2, 1]
        figures = batches.figures(encoder)  # rows 0 and 1 are equal, and row 2 has a hard negative
        one = held_out(tmp_path, rows[2:]).figures(encoder)
    assert figures["loss"] == pytest.approx(one["loss"])
    assert figures["in_batch_accuracy"] == one["in_batch_accuracy"]
    with torch.no_grad():
        none = held_out(tmp_path, rows[:1]).figures(encoder)
    assert np.isnan(none["loss"])


def test_a_document_that_is_the_query_itself_is_left_out_of_its_ranking(tmp_path):
    """As in the loss; unless it is what answers the query."""
    encoder = TextEncoder(model=neobert().eval(), pooling="mean", pad_token_id=0)
    asked = {"query": "the red cat", "pos": "a house is here", "neg": ["the red cat"]}
    answer = {"query": "the red cat", "pos": "the red cat", "neg": ["a house is here"]}
    with torch.no_grad():
        assert held_out(tmp_path, [asked]).figures(encoder)["mrr"] == 1
        assert held_out(tmp_path, [answer]).figures(encoder)["mrr"] == 1
        other = {"query": "a red cat", "pos": "a dog", "neg": ["the red cat"]}  # another query's document
        assert held_out(tmp_path, [other]).figures(encoder)["mrr"] == 0.5


def test_rows_without_any_held_out_are_trained_on_without_evaluation(tmp_path):
    params = run_params(tmp_path, dataset={"eval_samples": None}, trainer={"max_steps": 2})
    result = finetune(params, console=quiet())
    assert not [event for event in read_events(result.log_file) if event["event"] == "eval"]
    info = json.loads((result.model_dir / "tokenizer_info.json").read_text())
    assert info["vocab_size"] == vocabulary()
