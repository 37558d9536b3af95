"""The encoder that is fine-tuned or embeds: a new NeoBERT, a stored one, or any other encoder of transformers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from inft.encoders.build import check_attention, compile_in_place, new_config
from inft.encoders.contrastive.encode import longest_text
from inft.models.loading import local_source
from inft.models.neobert import NeoBERTModel
from inft.models.neobert_import import load_published
from params.encoder import EncoderParams
from params.errors import UserError


def build_encoder(params: EncoderParams, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model that the parameters ask for, in float32, ready to train.

    Errors: UserError where vocabulary or context do not fit, and for weights that cannot be loaded.
    """
    check_attention(params)
    if params.model.name is None:
        model: PreTrainedModel = NeoBERTModel(new_config(params, tokenizer))
    else:
        model = load_encoder(params.model.name, attn_backend=params.model.attn_backend)
    check_fit(model, tokenizer, max(params.dataset.max_seq_length, params.contrastive.query_max_length or 0))
    if params.trainer.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"model {params.model.name} cannot compute activations again: set trainer.gradient_checkpointing to "
                "false; contrastive.gradcache_chunk_size saves memory, too."
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = model.transformer_encoder if isinstance(model, NeoBERTModel) else [model]
    compile_in_place(blocks, params, dynamic=True)  # texts differ in length
    return model.float().train()


def load_encoder(name: str, *, attn_backend: str = "sdpa") -> PreTrainedModel:
    """Return the encoder of a directory or hub id without any head, as it is stored; code beside it is never run.

    Errors: UserError when it cannot be loaded, lacks weights, or is no encoder.
    """
    local = local_source(name)
    name = name if local is None else local.name
    config = _config(name)
    if config.get("model_type") == "neobert":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no masked-LM head does not matter here
            return load_published(name, attn_backend=attn_backend).model
    if attn_backend != "sdpa":
        raise UserError(f"model.attn_backend {attn_backend} is for NeoBERT, and {name} is none: drop it.")
    try:
        known = AutoConfig.from_pretrained(name, trust_remote_code=False)
        head = {"add_pooling_layer": False} if _has_pooling_layer(known) else {}  # it would never get a gradient
        with _without_load_report():
            model, loading = AutoModel.from_pretrained(
                name, config=known, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **head
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"model {name} lacks weights: {', '.join(missing[:5])}. Give a whole checkpoint.")
    if model.config.is_encoder_decoder:
        raise UserError(f"model {name} is an encoder-decoder: give an encoder, such as BERT, ModernBERT or NeoBERT.")
    return model


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """UserError when tokens or texts go beyond what the model has embeddings for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: set tokenizer.name to "
            "the model's own, or raise model.vocab_size of a new model."
        )
    longest = longest_text(model.config)
    if longest is not None and max_length > longest:
        raise UserError(
            f"texts of {max_length} tokens do not fit the model's {longest} positions: lower dataset.max_seq_length "
            "and contrastive.query_max_length (inft embed: --max-length)."
        )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Heads that are left out are no news; what is missing is looked at here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _config(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _has_pooling_layer(config: Any) -> bool:
    if type(config) not in MODEL_MAPPING:
        return False
    return "add_pooling_layer" in signature(MODEL_MAPPING[type(config)].__init__).parameters
