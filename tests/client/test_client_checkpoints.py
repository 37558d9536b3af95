"""Checkpoints: the same bytes for the same state, loadable by PEFT, and never half or changed."""

import json
import random
from dataclasses import replace

import pytest
import torch
from embedded_bases import embedded_base
from embedded_learners import DP, FAMILIES, SELF_ATTENTION, learners, run, same, text_batch, token_batch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from inft.client.checkpoints import STATE_FILE, check_fits, read_checkpoint, write_checkpoint
from inft.client.learner import prepare
from inft.models.loading import EMBEDDED, load_model
from inft.training.storage import file_sha256
from params.basic import BasicParams
from params.client_resolve import training_config
from params.errors import UserError

CONFIG = {"lora_config": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}}
INFO = {"client_id": "tc-1", "metadata": {"notes": "epoch 1, été"}}
FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "gradient.safetensors",
    "optimizer.safetensors",
    "state.json",
]


def trained(new, family="text", **config):
    """A learner after a step, within the next one."""
    learner = new(**{**CONFIG, **config})
    for number in range(2):
        run(learner, text_batch(family, number))
        if not number:
            learner.optim_step({})
    return learner


def write(learner, directory, *, optimizer=True, gradients=True, info=INFO):
    directory.mkdir()
    return write_checkpoint(
        directory,
        learner.state(),
        base=learner.base,
        config=learner.config,
        include_optimizer=optimizer,
        include_gradients=gradients,
        info=info,
    )


@pytest.fixture
def new():
    with learners("text") as make:
        yield make


@pytest.mark.parametrize("config", [{}, {"dp_config": DP}], ids=["plain", "private"])
def test_a_checkpoint_is_read_as_it_was_written_and_has_the_same_bytes_again(new, tmp_path, config):
    learner = trained(new, **config)
    written = write(learner, tmp_path / "one")
    read = read_checkpoint(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == FILES
    assert written.size_bytes == sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    assert same(read.state.tensors, learner.state().tensors)
    assert read.state.values == learner.state().values
    assert (read.config, read.info, read.content_hash) == (learner.config, INFO, written.content_hash)
    assert (read.base_name, read.base_fingerprint) == ("embedded/text", learner.base.fingerprint)
    assert write(learner, tmp_path / "two") == written
    for name in FILES:
        assert file_sha256(tmp_path / "one" / name) == file_sha256(tmp_path / "two" / name)


def test_another_state_has_another_hash(new, tmp_path):
    learner = trained(new)
    hashes = {write(learner, tmp_path / "a").content_hash, write(learner, tmp_path / "b", info={}).content_hash}
    learner.optim_step({})
    assert len(hashes | {write(learner, tmp_path / "c").content_hash}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter_and_gives_the_same_logits(family, tmp_path):
    base = embedded_base(family)
    with learners(family) as new:
        learner = trained(new, family, lora_config={"rank": 4, "alpha": 7.0, "target_modules": ["q_proj", "v_proj"]})
        learner.optim_step({"learning_rate": 0.05})
        write(learner, tmp_path / "adapter")
        batch = prepare(base, learner.config, {"batch": text_batch(family, 5)}).model_batch
        rows = {"input_ids": batch.batch.input_ids_BT, "attention_mask": batch.batch.attention_mask_BT, **batch.vision}
        with torch.no_grad(), base.using(learner.name):
            mine = base.model(**rows).logits
    plain = load_model(base.spec, str(EMBEDDED / family), basic=BasicParams(attn_impl="sdpa", dtype="float32"))
    with torch.no_grad():
        before = plain(**rows).logits
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**rows).logits, mine)
    assert not torch.equal(before, mine)
    assert loaded.peft_config["default"].base_model_name_or_path == f"embedded/{family}"


def test_without_the_optimizer_and_gradients_training_starts_them_afresh(new, tmp_path):
    learner = trained(new)
    write(learner, tmp_path / "bare", optimizer=False, gradients=False)
    read = read_checkpoint(tmp_path / "bare")
    assert {name.partition(".")[0] for name in read.state.tensors} == {"adapter"}
    learner.load(read.state)
    assert learner.step == 1
    assert not learner._optimizer.state
    assert {read.state.values[name] for name in ("accumulated", "rows", "denominator", "unit")} == {0, None}
    assert run(learner, token_batch())["accumulated"] == 1


def test_a_state_without_optimizer_yet_is_written_and_read(new, tmp_path):
    learner = new(optimizer={"name": "sgd"}, **CONFIG)
    write(learner, tmp_path / "first")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [*FILES[:2], STATE_FILE]
    new("again", optimizer={"name": "sgd"}, **CONFIG).load(read_checkpoint(tmp_path / "first").state)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The files of a checkpoint, and an empty directory to put them in."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with learners("text") as new:
        write(trained(new, dp_config=DP), directory / "intact")
    (directory / "damaged").mkdir()
    return {path.name: path.read_bytes() for path in (directory / "intact").iterdir()}, directory / "damaged"


def put(files, directory):
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(intact, name):
    files, directory = intact
    put({other: content for other, content in files.items() if other != name}, directory)
    with pytest.raises(UserError, match=f"{name} cannot be read: No such file"):
        read_checkpoint(directory)


@given(name=st.sampled_from(FILES), seed=st.integers(0, 2**32), cut=st.booleans())
def test_a_file_that_was_cut_or_changed_is_named(intact, name, seed, cut):
    files, directory = intact
    draw = random.Random(seed)
    content = bytearray(files[name])
    place = draw.randrange(len(content) - 1)  # the last byte of JSON is its line's end
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    put({**files, name: bytes(content)}, directory)
    try:
        read = read_checkpoint(directory)
    except UserError as error:
        assert name in str(error)  # noqa: PT017 - what is read may also be the same
    else:
        assert (name, cut) == (STATE_FILE, False), "only white space of state.json may change"
        assert read.content_hash == json.loads(files[STATE_FILE])["content_hash"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 1}',
        "[" * 100_000,
        '{"version": 1, "files": []}',
        "\ufeff{}",
    ],
)
def test_a_state_file_of_another_form_is_refused(intact, text):
    files, directory = intact
    put({**files, STATE_FILE: text.encode()}, directory)
    with pytest.raises(UserError, match=STATE_FILE):
        read_checkpoint(directory)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("files", {"../adapter_model.safetensors": "0"}, "lists a file '../adapter_model.safetensors'"),
        ("files", {}, "does not list adapter_model.safetensors"),
        ("config", {"model_ref": 3}, "has a configuration that is none"),
    ],
)
def test_a_state_file_that_was_written_by_another_is_checked(intact, field, value, message):
    from inft.client.manifest import content_hash

    files, directory = intact
    stored = json.loads(files[STATE_FILE])
    del stored["content_hash"]
    # With the files that must be there, under a hash that is right.
    stored[field] = {**stored["files"], **value} if field == "files" and value else value
    text = json.dumps({**stored, "content_hash": content_hash(stored)})
    put({**files, STATE_FILE: text.encode()}, directory)
    with pytest.raises(UserError, match=message):
        read_checkpoint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_config": {**CONFIG["lora_config"], "rank": 8}}, "lora_config.rank=4, and this client 8"),
        ({"lora_config": {**CONFIG["lora_config"], "alpha": 8.0}}, "lora_config.alpha=32.0, and this client 8.0"),
        ({"lora_config": {**CONFIG["lora_config"], "target_modules": [SELF_ATTENTION]}}, "adapts other layers"),
        ({"dp_config": DP}, "without differential privacy, and this client trains with"),
        ({"optimizer": {"name": "sgd"}}, "has the state of adamw, and this client uses sgd"),
        ({"lora_config": {**CONFIG["lora_config"], "target_modules": ["*.q_proj", "v_proj", "down_proj"]}}, None),
        ({"batch_size": 2, "seed": 8}, None),
    ],
)
def test_a_checkpoint_fits_clients_of_its_kind(new, tmp_path, change, message):
    write(trained(new), tmp_path / "one")
    checkpoint = read_checkpoint(tmp_path / "one")
    config = training_config({"model_ref": "embedded/text", **CONFIG, **change})
    if message is None:
        check_fits(checkpoint, embedded_base("text"), config)
        return
    with pytest.raises(UserError, match=message):
        check_fits(checkpoint, embedded_base("text"), config)


def test_a_checkpoint_of_another_model_is_refused(new, tmp_path):
    learner = trained(new)
    write(learner, tmp_path / "one")
    foreign = replace(read_checkpoint(tmp_path / "one"), base_fingerprint="0" * 64)
    with pytest.raises(UserError, match="is of other weights"):
        check_fits(foreign, learner.base, learner.config)
