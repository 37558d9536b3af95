"""An encoder's tokenizer and model from the parameters: new from the seed, or from stored weights."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from inft.encoders.data.tokenised import tokenizer_fingerprint
from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM
from inft.models.neobert_attention import check_backend
from inft.models.neobert_import import load_published
from params.encoder import DEFAULT_TOKENIZER, EncoderParams
from params.errors import UserError

ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "rope",
    "rms_norm",
    "norm_eps",
    "hidden_act",
    "dropout_prob",
    "tie_word_embeddings",
    "attn_backend",
)


def load_tokenizer(params: EncoderParams) -> PreTrainedTokenizerBase:
    """Return the tokenizer of tokenizer.name; where none is named that of model.name, else DEFAULT_TOKENIZER.

    Errors: UserError when there is none, and when it is another than the one that the stored model was trained with.
    """
    name, stored = params.tokenizer.name, params.model.name
    if name is None:
        return _tokenizer(stored or DEFAULT_TOKENIZER, "tokenizer.name" if stored is None else "model.name")
    tokenizer = _tokenizer(name, "tokenizer.name")
    if stored is None or not _has_tokenizer(Path(stored)):
        return tokenizer
    if tokenizer_fingerprint(_tokenizer(stored, "model.name")) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"tokenizer.name {name} is another tokenizer than the one that {stored} was trained with: leave it out."
        )
    return tokenizer


def _tokenizer(place: str, field: str) -> PreTrainedTokenizerBase:
    inner = Path(place) / "tokenizer"
    try:
        return AutoTokenizer.from_pretrained(inner if inner.is_dir() else place)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split(". ")[0].split()).rstrip(" :.")
        raise UserError(
            f"{field} {place}: no tokenizer could be loaded ({reason}). Name a directory with a tokenizer.json, or a "
            "hub id that can be reached, with tokenizer.name."
        ) from error


def _has_tokenizer(directory: Path) -> bool:
    return any((place / "tokenizer.json").is_file() for place in (directory, directory / "tokenizer"))


def check_attention(params: EncoderParams) -> None:
    """UserError that names what model.attn_backend lacks on this machine."""
    cuda, half = torch.cuda.is_available(), params.trainer.mixed_precision == "bf16"
    check_backend(params.model.attn_backend, "cuda" if cuda else "cpu", torch.bfloat16 if half else torch.float32)


def new_config(params: EncoderParams, tokenizer: PreTrainedTokenizerBase) -> NeoBERTConfig:
    """The configuration of a new model."""
    fields = {name: getattr(params.model, name) for name in ARCHITECTURE}
    return NeoBERTConfig(**fields, pad_token_id=tokenizer.pad_token_id)


def build_model(params: EncoderParams, tokenizer: PreTrainedTokenizerBase) -> NeoBERTForMaskedLM:
    """Return the model with its masked-LM head, in float32.

    Errors: UserError where the vocabulary, the context or the stored weights do not fit.
    """
    check_attention(params)
    stored = params.model.name
    model = _stored_model(params, stored) if stored else NeoBERTForMaskedLM(new_config(params, tokenizer))
    tokens, rows = len(tokenizer), model.config.vocab_size
    if tokens > rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has {tokens} tokens and the model {rows}: raise "
            f"model.vocab_size to {-(-tokens // 64) * 64}, or take the model's own tokenizer."
        )
    if params.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def as_loaded(params: EncoderParams, model: NeoBERTForMaskedLM) -> EncoderParams:
    """The parameters with the architecture that the model has, which is its own where it was stored."""
    return replace(params, model=replace(params.model, **{name: getattr(model.config, name) for name in ARCHITECTURE}))


def architecture_notice(params: EncoderParams, model: NeoBERTForMaskedLM) -> str | None:
    """What a user who asked for another architecture than that of the stored model should know."""
    default = EncoderParams().model
    asked = {n: getattr(params.model, n) for n in ARCHITECTURE if n not in ("max_position_embeddings", "attn_backend")}
    unread = [n for n, value in asked.items() if value not in (getattr(default, n), getattr(model.config, n))]
    if not unread:
        return None
    return f"model.{', model.'.join(unread)} are not read: {params.model.name} brings its own architecture."


def compile_in_place(parts: Iterable[nn.Module], params: EncoderParams, *, dynamic: bool) -> None:
    """Compile modules as trainer.torch_compile says, in place, so that names stay; `dynamic` where it says nothing."""
    trainer = params.trainer
    if not trainer.torch_compile:
        return
    told = trainer.torch_compile_dynamic
    for part in parts:
        part.compile(backend=trainer.torch_compile_backend, dynamic=dynamic if told is None else told)


def _stored_model(params: EncoderParams, stored: str) -> NeoBERTForMaskedLM:
    model = load_published(stored, attn_backend=params.model.attn_backend)
    config, wanted = model.config, params.dataset.max_seq_length
    if wanted > config.max_position_embeddings:
        if not config.rope:
            raise UserError(
                f"{stored} has learned positions up to {config.max_position_embeddings}: lower dataset.max_seq_length "
                f"from {wanted}."
            )
        config.max_position_embeddings = wanted  # rotary angles have no weights
    return model.float()
