"""An exported encoder loads in sentence-transformers with the same vectors; `inft embed` writes them to files."""

import json
import shutil
import warnings
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_pairs import LONGEST, bert, colour_rows, neobert, pair_params, tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from inft.cli import embed as embed_command
from inft.cli.embed import app
from inft.encoders import embed as embed_module
from inft.encoders.contrastive.export import POOLINGS, EmbeddingSettings, export_sentence_transformers
from inft.encoders.contrastive.load import load_encoder
from inft.encoders.embed import Embedder, embed_texts, open_embedder, read_texts, stored_settings
from params.encoder_resolve import dump_encoder_yaml
from params.errors import UserError

TEXTS = [row["pos"][0] for row in colour_rows(7)] + ["a", "the old cat " * 40, " red  cat "]
MODELS = {"neobert": neobert, "bert": bert}
PREFIXED = {"query_prefix": "query : ", "document_prefix": "passage : "}


def exported(directory, name="neobert", **settings):
    settings = EmbeddingSettings(**{"pooling": "mean", "max_length": 24, **PREFIXED, **settings})
    model = MODELS[name]().eval()
    return export_sentence_transformers(model, tokenizer(), settings, directory), model, settings


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token", "weighted_mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_loads_the_export_and_gives_the_same_vectors(tmp_path, name, pooling, normalize):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    directory, _, _ = exported(tmp_path / "model", name, pooling=pooling, normalize=normalize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    ours = open_embedder(str(directory), device=torch.device("cpu"))
    for prompt in ("query", "document"):
        expected = theirs.encode(TEXTS, prompt_name=prompt, show_progress_bar=False, batch_size=4)
        np.testing.assert_allclose(ours.embed(TEXTS, prompt=prompt), expected, atol=1e-5)
    assert not np.allclose(ours.embed(TEXTS, prompt="query"), ours.embed(TEXTS, prompt="document"), atol=1e-3)


def test_a_tokenizer_that_pads_on_the_left_is_stored_as_it_was_trained(tmp_path):
    left = tokenizer()
    left.padding_side = "left"
    settings = EmbeddingSettings(pooling="last_token", max_length=24)
    directory = export_sentence_transformers(bert().eval(), left, settings, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(directory).padding_side == "right"
    assert left.padding_side == "left"


def test_the_readme_tells_how_to_load_a_neobert_without_remote_code(tmp_path):
    text = (exported(tmp_path / "model")[0] / "README.md").read_text()
    assert "import inft.models.neobert" in text
    assert "trust_remote_code=True" not in text
    assert "import inft" not in (exported(tmp_path / "bert", "bert")[0] / "README.md").read_text()


def test_an_embedding_is_the_pooled_hidden_state_whatever_shares_its_batch(tmp_path):
    directory, model, _ = exported(tmp_path / "model", query_max_length=12)
    embedder = open_embedder(str(directory), batch_tokens=40)
    together = embedder.embed(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        encoded = tokenizer()("passage : " + text, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            mean = model(encoded["input_ids"], encoded["attention_mask"]).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_settings_come_from_a_runs_config_too_and_a_plain_model_must_be_told(tmp_path):
    neobert().save_pretrained(tmp_path / "run")
    tokenizer().save_pretrained(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match="does not say how to pool: add --pooling"):
        open_embedder(str(tmp_path / "run"))
    assert open_embedder(str(tmp_path / "run"), pooling="cls").settings.max_length == LONGEST
    told = {"pooling": "weighted_mean", "query_prefix": "q : ", "query_max_length": 32}
    params = pair_params(tmp_path, tmp_path, contrastive=told)
    (tmp_path / "run" / "config.yaml").write_text(dump_encoder_yaml(params))
    found = open_embedder(str(tmp_path / "run")).settings
    assert (found.pooling, found.query_prefix, found.query_max_length) == ("weighted_mean", "q : ", 32)
    assert open_embedder(str(tmp_path / "run"), pooling="cls", max_length=8).settings == replace(
        found, pooling="cls", max_length=8, query_max_length=None
    )


def test_parts_that_only_sentence_transformers_runs_are_refused(tmp_path):
    directory, _, _ = exported(tmp_path / "model")
    config = json.loads((directory / "1_Pooling/config.json").read_text())
    (directory / "1_Pooling/config.json").write_text(json.dumps({**config, "pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pools by mean_tokens, max_tokens"):
        open_embedder(str(directory))
    modules = json.loads((directory / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="has Dense"):
        open_embedder(str(directory))


def test_models_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="no model directory at"):
        load_encoder(str(tmp_path / "nothing"))
    directory, _, _ = exported(tmp_path / "bert", "bert")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(directory))
    directory, _, _ = exported(tmp_path / "long", max_length=LONGEST + 1)
    with pytest.raises(UserError, match="do not fit the model's 48 positions"):
        open_embedder(str(directory))


@pytest.mark.parametrize("ending", ["npy", "parquet"])
@pytest.mark.parametrize("block", [3, 4096])
def test_files_are_embedded_in_blocks_with_their_ids(tmp_path, monkeypatch, ending, block):
    monkeypatch.setattr(embed_module, "BLOCK", block)
    embedder = open_embedder(str(exported(tmp_path / "model")[0]))
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    rows = [{"_id": f"d{i}", "body": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = embedder.embed([text.strip("\n") for text in TEXTS])
    for file, column, ids in (("a.txt", "text", list(range(10))), ("b.jsonl", "body", [f"d{i}" for i in range(10)])):
        out = tmp_path / f"{file}.{ending}"
        assert embed_texts(embedder, tmp_path / file, out, column=column) == 10
        if ending == "npy":
            found = np.load(out, allow_pickle=False)
        else:
            table = pq.read_table(out)
            assert table.column("id").to_pylist() == ids
            found = np.stack(table.column("vector").to_pylist())
        assert found.shape == (10, 32)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match="exists"):
        embed_texts(embedder, tmp_path / "a.txt", out)


def test_a_text_that_is_none_is_named_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "BLOCK", 2)
    embedder = open_embedder(str(exported(tmp_path / "model")[0]))
    (tmp_path / "a.txt").write_text("cat\ndog\n\ncar\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "embed", lambda *_, **__: pytest.fail("embedded before all lines were read"))
        with pytest.raises(UserError, match=r"a\.txt line 3 is empty"):
            embed_texts(embedder, tmp_path / "a.txt", tmp_path / "out" / "a.npy")
    assert not (tmp_path / "out").exists()
    for line, words in (('{"txt": "a"}', "has no text in 'text'"), ("{", "not JSON"), ('{"text": 3}', "no text in")):
        (tmp_path / "b.jsonl").write_text(line)
        with pytest.raises(UserError, match=words):
            list(read_texts(tmp_path / "b.jsonl"))
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(UserError, match="has no texts"):
        embed_texts(embedder, tmp_path / "none.txt", tmp_path / "a.npy")


def test_empty_lines_at_the_end_are_no_texts(tmp_path):
    (tmp_path / "a.txt").write_text("cat\ndog\n\n  \n")
    assert list(read_texts(tmp_path / "a.txt")) == [(0, "cat"), (1, "dog")]
    (tmp_path / "b.jsonl").write_text('{"text": "cat"}\n\n')
    assert list(read_texts(tmp_path / "b.jsonl")) == [(0, "cat")]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "dd.npy").mkdir()
    (tmp_path / "t.txt").write_text("cat\n")
    told = ["no-such-model", str(tmp_path / "t.txt"), "--overwrite", "-o"]
    for output, words in (("dd.npy", "is a directory"), ("t.txt/x.npy", "is a file, not a directory")):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(app, [*told, str(tmp_path / output)], catch_exceptions=False)


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cached(monkeypatch, cache, directory, name="owner/model"):
    """The directory as the only content of the hub's cache; the hub itself is out of reach."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return name


def test_a_model_of_the_hub_brings_its_settings(tmp_path, monkeypatch):
    directory, _, settings = exported(tmp_path / "model", pooling="cls", normalize=False, max_length=20)
    name = cached(monkeypatch, tmp_path / "cache", directory)
    found = stored_settings(name, LONGEST)
    assert {key: getattr(found, key) for key in asdict(settings)} == asdict(settings)
    (tmp_path / "cache/models--owner--model/snapshots/abc/config_sentence_transformers.json").unlink()
    found = stored_settings(name, LONGEST)
    assert found.query_prefix == ""
    assert "config_sentence_transformers.json of owner/model is not in the cache" in found.notes[0]
    with pytest.raises(UserError, match="the hub cannot be reached"):
        stored_settings("owner/other", LONGEST)


def test_a_prompt_for_passages_serves_documents_and_is_told(tmp_path):
    directory, _, _ = exported(tmp_path / "model")
    prompts = directory / "config_sentence_transformers.json"
    for name in ("passage", "corpus"):
        change(prompts, prompts={"query": "query : ", name: "a : "})
        found = open_embedder(str(directory))
        assert found.settings.document_prefix == "a : "
        assert f"its prompt {name!r} takes that place" in found.notes[0]
    (tmp_path / "a.txt").write_text("cat\n")
    told = [str(directory), str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.npy")]
    assert "note: " in CliRunner().invoke(app, told, catch_exceptions=False).output


def test_the_default_prompt_serves_where_there_is_no_other(tmp_path):
    directory, _, _ = exported(tmp_path / "model")
    prompts = directory / "config_sentence_transformers.json"
    change(prompts, prompts={"query": "query : ", "all": "the : "}, default_prompt_name="all")
    found = open_embedder(str(directory))
    assert (found.settings.query_prefix, found.settings.document_prefix) == ("query : ", "the : ")
    assert "no prompt for a document: its default prompt 'all' is used" in found.notes[0]
    change(prompts, default_prompt_name="none")
    with pytest.raises(UserError, match="default_prompt_name 'none' is none of the prompts"):
        open_embedder(str(directory))


def test_texts_are_lowered_where_the_model_says_so(tmp_path):
    directory, _, _ = exported(tmp_path / "model")
    plain = open_embedder(str(directory)).embed(["red cat"])
    assert not np.allclose(open_embedder(str(directory)).embed(["RED Cat"]), plain)
    change(directory / "sentence_bert_config.json", do_lower_case=True)
    np.testing.assert_allclose(open_embedder(str(directory)).embed(["RED Cat"]), plain, atol=1e-6)


def test_a_length_that_is_not_stored_is_that_of_the_tokenizer(tmp_path):
    directory, _, _ = exported(tmp_path / "model", max_length=20)
    change(directory / "sentence_bert_config.json", max_seq_length=None)
    assert open_embedder(str(directory)).settings.max_length == 20


def test_the_poolings_stand_in_one_order():
    assert tuple(POOLINGS) == embed_command.POOLINGS


def test_a_runs_directory_means_its_newest_model(tmp_path):
    for step, pooling in ((90, "cls"), (100, "mean")):
        exported(tmp_path / "run" / "model_checkpoints" / str(step), pooling=pooling)
    (tmp_path / "a.txt").write_text("cat\n")
    told = [str(tmp_path / "run"), str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.npy")]
    found = CliRunner().invoke(app, told, catch_exceptions=False)
    assert found.exit_code == 0
    assert "model_checkpoints/100 (the newest of" in found.output


def test_the_command_writes_what_the_function_does_and_refuses_to_overwrite(tmp_path):
    directory, _, _ = exported(tmp_path / "model")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    told = [
        str(directory),
        str(tmp_path / "a.txt"),
        "-o",
        str(tmp_path / "a.npy"),
        "--prompt",
        "query",
        "--no-normalize",
    ]
    run = CliRunner().invoke(app, told, catch_exceptions=False)
    assert run.exit_code == 0
    assert "10 vectors of 32 numbers" in run.output
    expected = open_embedder(str(directory), normalize=False).embed(TEXTS, prompt="query")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-6)
    with pytest.raises(UserError, match="--overwrite"):
        CliRunner().invoke(app, told, catch_exceptions=False)
    assert CliRunner().invoke(app, [*told, "--overwrite"], catch_exceptions=False).exit_code == 0
    for wrong, words in (
        (["--prompt", "q"], "--prompt q"),
        (["--pooling", "max"], "--pooling max"),
        (["--column", "x"], "--column"),
    ):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(app, [*told, "--overwrite", *wrong], catch_exceptions=False)
    with pytest.raises(UserError, match=r"a\.csv: name it"):
        CliRunner().invoke(app, [*told[:2], "-o", str(tmp_path / "a.csv")], catch_exceptions=False)
