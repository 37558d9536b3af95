"""weights_fingerprint: the same weights however they are stored, others whatever they are called."""

import torch
from safetensors.torch import load_file, save_file

from inft.models.loading import EMBEDDED
from inft.models.weights import weights_fingerprint


def test_names_shards_ties_and_float32_make_no_difference(tmp_path):
    weights = load_file(EMBEDDED / "text" / "model.safetensors")
    own = weights_fingerprint(str(EMBEDDED / "text"))
    names = sorted(weights)
    (tmp_path / "a").mkdir()
    renamed = {f"x.{name}": weights[name].to(torch.bfloat16).float().clone() for name in names}
    save_file({name: renamed[name] for name in list(renamed)[::2]}, tmp_path / "a" / "model-1.safetensors")
    twice = {name: renamed[name] for name in list(renamed)[1::2]}
    save_file({**twice, "again": renamed[f"x.{names[0]}"].clone()}, tmp_path / "a" / "model-2.safetensors")
    assert weights_fingerprint(str(tmp_path / "a")) == own


def test_a_change_in_one_tensor_makes_one(tmp_path):
    weights = load_file(EMBEDDED / "text" / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name] = weights[name] * 1.1
    save_file(weights, tmp_path / "model.safetensors")
    assert weights_fingerprint(str(tmp_path)) != weights_fingerprint(str(EMBEDDED / "text"))


def test_what_is_not_at_hand_has_none(tmp_path):
    assert weights_fingerprint("nobody/nothing") is None
    assert weights_fingerprint(str(tmp_path)) is None
