"""Processors and models by hub id, local path, or "" for the embedded one, with errors that a user can act on."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.models import MODELS, load_spec
from inft.models.spec import ModelSpec
from inft.models.templates import GENERATION, PLAIN_TEMPLATE, Processor, first_difference, own_template, tokenizer_of
from params.basic import BasicParams
from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parents[1] / "embedded"
OURS = "embedded/"  # prefix of the names by which the training client knows these
CONNECT_SECONDS = 5.0  # to learn whether the hub answers; the libraries' own retries take half a minute
ATTENTION = {"flash": "flash_attention_2"}  # our word -> transformers'


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where from_pretrained looks: a local directory or a hub id, and whether only the cache may be used."""

    name: str
    local_files_only: bool


def load_processor(spec: ModelSpec, name: str, *, max_image_tiles: int | None = None) -> Processor:
    """Return the processor (of text models: the tokenizer) of a family, ready for its collator.

    A missing pad token becomes the end token, a missing chat template the family's. `max_image_tiles` caps the tiles
    an image is cut into. Errors: UserError as for `load_model`.
    """
    import transformers

    source = find_source(spec, name)
    if Path(source.name, "config.json").is_file() or not Path(source.name).is_dir():
        read_config(spec, source)  # beside an adapter there is a processor and no model
    auto = transformers.AutoProcessor if spec.takes_images else transformers.AutoTokenizer
    try:
        processor: Processor = auto.from_pretrained(
            source.name, local_files_only=source.local_files_only, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the processor of {source.name}: {error}") from error
    tokenizer = tokenizer_of(processor)
    _check_parts(spec, processor, source.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if max_image_tiles is not None:
        _cap_tiles(spec, processor, max_image_tiles)
    own = own_template(processor)
    if own is None:
        processor.chat_template = spec.chat_template or _plain_template(tokenizer)
    elif spec.chat_template is not None and not GENERATION.search(own):
        _tell_difference(spec, processor, own, source.name)
    return processor


def load_model(spec: ModelSpec, name: str, *, basic: BasicParams, quantization_config: Any = None) -> "PreTrainedModel":
    """Return a family's model in evaluation mode, mended by `spec.prepare`, with the cache off for training.

    Errors: UserError when the hub cannot be reached, the model is gated or unknown, the path is missing, the
    checkpoint is of another family, incomplete or not in safetensors, or the attention implementation is not offered.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    attention = _attention(spec, basic.attn_impl)
    source = find_source(spec, name)
    if Path(source.name, "adapter_config.json").is_file() and not Path(source.name, "config.json").is_file():
        raise UserError(f"{name} holds an adapter, not a model: give the base model that adapter_config.json names.")
    read_config(spec, source)
    try:
        model, report = getattr(transformers, spec.auto_class).from_pretrained(
            source.name,
            local_files_only=source.local_files_only,
            adapter_kwargs={"local_files_only": source.local_files_only},  # it looks for adapters on the hub, too
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, basic.dtype),
            attn_implementation=attention,
            device_map=_device_map(basic) if torch.cuda.is_available() else None,
            quantization_config=quantization_config,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load {source.name}: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{source.name} lacks {len(missing)} weights, such as {missing[0]}: they would be random. "
            "Give a complete checkpoint (an adapter alone is not one)."
        )
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    return spec.prepare(model).eval()


def find_source(spec: ModelSpec, name: str) -> Source:
    """Return where a model name points; UserError for a missing path and for what the hub refuses."""
    if name == "" or (name.removeprefix(OURS) in MODELS and name.startswith(OURS)):
        return Source(name=str(EMBEDDED / (name.removeprefix(OURS) or spec.name)), local_files_only=True)
    if name == "smollm2" and spec.name == "text":
        from inft.models.smollm2 import smollm2_directory

        return Source(name=str(smollm2_directory()), local_files_only=True)
    return local_source(name) or hub_source(name)


def local_source(name: str) -> Source | None:
    """Return the directory that a model name means, None for a hub id; UserError for a path without a model."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "tokenizer_config.json")):
            raise UserError(f"{name} holds neither config.json nor a processor: give the directory of a saved model.")
        return Source(name=str(path), local_files_only=True)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no model directory at {name}. Give a directory with config.json, or a hub id.")
    return None


def hub_source(
    name: str, *, elsewhere: str = "give a local directory (inft: --model PATH, or --demo for the embedded model)"
) -> Source:
    """A hub id that answers, or that lies whole in the cache when the hub does not; `elsewhere` is the other way."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of the client library, whichever this release of huggingface_hub is built on
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=CONNECT_SECONDS)
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a directory nor a hub id such as owner/name.") from error
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login` or set "
            f"HF_TOKEN. Without access, {elsewhere}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {name} that you may read. Check the spelling, set HF_TOKEN if it is private, "
            f"or {elsewhere}."
        ) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(
                f"the hub cannot be reached ({type(error).__name__}) and {name} is not in the cache: {elsewhere}."
            ) from error
        return Source(name=name, local_files_only=True)
    return Source(name=name, local_files_only=False)


def family_of(source: Source) -> ModelSpec:
    """Return the family that a model is of, told by the model_type of its configuration.

    Errors: UserError for a configuration that cannot be read, and a model that generates no text.
    """
    import transformers

    config = _config(source)
    specs = [load_spec(name) for name in MODELS]
    of_its_type = next((spec for spec in specs if config.model_type in spec.model_types), None)
    if of_its_type is not None:
        return of_its_type
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        titles = " or ".join(spec.title for spec in specs if spec.model_types)
        raise UserError(f"{source.name} is a {config.model_type} model: give a causal language model, {titles}.")
    return next(spec for spec in specs if not spec.model_types)


def read_config(spec: ModelSpec, source: Source) -> "PretrainedConfig":
    """Return a model's configuration; UserError when it belongs to another family, which is named."""
    import transformers

    config = _config(source)
    families = {kind: name for name in MODELS for kind in load_spec(name).model_types}
    known = families.get(config.model_type)
    if spec.model_types and config.model_type not in spec.model_types:
        right = known or ("text" if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else None)
        remedy = f"Train it with `inft train {right}`." if right else "inft has no family for it."
        raise UserError(f"{source.name} is a {config.model_type} model, not {spec.title}. {remedy}")
    if not spec.model_types and known:
        raise UserError(f"{source.name} is a {config.model_type} model. Train it with `inft train {known}`.")
    if not spec.model_types and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{source.name} is a {config.model_type} model, not a causal language model.")
    return config


def _config(source: Source) -> "PretrainedConfig":
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(
            source.name, local_files_only=source.local_files_only, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration of {source.name}: {error}") from error


def _check_parts(spec: ModelSpec, processor: Any, name: str) -> None:
    """UserError when something is missing that the collators need."""
    tokenizer = tokenizer_of(processor)
    if spec.takes_images and not hasattr(processor, "image_processor"):
        raise UserError(f"{name} has a tokenizer but no image processor: give the processor of {spec.title}.")
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} does not tell where its tokens stand: one with tokenizer.json does.")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end token, which tells a model to stop: set eos_token.")


def _attention(spec: ModelSpec, name: str) -> str:
    from transformers.utils import is_flash_attn_2_available

    if name not in spec.attn_implementations:
        offered = ", ".join(spec.attn_implementations)
        raise UserError(f"basic.attn_impl={name} is not offered by {spec.title}: use one of {offered}.")
    if name == "flash" and not is_flash_attn_2_available():
        raise UserError("basic.attn_impl=flash needs the package flash-attn and a CUDA GPU: use sdpa, or install it.")
    return ATTENTION.get(name, name)


def _device_map(basic: BasicParams) -> Any:
    """The device map, where one process drives all GPUs; under a launcher each process fills its own."""
    rank = os.environ.get("LOCAL_RANK")
    return {"": int(rank)} if rank is not None and basic.device_map == "auto" else basic.device_map


def _cap_tiles(spec: ModelSpec, processor: Any, tiles: int) -> None:
    """Lower the tiles an image is cut into, where each tile is tokens.

    Mllama's model always computes all its tiles and numbers aspect ratios by them: a processor with fewer would
    send it the numbers of other shapes.
    """
    most = getattr(processor.image_processor, "max_patches", None) if spec.takes_images else None
    if most is None:
        raise UserError(f"basic.max_image_tiles does not apply to {spec.title}: leave it unset.")
    if not 1 <= tiles <= most:
        raise UserError(
            f"basic.max_image_tiles={tiles} must be 1 to {most}, what the processor of {spec.title} cuts: "
            f"--set basic.max_image_tiles={most} or less."
        )
    processor.image_processor.max_patches = tiles


def _plain_template(tokenizer: Any) -> str:
    """The plain template, with the beginning token where the tokenizer itself would add one."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


def _tell_difference(spec: ModelSpec, processor: Any, own: str, name: str) -> None:
    """Log that a checkpoint's own template is used because it is not the family's; its masks are as exact."""
    assert spec.chat_template is not None
    difference = first_difference(processor, spec.chat_template, own)
    if difference is not None:
        logger.info("%s has another chat template than %s (%s): its own is used.", name, spec.title, difference)
