"""ModelSpec: the contract that each model family fulfils in one file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the rest of inft needs to know of one model family."""

    name: str  # "llama32": the word on the command line
    title: str  # "Llama 3.2 Vision": the words in a message
    auto_class: str  # class of transformers that loads it: "AutoModelForImageTextToText"
    model_types: tuple[str, ...]  # config.model_type values it takes; empty: any causal LM
    takes_images: bool
    parts: Mapping[str, str]  # part -> pattern of the full names of its linear layers, in reading order
    keep_16bit: tuple[str, ...]  # full module prefixes kept out of 4-bit: ("model.vision_model", …)
    attn_implementations: tuple[str, ...]
    chat_template: str | None  # with {% generation %} spans; None: the tokenizer's own
    collator: type  # LlamaCollator, AyaCollator, TextCollator
    released: Mapping[str, Callable[[], "PretrainedConfig"]]  # released hub id -> its config, known offline
    prepare: "Callable[[PreTrainedModel], PreTrainedModel]"  # mends a freshly loaded model (Aya's logit scale)
    most_image_tokens: Callable[[Any], int]  # processor -> tokens that an image takes at the most; 0: takes no images
    image_token_count: Callable[[Any, Mapping[str, Any]], tuple[int, int]] | None  # of a batch
    # (model, processor, images) -> [images, features]: what the vision tower makes of each; None: takes no images
    image_features: "Callable[[PreTrainedModel, Any, Sequence[Image]], Tensor] | None"
    plain_differs: str  # what plain transformers does otherwise with a saved model, in a sentence; "": nothing
