"""Weights of a NeoBERT as it was published: config.json with max_length, tensors in safetensors, head untied."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inft.models.loading import hub_source, local_source
from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM
from params.errors import UserError

Tensors = dict[str, Tensor]

CARRIED_OVER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "norm_eps",
    "rms_norm",
    "rope",
    "rope_theta",
    "pad_token_id",
    "classifier_dropout",
)
OTHER_NAMES = {
    "max_length": "max_position_embeddings",
    "dropout": "dropout_prob",
    "decoder_init_range": "initializer_range",
}
WITHOUT_WEIGHT = ("freqs_cis",)  # tables that old checkpoints stored; they follow from the configuration
HEAD, EMBEDDING = "decoder.weight", "model.encoder.weight"


def load_published(name: str, *, attn_backend: str = "sdpa") -> NeoBERTForMaskedLM:
    """Return the masked language model of a directory or hub id, in the layout of chandar-lab/NeoBERT or in ours.

    Tensor names with or without "model.", SwiGLU packed (w12) or in two (w1, w2). The head is tied when the checkpoint
    says so or has none; a warning tells when it has none. Weights keep their stored precision; code that lies beside
    them is never run. The model is in evaluation mode.
    Errors: UserError for another architecture, for weights not in safetensors, and for tensors that are missing,
    left over or of another shape, all of which it lists.
    """
    directory = _directory(name)
    stored = _read_config(directory)
    tensors = _renamed(_read_tensors(directory))
    tie = _is_tied(stored, tensors, directory)
    config = _config(stored, tie=tie, decoder_bias="decoder.bias" in tensors, attn_backend=attn_backend)
    with torch.device("meta"):
        model = NeoBERTForMaskedLM(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items() if not (tie and name == HEAD)}
    _check(expected, tensors, directory)
    model.load_state_dict(tensors, strict=not tie, assign=True)
    model.tie_weights()
    return model.eval()


def _directory(name: str) -> Path:
    local = local_source(name)
    if local is not None:
        return Path(local.name)
    from huggingface_hub import snapshot_download

    source = hub_source(name, elsewhere="give a local directory")
    return Path(
        snapshot_download(
            name, allow_patterns=["config.json", "*.safetensors"], local_files_only=source.local_files_only
        )
    )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} has no config.json: give the directory of a saved model.")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}. Download it again.") from error
    if not isinstance(stored, dict) or stored.get("model_type") != "neobert":
        kind = stored.get("model_type") if isinstance(stored, dict) else None
        raise UserError(f'{file} has model_type {kind!r}, not "neobert": only NeoBERTs can be loaded here.')
    if stored.get("ngpt"):
        raise UserError(f"{file} has ngpt: true, a variant with normalised weights that is not supported.")
    return stored


def _config(stored: dict[str, Any], *, tie: bool, decoder_bias: bool, attn_backend: str) -> NeoBERTConfig:
    fields = {key: stored[key] for key in CARRIED_OVER if key in stored}
    ours = {*OTHER_NAMES.values(), "hidden_act"} & stored.keys()
    fields |= {new: stored[old] for old, new in OTHER_NAMES.items() if old in stored}
    fields |= {key: stored[key] for key in ours}
    if "hidden_act" in fields:
        fields["hidden_act"] = str(fields["hidden_act"]).lower()
    try:
        return NeoBERTConfig(**fields, tie_word_embeddings=tie, decoder_bias=decoder_bias, attn_backend=attn_backend)
    except StrictDataclassError as error:
        raise UserError(f"A field of config.json or the attention backend is no NeoBERT's: {error}") from error


def _read_tensors(directory: Path) -> Tensors:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{directory} has no *.safetensors; other formats can run code and are not read. Convert the checkpoint."
        )
    tensors: Tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}. Download or copy it again.") from error
    return tensors


def _renamed(tensors: Tensors) -> Tensors:
    """Our names: everything but the head below "model.", SwiGLU's two halves in one."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] in WITHOUT_WEIGHT:
            continue
        inner = name.removeprefix("model.")
        renamed[inner if inner.startswith("decoder.") else f"model.{inner}"] = tensor
    for name in [name for name in renamed if name.endswith(".ffn.w3.weight")]:
        block = name.removesuffix("w3.weight")
        if f"{block}w1.weight" in renamed and f"{block}w2.weight" in renamed:
            halves = renamed.pop(f"{block}w1.weight"), renamed.pop(f"{block}w2.weight")
            renamed[f"{block}w12.weight"] = torch.cat(halves)
    return renamed


def _is_tied(stored: dict[str, Any], tensors: Tensors, directory: Path) -> bool:
    """Whether head and embedding are one; the stored copy of a tied head is dropped."""
    if HEAD not in tensors:
        if "decoder.bias" not in tensors and not stored.get("tie_word_embeddings"):
            warnings.warn(
                f"{directory} holds an encoder without a masked-LM head: the head starts as the embedding, tied to it, "
                "and predicts nothing of use before it is trained.",
                stacklevel=3,
            )
        return True
    tie = bool(stored.get("tie_word_embeddings")) and EMBEDDING in tensors
    if tie and torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        del tensors[HEAD]
        return True
    return False


def _check(expected: dict[str, torch.Size], tensors: Tensors, directory: Path) -> None:
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"not part of a NeoBERT with this config.json: {', '.join(unexpected)}")
    shapes = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if shapes:
        problems.append(f"of another shape: {', '.join(shapes)}")
    if problems:
        raise UserError(
            f"The weights in {directory} do not fit its config.json; {'; '.join(problems)}. Give a whole checkpoint."
        )
