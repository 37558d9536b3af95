"""Aya Vision (SigLIP + Cohere2): image tiles become tokens of the language model's own sequence."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inft.models.collate import CaptionCollator
from inft.models.spec import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel

# Cohere's turns with the answer marked. The beginning-of-text token is the tokenizer's own addition. The generation
# prompt ends before <|START_RESPONSE|>: the model writes that token itself, so it is supervised. A checkpoint whose own
# template renders otherwise keeps its own (CaptionCollator takes it apart).
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}{{- content -}}{%- else -%}
        {%- for part in content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}
        {%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|START_OF_TURN_TOKEN|>' -}}
    {%- if message.role == 'assistant' -%}
        {{- '<|CHATBOT_TOKEN|>' -}}
        {%- generation -%}
            {{- '<|START_RESPONSE|>' -}}{{- text_of(message.content) -}}{{- '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- '<|SYSTEM_TOKEN|>' if message.role == 'system' else '<|USER_TOKEN|>' -}}
        {{- text_of(message.content) -}}{{- '<|END_OF_TURN_TOKEN|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}
"""


class AyaCollator(CaptionCollator):
    """Collator of Aya Vision; batches may mix image rows and text-only rows."""

    family_template = CHAT_TEMPLATE
    tiles_are_tokens = True

    def _image_text(self, size: tuple[int, int]) -> str:
        width, height = size
        tiles = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_patches"]
        image_text: str = self.processor.replace_image_token({"num_patches": tiles}, 0)
        return image_text


class LogitScale:
    """A forward hook of the head that multiplies its logits by Cohere's `logit_scale`."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        """Return the scaled logits."""
        return logits * self.scale


def prepare(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model with logits multiplied by `text_config.logit_scale`; doing it twice changes nothing.

    Cohere2ForCausalLM defines logits = head(hidden) * logit_scale, and TRL's fused head follows it, but
    AyaVisionForConditionalGeneration's own forward leaves the factor out: its loss, its sampling and its evaluation
    would disagree with training. The fused head reads the head's weight, not its output, so nothing is scaled twice.
    """
    forward = inspect.unwrap(type(model).forward)
    if "logit_scale" in forward.__code__.co_names:  # a release of transformers that multiplies by itself
        return model
    head = model.get_output_embeddings()
    if not any(isinstance(hook, LogitScale) for hook in head._forward_hooks.values()):
        head.register_forward_hook(LogitScale(model.config.text_config.logit_scale))
    return model


def image_token_count(processor: Any, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Return (patch tokens in the text, patch features that the tiles become) of a batch."""
    tokens = int((batch["input_ids"] == processor.image_token_id).sum())
    pixels = batch.get("pixel_values")  # [tiles, channels, height, width]
    return tokens, 0 if pixels is None else pixels.shape[0] * (processor.img_size // processor.patch_size) ** 2


def most_image_tokens(processor: Any) -> int:
    """Return the tokens of an image cut into as many tiles as the processor allows, with its thumbnail."""
    patches = (processor.img_size // processor.patch_size) ** 2
    return (processor.image_processor.max_patches + 1) * (patches + 1) + 3  # a mark before each tile, three around


def image_features(model: "PreTrainedModel", processor: Any, images: "Sequence[Image]") -> Tensor:
    """Return the mean of the vision tower's patch features of each image, as one tile [images, features]."""
    tower = model.model.vision_tower
    batch = processor.image_processor(list(images), crop_to_patches=False, return_tensors="pt")
    patches: Tensor = tower(batch["pixel_values"].to(tower.device, tower.dtype)).last_hidden_state
    return patches.mean(1)


def released_8b() -> "PretrainedConfig":
    """Return the configuration of aya-vision-8b."""
    from transformers import AyaVisionConfig

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 364,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {
        "model_type": "cohere2",
        "vocab_size": 256000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "logit_scale": 0.25,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    return AyaVisionConfig(vision_config=vision, text_config=text, image_token_index=255036, downsample_factor=2)


SPEC = ModelSpec(
    name="aya",
    title="Aya Vision",
    auto_class="AutoModelForImageTextToText",
    model_types=("aya_vision",),
    takes_images=True,
    parts={
        "vision": r".*vision_tower\..*",
        "projector": r".*multi_modal_projector\.[^.]+",
        "self-attention": r".*language_model\.layers\.\d+\.self_attn\.[^.]+",
        "MLP": r".*language_model\.layers\.\d+\.mlp\.[^.]+",
        "head": r"lm_head",
    },
    keep_16bit=("model.vision_tower", "model.multi_modal_projector", "lm_head"),
    attn_implementations=("eager", "sdpa", "flash"),
    chat_template=CHAT_TEMPLATE,
    collator=AyaCollator,
    released={"CohereLabs/aya-vision-8b": released_8b},
    prepare=prepare,
    most_image_tokens=most_image_tokens,
    image_token_count=image_token_count,
    image_features=image_features,
    plain_differs="transformers leaves the factor text_config.logit_scale out of this model: multiply its logits by "
    "it, or load it with inft.models.loading.load_model. Greedy captions are the same without; losses and sampling are "
    "not.",
)
