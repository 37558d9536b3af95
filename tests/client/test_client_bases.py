"""Bases: found by name, loaded once; adapters that follow from their seed and do not touch each other."""

import shutil
import signal
import threading
from fnmatch import fnmatchcase

import pytest
import torch
from embedded_bases import embedded_base
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from inft.client.bases import Bases
from inft.client.errors import InvalidRequest
from inft.client.targets import glob_matches
from inft.models.loading import EMBEDDED, Source, family_of
from params.client import EngineParams, LoRAConfig
from params.errors import UserError

CPU = EngineParams(device="cpu")
LORA = LoRAConfig(rank=4, dropout=0.0)
IDS = torch.arange(40, 60).reshape(2, 10)


def logits(base, name="", **using):
    with torch.no_grad(), base.using(name, **using):
        return base.model(input_ids=IDS).logits


@pytest.fixture
def base():
    return embedded_base("text")


@pytest.fixture
def adapter(base):
    """add(name, lora, seed) on the text model; what was added is removed."""
    added = []

    def add(name="a", lora=LORA, *, seed=1, spread=0.0, **more):
        parameters = base.add_adapter(name, lora, seed=seed, **more)
        added.append(name)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in parameters.items():
                if spread and "lora_B" in key:
                    weight.normal_(std=spread, generator=draw)
        return parameters

    yield add
    for name in added:
        base.remove_adapter(name)


def test_a_name_of_the_service_stands_for_its_model():
    bases = Bases(EngineParams(device="cpu", models={"small": "embedded/text"}, any_model=False))
    assert bases.names() == ["small"]
    found = bases.get("small")
    assert found.spec.name == "text"
    assert found.fingerprint == embedded_base("text").fingerprint
    assert (found.vocab_size, found.context, found.device) == (1161, 4096, torch.device("cpu"))
    with pytest.raises(InvalidRequest, match=r"'embedded/text' is not offered here. Offered: small\."):
        bases.get("embedded/text")


def test_the_embedded_models_are_offered_unless_forbidden():
    assert Bases(CPU).names() == ["embedded/llama32", "embedded/aya", "embedded/text"]
    assert Bases(EngineParams(any_model=False)).names() == []


def test_two_names_of_one_model_and_two_threads_share_one_base():
    bases = Bases(EngineParams(device="cpu", models={"small": "embedded/text"}))
    found = []
    threads = [threading.Thread(target=lambda: found.append(bases.get("small"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in (*found, bases.get("embedded/text"))}) == 1


def test_a_directory_is_a_model_and_another_copy_has_the_same_fingerprint(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(EMBEDDED / "text", copy)
    assert Bases(CPU).get(str(copy)).fingerprint == embedded_base("text").fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedded/gpt", "there is no embedded model 'embedded/gpt'. Embedded: embedded/llama32, embedded/aya"),
        ("/nowhere/model", "no model directory at /nowhere/model"),
        ("a b", "neither a directory nor a hub id"),
    ],
)
def test_what_is_no_model_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        Bases(CPU).get(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused():
    with pytest.raises(UserError, match="device is cuda, and there is no CUDA device"):
        Bases(EngineParams(device="cuda")).get("embedded/text")


@pytest.mark.parametrize("name", ["text", "llama32", "aya"])
def test_a_family_is_told_by_its_configuration(name):
    assert family_of(Source(name=str(EMBEDDED / name), local_files_only=True)).name == name


def test_a_model_that_generates_no_text_has_no_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"is a vit model: give a causal language model, Llama 3\.2 Vision or Aya"):
        family_of(Source(name=str(tmp_path), local_files_only=True))


def test_first_weights_follow_from_the_seed_alone_and_leave_torchs_generator(base, adapter):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = {key: weight.clone() for key, weight in adapter("one", seed=7).items()}
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    two = adapter("two", LoRAConfig(rank=4, dropout=0.3), seed=7)
    three = adapter("three", seed=8)
    assert all(torch.equal(one[key], two[key]) for key in one)
    firsts = [key for key in one if "lora_A" in key]
    assert not any(torch.equal(one[key], three[key]) for key in firsts)
    assert all(not weight.any() for key, weight in one.items() if "lora_B" in key)
    assert all(weight.dtype == torch.float32 for weight in one.values())
    widest = max(float(one[key].abs().max()) * one[key].shape[1] ** 0.5 for key in firsts)
    assert 0.9 < widest <= 1


def test_adapters_of_other_ranks_and_layers_do_not_touch_each_other_or_the_base(base, adapter):
    plain = logits(base)
    adapter("one", LORA, seed=1, spread=0.1)
    alone = logits(base, "one")
    adapter("two", LoRAConfig(rank=2, target_modules=("down_proj", "*.0.self_attn.q_proj")), seed=2, spread=0.1)
    assert torch.equal(logits(base, "one"), alone)
    assert torch.equal(logits(base), plain)
    both = [alone, logits(base, "two"), plain]
    assert not any(torch.equal(both[i], both[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_adapter_in_use_is_as_peft_sets_it(base, adapter):
    for number, name in enumerate(("one", "two")):
        adapter(name, seed=number, spread=0.1)
    mine = logits(base, "two")
    with base.using("two"):
        trainable = {name for name, p in base.model.named_parameters() if p.requires_grad}
    base._wrapped.set_adapter("two")
    assert {name for name, p in base.model.named_parameters() if p.requires_grad} == trainable
    assert trainable
    assert all(".two." in name for name in trainable)
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=IDS).logits, mine)
    for name in ("one", "two"):
        with base.using(name):
            pass
    assert not any(p.requires_grad for p in base.model.parameters())


def test_an_adapter_that_is_removed_leaves_nothing(base, adapter):
    adapter("stays")
    base.add_adapter("goes", LORA, seed=1)
    base.remove_adapter("goes")
    assert not [name for name, _ in base.model.named_modules() if name.endswith(".goes")]
    adapter("goes", seed=2)


def test_the_last_adapter_can_be_removed_and_another_added(base):
    plain = logits(base)
    for seed in (1, 2):
        base.add_adapter("only", LORA, seed=seed)
        base.remove_adapter("only")
        assert torch.equal(logits(base), plain)


def test_one_adapter_at_a_time(base, adapter):
    adapter("one")
    with base.using("one"), pytest.raises(RuntimeError, match="the adapter one is in use"), base.using(""):
        pass
    with pytest.raises(UserError, match="'one' is empty or taken"):
        base.add_adapter("one", LORA, seed=1)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), "'q_prj' matches no linear layer of text models. Nearest names: .*q_proj"),
        (("lm_head",), "match the head lm_head"),
        (("*_head",), "match the head lm_head"),
        (("(",), "regular expressions are not read"),
        ((r".*q_proj|v_proj",), "regular expressions are not read"),
        (("",), "'' matches no linear layer"),
        (("q_proj",) * 65, "has 65 entries, more than 64"),
        (("q_proj", "a" * 201), "has 201 characters, more than 200"),
    ],
)
def test_targets_that_match_nothing_are_refused_and_nothing_is_added(base, targets, message):
    with pytest.raises(UserError, match=message):
        base.add_adapter("dead", LoRAConfig(target_modules=targets), seed=1)
    base.add_adapter("dead", LORA, seed=1)
    base.remove_adapter("dead")


@pytest.fixture
def five_seconds():
    """The test ends with an error after them, within a match too."""

    def late(*args):
        raise TimeoutError("the targets took more than five seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "target", ["(.*)*Z", "(a|a)*" * 20, "*a" * 100, "*" * 199 + "!", "*.self_attn" * 18, "_" * 200]
)
def test_no_target_takes_long(base, five_seconds, target):
    with pytest.raises(UserError, match="matches no linear layer"):
        base.targets(LoRAConfig(target_modules=(target,)))
    with pytest.raises(UserError, match="matches no linear layer"):
        base.targets(LoRAConfig(target_modules=tuple(f"{number}{target}"[:200] for number in range(64))))


NAMES = st.text("ab.", max_size=8)


@given(pattern=st.text("ab.*", max_size=8), name=NAMES)
def test_a_star_stands_for_any_characters(pattern, name):
    assert glob_matches(pattern, name) == fnmatchcase(name, pattern)


@given(parts=st.lists(NAMES, min_size=1, max_size=4), between=st.lists(NAMES, min_size=3, max_size=3))
def test_what_is_made_from_a_pattern_matches_it(parts, between):
    name = parts[0] + "".join(gap + part for gap, part in zip(between, parts[1:], strict=False))
    assert glob_matches("*".join(parts), name)


def test_names_and_globs_find_the_layers_they_stand_for(base):
    def found(*targets):
        return base.targets(LoRAConfig(rank=4, target_modules=targets))

    layers = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]
    assert found("q_proj") == found("self_attn.q_proj") == found("*.q_proj", "q_proj") == layers
    assert found("model.layers.2.self_attn.q_proj") == layers[2:3]
    assert found("*.2.self_attn.*") == [f"model.layers.2.self_attn.{name}_proj" for name in "qkvo"]


def test_plain_names_leave_the_vision_tower_out_and_say_how_to_reach_it():
    vlm = embedded_base("aya")
    assert not any("vision" in name for name in vlm.targets(LoRAConfig(target_modules=("q_proj",))))
    with pytest.raises(UserError, match=r"of the vision tower only: write \*vision\*\.fc1 if"):
        vlm.targets(LoRAConfig(target_modules=("fc1",)))
    assert vlm.targets(LoRAConfig(target_modules=("*vision*.fc1",)))


def test_a_rank_that_no_layer_can_use_is_refused_and_nothing_is_made(base):
    before = parts_of(base.model)
    lora = LoRAConfig(rank=129, target_modules=("q_proj", "down_proj"))
    with pytest.raises(UserError, match=r"rank is 129, and the widest layer it is for, model\.\S+, can use 128"):
        base.add_adapter("wide", lora, seed=1)
    assert parts_of(base.model) == before
    assert base.targets(LoRAConfig(rank=128, target_modules=("q_proj",)))


def parts_of(model):
    """What there is in the model: its modules, and what PEFT's layers hold by an adapter's name."""
    held = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias", "_active_adapter")
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if hasattr(module, "lora_A")}
    kept = {f"{name}.{key}": str(getattr(module, key)) for name, module in adapted.items() for key in held}
    return list(modules), kept, list(getattr(model, "peft_config", ()))


@pytest.mark.parametrize("others", [0, 1], ids=["no_other_adapter", "another_adapter"])
@pytest.mark.parametrize("layers", [("q_proj", "v_proj"), ("down_proj",)], ids=["same_layers", "other_layers"])
@pytest.mark.parametrize("place", [1, 3, "injected"])
def test_an_adapter_that_cannot_be_made_leaves_nothing(monkeypatch, others, layers, place):
    base = Bases(CPU).get("embedded/text")
    plain = logits(base)
    if others:
        base.add_adapter("other", LoRAConfig(rank=4, target_modules=("q_proj", "v_proj")), seed=1)
    before = parts_of(base.model)
    lora = LoRAConfig(rank=4, target_modules=layers)
    with monkeypatch.context() as patch:
        fail(patch, place)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            base.add_adapter("new", lora, seed=2)
    assert not [name for name in parts_of(base.model)[0] if name.endswith(".new")]
    if place != "injected" if not others else layers == ("q_proj", "v_proj"):
        assert parts_of(base.model) == before
    assert torch.equal(logits(base), plain)
    base.add_adapter("new", lora, seed=2)
    clean = Bases(CPU).get("embedded/text").add_adapter("new", lora, seed=2)
    assert all(torch.equal(weight, clean[key]) for key, weight in base._adapters["new"].parameters.items())
    assert base._adapters["new"].parameters.keys() == clean.keys()
    base.remove_adapter("new")


def fail(patch, place):
    """Let memory run out at that layer, or once the layers are there."""
    calls = []
    made = LoraLayer.reset_lora_parameters

    def limited(layer, *args, **more):
        calls.append(layer)
        if len(calls) == place:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made(layer, *args, **more)

    def full(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    if place == "injected":
        patch.setattr(torch.nn.Linear, "float", full)
    else:
        patch.setattr(LoraLayer, "reset_lora_parameters", limited)


@pytest.mark.parametrize(
    ("family", "target", "part"),
    [
        ("llama32", "q_proj", "cross-attention"),
        ("llama32", "*vision_model*.q_proj", "vision"),
        ("aya", "*multi_modal_projector.linear_1", "projector"),
    ],
)
def test_privacy_is_for_the_layers_of_the_language_model(family, target, part):
    vlm = embedded_base(family)
    lora = LoRAConfig(target_modules=(target,))
    with pytest.raises(UserError, match=f"of '{part}': with differential privacy only the language model's own"):
        vlm.targets(lora, private=True)
    assert vlm.targets(lora)


def test_dropout_follows_from_the_seed_and_needs_one(base, adapter):
    adapter("one", LoRAConfig(rank=4, dropout=0.5), seed=1, spread=0.2)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    dropped = logits(base, "one", dropout_seed=7)
    assert torch.equal(dropped, logits(base, "one", dropout_seed=7))
    assert not torch.equal(dropped, logits(base, "one", dropout_seed=8))
    plain = logits(base, "one")
    assert torch.equal(plain, logits(base, "one"))
    assert not torch.equal(plain, dropped)
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_keeps_its_share_scaled_so_that_the_mean_stays(base, adapter):
    adapter("one", LoRAConfig(rank=4, dropout=0.25), seed=1)
    layer = next(module for module in base.model.modules() if type(module).__name__ == "SeededDropout")
    ones = torch.ones(200, 200, requires_grad=True)
    with base.using("one", dropout_seed=1):
        dropped = layer(ones)
        dropped.sum().backward()
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(float((dropped == 0).double().mean()) - 0.25) < 0.01
    assert torch.equal(ones.grad, dropped.detach())


def test_adapters_on_a_base_in_bfloat16_are_float32():
    base = Bases(EngineParams(device="cpu", dtype="bfloat16")).get("embedded/text")
    parameters = base.add_adapter("one", LORA, seed=1)
    assert next(base.model.parameters()).dtype == torch.bfloat16
    assert {weight.dtype for weight in parameters.values()} == {torch.float32}
    assert torch.equal(parameters[next(iter(parameters))], first_of_float32_base())


def first_of_float32_base():
    base = embedded_base("text")
    parameters = base.add_adapter("one", LORA, seed=1)
    base.remove_adapter("one")
    return parameters[next(iter(parameters))]


@pytest.mark.slow
def test_a_base_in_four_bits_takes_adapters():
    base = Bases(EngineParams(device="cpu", quantize=True)).get("embedded/text")
    assert any(type(module).__name__ == "Linear4bit" for module in base.model.modules())
    base.add_adapter("one", LORA, seed=1)
    assert logits(base, "one").isfinite().all()
