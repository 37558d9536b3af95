"""Published NeoBERT weights give the logits of a plain implementation; what does not fit is listed."""

import json

import pytest
import torch
from plain_neobert import plain_logits
from safetensors.torch import save_file

from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM
from inft.models.neobert_import import load_published
from params.errors import UserError

HIDDEN, LAYERS, HEADS, VOCABULARY, WIDTH = 24, 2, 2, 31, 24  # width: 8 * ceil(int(2 / 3 * 36) / 8)
CONFIG = {
    "architectures": ["NeoBERTLMHead"],
    "auto_map": {"AutoConfig": "model.NeoBERTConfig", "AutoModel": "model.NeoBERT"},
    "model_type": "neobert",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 36,
    "vocab_size": VOCABULARY,
    "max_length": 64,
    "norm_eps": 1e-5,
    "pad_token_id": 0,
    "embedding_init_range": 0.02,
    "decoder_init_range": 0.02,
    "torch_dtype": "float32",
}
TEXT = [3, 17, 30, 3, 8, 1, 12]


def published_tensors(*, bias=True, head=True):
    torch.manual_seed(5)
    shapes = {"encoder.weight": (VOCABULARY, HIDDEN), "layer_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"transformer_encoder.{layer}."
        shapes |= {
            f"{block}qkv.weight": (3 * HIDDEN, HIDDEN),
            f"{block}wo.weight": (HIDDEN, HIDDEN),
            f"{block}ffn.w12.weight": (2 * WIDTH, HIDDEN),
            f"{block}ffn.w3.weight": (HIDDEN, WIDTH),
            f"{block}attention_norm.weight": (HIDDEN,),
            f"{block}ffn_norm.weight": (HIDDEN,),
        }
    if head:
        shapes["decoder.weight"] = (VOCABULARY, HIDDEN)
    if bias:
        shapes["decoder.bias"] = (VOCABULARY,)
    return {name: torch.randn(shape, dtype=torch.float64) * 0.4 for name, shape in shapes.items()}


def publish(directory, tensors, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return str(directory)


def with_prefix(tensors):
    return {name if name.startswith("decoder.") else f"model.{name}": tensor for name, tensor in tensors.items()}


def unpacked(tensors):
    """SwiGLU's two halves as separate matrices."""
    split = {}
    for name, tensor in tensors.items():
        if name.endswith("ffn.w12.weight"):
            split[name.replace("w12", "w1")], split[name.replace("w12", "w2")] = tensor.chunk(2)
        else:
            split[name] = tensor
    return split


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0]


@pytest.mark.parametrize("layout", [with_prefix, dict, unpacked], ids=["model.", "bare", "w1 and w2"])
def test_published_weights_give_the_logits_of_a_plain_implementation(tmp_path, layout):
    tensors = published_tensors()
    model = load_published(publish(tmp_path, layout(tensors)))
    expected = plain_logits(tensors, TEXT, layers=LAYERS, heads=HEADS)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-9)
    assert model.decoder.weight is not model.model.encoder.weight
    assert model.config.decoder_bias
    assert model.config.max_position_embeddings == 64
    assert not model.config.tie_word_embeddings
    assert not model.training


def test_an_imported_model_is_the_same_after_saving_and_loading(tmp_path):
    model = load_published(publish(tmp_path / "published", published_tensors()))
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(
        logits(NeoBERTForMaskedLM.from_pretrained(tmp_path / "ours")), logits(model), rtol=0, atol=0
    )
    torch.testing.assert_close(logits(load_published(str(tmp_path / "ours"))), logits(model), rtol=0, atol=0)


def test_our_own_tied_models_load_without_a_warning(tmp_path, recwarn):
    torch.manual_seed(0)
    config = NeoBERTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    saved = NeoBERTForMaskedLM(config).eval()
    saved.save_pretrained(tmp_path)
    loaded = load_published(str(tmp_path))
    assert loaded.decoder.weight is loaded.model.encoder.weight
    torch.testing.assert_close(logits(loaded), logits(saved), rtol=0, atol=0)
    assert not [warning for warning in recwarn if "head" in str(warning.message)]


def test_an_encoder_without_a_head_is_tied_and_says_so(tmp_path):
    tensors = published_tensors(bias=False, head=False)
    with pytest.warns(UserWarning, match="without a masked-LM head"):
        model = load_published(publish(tmp_path, tensors))
    assert model.decoder.weight is model.model.encoder.weight
    torch.testing.assert_close(
        logits(model), plain_logits(tensors, TEXT, layers=LAYERS, heads=HEADS), rtol=0, atol=1e-9
    )


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    tensors = published_tensors()
    del tensors["transformer_encoder.1.wo.weight"], tensors["layer_norm.weight"]
    tensors["transformer_encoder.0.qkv.bias"] = torch.zeros(72, dtype=torch.float64)
    tensors["encoder.weight"] = torch.zeros(VOCABULARY + 1, HIDDEN, dtype=torch.float64)
    with pytest.raises(UserError) as error:
        load_published(publish(tmp_path, tensors))
    for part in (
        "missing: model.layer_norm.weight, model.transformer_encoder.1.wo.weight",
        "model.transformer_encoder.0.qkv.bias",
        "model.encoder.weight is [32, 24], not [31, 24]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "'bert', not \"neobert\""),
        ({"ngpt": True}, "ngpt"),
        ({"hidden_size": 25}, "25"),
        ({"hidden_act": "relu"}, "relu"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        load_published(publish(tmp_path, published_tensors(), **changes))


def test_weights_in_other_formats_and_broken_files_are_refused(tmp_path):
    directory = publish(tmp_path, published_tensors())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_published(directory)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load_published(directory)
    with pytest.raises(UserError, match="no model directory"):
        load_published(str(tmp_path / "elsewhere"))
