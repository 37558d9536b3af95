"""Loading: what is set up, and what each mistake is told."""

import importlib
import json
import logging
import shutil
import time
from copy import deepcopy

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, Response
from tokenizers.processors import ByteLevel, TemplateProcessing

from inft.models.loading import EMBEDDED, _device_map, find_source, load_model, load_processor, read_config
from inft.models.modules import meta_model
from params import BasicParams, UserError

BASIC = BasicParams(dtype="float32")
NAME = "CohereLabs/aya-vision-8b"


@pytest.fixture
def copy_of(tmp_path):
    """A copy of an embedded model whose files a test may spoil."""

    def copy(name):
        return shutil.copytree(EMBEDDED / name, tmp_path / name)

    return copy


@pytest.fixture
def hub_answers(monkeypatch):
    """Let the hub answer every question with an error."""

    def answer(error):
        def ask(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)

    return answer


def refusal(kind, status):
    client = importlib.import_module(Response.__module__.partition(".")[0])
    return kind("refused", response=Response(status, request=client.Request("HEAD", "https://huggingface.co")))


def test_a_model_is_loaded_for_training(family):
    model = family.model()
    assert not model.training
    assert model.config.use_cache is False
    assert model.config.get_text_config().use_cache is False
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in family.model(dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_attention_is_the_one_asked_for(vlm):
    for name in ("eager", "sdpa"):
        assert vlm.model(attn_impl=name).config.get_text_config()._attn_implementation == name


@pytest.mark.parametrize(
    ("rank", "asked", "expected"), [(None, "auto", "auto"), ("1", "auto", {"": 1}), ("1", None, None)]
)
def test_each_process_of_a_launcher_fills_its_own_device(monkeypatch, rank, asked, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert _device_map(BasicParams(device_map=asked)) == expected


def test_flash_attention_is_refused_where_the_family_has_none(llama32):
    with pytest.raises(UserError, match=r"attn_impl=flash is not offered by Llama 3.2 Vision: use one of eager, sdpa"):
        llama32.model(attn_impl="flash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be installed beside a GPU")
def test_flash_attention_names_its_package(aya):
    with pytest.raises(UserError, match="needs the package flash-attn"):
        aya.model(attn_impl="flash")


def test_tiles_are_capped(aya):
    assert load_processor(aya.spec, "", max_image_tiles=2).image_processor.max_patches == 2
    with pytest.raises(UserError, match=r"max_image_tiles=99 must be 1 to \d+"):
        load_processor(aya.spec, "", max_image_tiles=99)


@pytest.mark.parametrize("name", ["llama32", "text"])
def test_a_cap_on_tiles_that_would_do_nothing_is_an_error(request, name):
    with pytest.raises(UserError, match="max_image_tiles does not apply to"):
        load_processor(request.getfixturevalue(name).spec, "", max_image_tiles=1)


def test_the_processor_beside_an_adapter_is_loaded_without_a_model(vlm, tmp_path, make_sample):
    vlm.processor.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    again = vlm.spec.collator(load_processor(vlm.spec, str(tmp_path)))([make_sample()])
    assert torch.equal(again["labels"], vlm.collator()([make_sample()])["labels"])
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        load_model(vlm.spec, str(tmp_path), basic=BASIC)


def test_a_tokenizer_alone_is_no_processor(aya, text, tmp_path):
    text.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no image processor"):
        load_processor(aya.spec, str(tmp_path))


def test_a_tokenizer_without_an_end_token_is_refused(text, tmp_path):
    tokenizer = deepcopy(text.tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end token"):
        load_processor(text.spec, str(tmp_path))


def test_fewer_tiles_are_fewer_tokens(aya, make_sample):
    lengths = [
        aya.spec.collator(load_processor(aya.spec, "", max_image_tiles=tiles))([make_sample()])["input_ids"].shape[1]
        for tiles in (None, 1)
    ]
    assert lengths[0] > lengths[1]


def test_a_missing_pad_token_becomes_the_end_token(text, tmp_path):
    tokenizer = deepcopy(text.tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(EMBEDDED / "text" / "config.json", tmp_path)
    loaded = load_processor(text.spec, str(tmp_path))
    assert loaded.pad_token == loaded.eos_token


@pytest.mark.parametrize("begins", [True, False])
def test_a_tokenizer_without_a_template_gets_the_plain_one(text, tmp_path, make_sample, begins):
    tokenizer = deepcopy(text.tokenizer)
    tokenizer.chat_template = None
    bos = tokenizer.bos_token
    processing = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processing if begins else ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(EMBEDDED / "text" / "config.json", tmp_path)
    collator = text.spec.collator(load_processor(text.spec, str(tmp_path)))
    batch = collator([make_sample("A red circle.")])
    row = collator.tokenizer.decode(batch["input_ids"][0])
    assert row == (bos if begins else "") + "Write a caption for this image in English.\nA red circle.<|eot_id|>"
    assert collator.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "A red circle.<|eot_id|>"


def test_a_processor_without_a_template_gets_its_familys(vlm, copy_of):
    path = copy_of(vlm.spec.name)
    (path / "chat_template.jinja").unlink()
    assert load_processor(vlm.spec, str(path)).chat_template == vlm.spec.chat_template


def test_another_template_is_kept_and_told(aya, copy_of, caplog, make_sample):
    path = copy_of("aya")
    other = aya.spec.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    (path / "chat_template.jinja").write_text(other.replace("<|START_RESPONSE|>", ""))
    with caplog.at_level(logging.INFO, logger="inft.models.loading"):
        collator = aya.spec.collator(load_processor(aya.spec, str(path)))
    assert "has another chat template than Aya Vision (character" in caplog.text
    labels = collator([make_sample("A red circle.")])["labels"]
    supervised = collator.tokenizer.decode(labels[labels != -100])
    assert supervised == "A red circle.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        ("llama32", "aya", r"is a aya_vision model, not Llama 3.2 Vision. Train it with `inft train aya`"),
        ("aya", "text", r"is a llama model, not Aya Vision. Train it with `inft train text`"),
        ("text", "llama32", r"is a mllama model. Train it with `inft train llama32`"),
    ],
)
def test_a_model_of_another_family_is_sent_there(request, wanted, given, message):
    spec = request.getfixturevalue(wanted).spec
    for load in (
        lambda: load_model(spec, str(EMBEDDED / given), basic=BASIC),
        lambda: load_processor(spec, str(EMBEDDED / given)),
    ):
        with pytest.raises(UserError, match=message):
            load()


def test_a_model_that_is_no_language_model_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="is a vit model, not a causal language model"):
        load_model(text.spec, str(tmp_path), basic=BASIC)


def test_pickled_weights_are_refused(text, copy_of):
    path = copy_of("text")
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(text.spec, str(path), basic=BASIC)


CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class Config(LlamaConfig):
    pass

class Model(LlamaForCausalLM):
    config_class = Config

class Words(PreTrainedTokenizerFast):
    pass
"""


def add_code(path, marker):
    """Make a checkpoint offer classes of its own, whose file leaves a mark when it runs."""
    (path / "code.py").write_text(CODE.format(marker=str(marker)))
    for file, classes in (
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "code.Words"]}),
    ):
        config = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**config, "auto_map": classes}))


def test_the_code_of_a_checkpoint_is_not_run(text, copy_of, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")  # whoever asks is told yes
    path, marker = copy_of("text"), tmp_path / "ran"
    add_code(path, marker)
    source = find_source(text.spec, str(path))
    for load in (
        lambda: read_config(text.spec, source),
        lambda: load_processor(text.spec, str(path)),
        lambda: load_model(text.spec, str(path), basic=BASIC),
        lambda: meta_model(text.spec, str(path)),
    ):
        load()
        assert not marker.exists()


def test_an_incomplete_checkpoint_is_refused(text, copy_of):
    from safetensors.torch import load_file, save_file

    path = copy_of("text")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, such as model.layers.0.mlp.up_proj.weight"):
        load_model(text.spec, str(path), basic=BASIC)


def test_a_damaged_weight_file_is_named(text, copy_of):
    path = copy_of("text")
    (path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot load"):
        load_model(text.spec, str(path), basic=BASIC)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_missing_path_is_named(aya, name):
    with pytest.raises(UserError, match=f"no model directory at {name}"):
        find_source(aya.spec, name)


def test_a_directory_without_a_model_is_named(aya, tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        find_source(aya.spec, str(tmp_path))


def test_a_name_that_is_no_hub_id_is_named(aya):
    with pytest.raises(UserError, match="neither a directory nor a hub id"):
        find_source(aya.spec, "what is this?")


def test_a_gated_model_says_how_to_get_access(aya, hub_answers):
    hub_answers(refusal(GatedRepoError, 401))
    with pytest.raises(UserError, match=r"is gated: accept its licence at https://\S+, then run `hf auth login`"):
        find_source(aya.spec, NAME)


def test_an_unknown_model_is_named(aya, hub_answers):
    hub_answers(refusal(RepositoryNotFoundError, 404))
    with pytest.raises(UserError, match=f"the hub has no model {NAME}"):
        find_source(aya.spec, NAME)


def test_an_unreachable_hub_names_the_two_ways_out(aya, hub_answers):
    hub_answers(HTTPError("no route"))
    with pytest.raises(UserError, match=r"cannot be reached .* --model PATH, or --demo"):
        find_source(aya.spec, NAME)


def test_offline_mode_answers_at_once(aya, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    began = time.perf_counter()
    with pytest.raises(UserError, match="OfflineModeIsEnabled"):
        find_source(aya.spec, NAME)
    assert time.perf_counter() - began < 1


def test_a_refused_connection_is_not_retried_for_long(aya, monkeypatch):
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(UserError, match="cannot be reached"):
        find_source(aya.spec, NAME)
    assert time.perf_counter() - began < 6


def test_a_cached_model_is_used_without_the_hub(text, copy_of, hub_answers, tmp_path, monkeypatch):
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(EMBEDDED / "text", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_answers(HTTPError("no route"))
    assert find_source(text.spec, "someone/tiny").local_files_only
    model = load_model(text.spec, "someone/tiny", basic=BASIC)
    assert model.config._name_or_path == "someone/tiny"
