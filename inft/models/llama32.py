"""Llama 3.2 Vision (Mllama): a language model whose cross-attention layers look at up to four tiles of an image."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inft.models.collate import CaptionCollator
from inft.models.spec import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel

# Renders as the released template does for conversations without tools, with the answer marked. Text-only
# conversations open with a system turn that holds the knowledge cut-off and a date; those with an image do not.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}{{- content -}}{%- else -%}
        {%- for part in content -%}
            {{- '<|image|>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set seen = namespace(image=false) -%}
{%- for message in messages -%}
    {%- if message.content is not string -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}{%- set seen.image = true -%}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- set system = messages[0].role == 'system' -%}
{{- bos_token -}}
{%- if seen.image and system -%}
    {{- raise_exception('Llama 3.2 Vision takes no system turn beside an image.') -}}
{%- elif not seen.image -%}
    {%- set today = date_string if date_string is defined else strftime_now('%d %b %Y') -%}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' -}}
    {{- 'Today Date: ' + today + '\\n\\n' -}}
    {%- if system -%}{{- text_of(messages[0].content) | trim -}}{%- endif -%}
    {{- '<|eot_id|>' -}}
{%- endif -%}
{%- for message in (messages[1:] if system else messages) -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- text_of(message.content) -}}{{- '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- text_of(message.content) -}}{{- '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


class LlamaCollator(CaptionCollator):
    """Collator of Llama 3.2 Vision; batches may mix image rows and text-only rows (see `skip_rows_without_image`)."""

    family_template = CHAT_TEMPLATE

    def _image_text(self, size: tuple[int, int]) -> str:
        image_token: str = self.processor.image_token
        return image_token


def skip_rows_without_image(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return a cross-attention layer's output with its input put back in rows that have no image.

    Alone, a text-only row skips these layers. Beside an image row, transformers lets it attend to the padding
    where its image would be, so its logits would depend on its neighbours in the batch.
    """
    attends = kwargs["full_text_row_masked_out_mask"]  # [rows, 1, tokens, 1], 0 where a token sees no tile; or None
    if attends is None:
        return output
    has_image = attends[:, 0].amax(1, keepdim=True) > 0  # [rows, 1, 1]
    # Of a model spread over several GPUs, a layer may be called with the tensors of the one before.
    return torch.where(has_image.to(output.device), output, args[0].to(output.device))


def prepare(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model with `skip_rows_without_image` on each cross-attention layer; twice is as once."""
    for layer in model.model.language_model.layers:
        hooks = layer._forward_hooks.values()
        if hasattr(layer, "cross_attn") and skip_rows_without_image not in hooks:
            layer.register_forward_hook(skip_rows_without_image, with_kwargs=True)
    return model


def image_token_count(processor: Any, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Return (image tokens in the text, images in the tensors) of a batch: one token an image."""
    tokens = int((batch["input_ids"] == processor.image_token_id).sum())
    ratios = batch.get("aspect_ratio_ids")  # [rows, images], 0 where there is no image
    return tokens, 0 if ratios is None else int((ratios > 0).sum())


def image_features(model: "PreTrainedModel", processor: Any, images: "Sequence[Image]") -> Tensor:
    """Return the mean of the vision tower's patch features over each image's own tiles [images, features]."""
    tower = model.model.vision_model
    batch = processor.image_processor([[image] for image in images], return_tensors="pt")
    inputs = {name: batch[name].to(tower.device) for name in ("aspect_ratio_ids", "aspect_ratio_mask")}
    pixels = batch["pixel_values"].to(tower.device, tower.dtype)
    patches = tower(pixel_values=pixels, **inputs).last_hidden_state  # [images, 1, tiles, patches, features]
    tiles = inputs["aspect_ratio_mask"].to(patches.dtype)  # [images, 1, tiles], 0 where a tile is padding
    return (patches.mean(3) * tiles[..., None]).sum((1, 2)) / tiles.sum((1, 2))[:, None]


def released_11b() -> "PretrainedConfig":
    """Return the configuration of Llama-3.2-11B-Vision-Instruct."""
    from transformers import MllamaConfig

    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "vision_output_dim": 7680,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
    }
    text = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": 128004,
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=128256)


SPEC = ModelSpec(
    name="llama32",
    title="Llama 3.2 Vision",
    auto_class="AutoModelForImageTextToText",
    model_types=("mllama",),
    takes_images=True,
    parts={
        "vision": r".*vision_model\..*",
        "projector": r".*multi_modal_projector",
        "self-attention": r".*language_model\.layers\.\d+\.self_attn\.[^.]+",
        "cross-attention": r".*language_model\.layers\.\d+\.cross_attn\.[^.]+",
        "MLP": r".*language_model\.layers\.\d+\.mlp\.[^.]+",
        "head": r"lm_head",
    },
    keep_16bit=("model.vision_model", "model.multi_modal_projector", "lm_head"),
    attn_implementations=("eager", "sdpa"),
    chat_template=CHAT_TEMPLATE,
    collator=LlamaCollator,
    released={"meta-llama/Llama-3.2-11B-Vision-Instruct": released_11b},
    prepare=prepare,
    most_image_tokens=lambda processor: 1,
    image_token_count=image_token_count,
    image_features=image_features,
    plain_differs="in a batch that mixes rows with and without an image, transformers lets the text-only ones attend "
    "to padding; inft.models.loading.load_model loads it without that. Other batches are the same.",
)
