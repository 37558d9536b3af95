"""Linear layers by part: the released sizes, known offline, and every layer in exactly one part."""

import re
import time

import pytest

from inft.models import load_spec
from inft.models.modules import OTHER, linear_groups, linear_modules, list_linear_modules, meta_model, part_of
from inft.training.adapters import add_adapters
from params import LoRAParams, UserError

RELEASED = [
    ("llama32", "meta-llama/Llama-3.2-11B-Vision-Instruct", 10_670_220_835, 522),
    ("aya", "CohereLabs/aya-vision-8b", 8_468_239_600, 389),
    ("text", "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 211),
]


@pytest.mark.parametrize(("family", "name", "parameters", "layers"), RELEASED)
def test_released_sizes_are_known_without_a_hub(family, name, parameters, layers):
    began = time.perf_counter()
    model = meta_model(load_spec(family), name)
    groups = linear_groups(model, load_spec(family))
    assert time.perf_counter() - began < 5
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    assert sum(group.count for group in groups) == layers


@pytest.mark.parametrize(("family", "name"), [row[:2] for row in RELEASED])
def test_every_linear_layer_belongs_to_exactly_one_part(family, name):
    spec = load_spec(family)
    for layer in list_linear_modules(meta_model(spec, name)):
        assert sum(re.fullmatch(pattern, layer) is not None for pattern in spec.parts.values()) == 1, layer


def test_the_parts_of_llama(llama32):
    groups = linear_groups(meta_model(llama32.spec, RELEASED[0][1]), llama32.spec)
    counts = {}
    for group in groups:
        counts[group.part] = counts.get(group.part, 0) + group.count
    assert counts == {
        "vision": 240,
        "projector": 1,
        "self-attention": 128,
        "cross-attention": 32,
        "MLP": 120,
        "head": 1,
    }
    assert list(counts) == list(llama32.spec.parts), "in reading order"
    keys = next(group for group in groups if group.pattern.endswith("cross_attn.k_proj"))
    assert keys.pattern == "model.language_model.layers.N.cross_attn.k_proj"
    assert (keys.count, keys.shapes) == (8, ((4096, 1024),))


def test_the_embedded_model_is_read_from_its_configuration(family):
    model = meta_model(family.spec, "")
    assert list_linear_modules(model) == list_linear_modules(family.model())


def test_adapters_do_not_change_the_names(family):
    before = list_linear_modules(family.model())
    targets = [name for name in before if part_of(name, family.spec) == "MLP"]
    adapted = add_adapters(family.model(), family.spec, LoRAParams(r=2), [re.escape(targets[0])], seed=0)
    assert list(linear_modules(adapted)) == before


def test_layers_of_no_part_are_other(text):
    assert part_of("model.unheard_of", text.spec) == OTHER


def test_a_missing_path_is_named(llama32):
    with pytest.raises(UserError, match=r"no model directory at \./nowhere"):
        meta_model(llama32.spec, "./nowhere")
