"""The three tiny models: real classes and processors, released token names and chat templates, small numbers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from inft.models import aya, llama32, text
from inft.models.collate import CaptionCollator
from tiny_models.tokenizers import COHERE_SPECIAL, LLAMA_SPECIAL, dress

IMAGE_SIZE = 64  # pixels a tile
PATCH_SIZE = 8  # pixels; 14-pixel patches of 28-pixel images show too little to tell the figures apart
WIDTH = 128  # of the language models
VISION_WIDTH = 96
LOGIT_SCALE = 0.25  # of the tiny Aya, as of the released one

# Text turns framed as Llama 3 frames them.
TEXT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def unmarked(template: str) -> str:
    """The family's template without the tags that mark the answer: what a released processor carries."""
    return re.sub(r"\{%-\s*(end)?generation\s*-%\}", "", template)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one tiny model is made."""

    takes_images: bool
    collator: type[CaptionCollator]
    processor: Callable[[Tokenizer], ProcessorMixin | PreTrainedTokenizerFast]
    model: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    logit_scale: float = 1.0  # Cohere's definition multiplies the head's scores by it


def llama_processor(bpe: Tokenizer) -> MllamaProcessor:
    """Build the processor of the tiny Llama 3.2 Vision: one tile an image."""
    images = MllamaImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, max_image_tiles=1)
    return MllamaProcessor(images, _llama_tokenizer(bpe), chat_template=unmarked(llama32.CHAT_TEMPLATE))


def aya_processor(bpe: Tokenizer) -> AyaVisionProcessor:
    """Build the processor of the tiny Aya Vision: wide and tall images are cut into tiles."""
    tokenizer = dress(
        bpe,
        COHERE_SPECIAL,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        unk_token="<UNK>",
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=3,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return AyaVisionProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        img_size=IMAGE_SIZE,
        downsample_factor=2,
        chat_template=unmarked(aya.CHAT_TEMPLATE),
    )


def text_tokenizer(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Build the tokenizer of the tiny Llama."""
    tokenizer = _llama_tokenizer(bpe)
    tokenizer.chat_template = TEXT_TEMPLATE
    return tokenizer


def _llama_tokenizer(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    return dress(
        bpe,
        LLAMA_SPECIAL,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )


def llama_model(tokenizer: PreTrainedTokenizerFast) -> MllamaForConditionalGeneration:
    """Build an untrained Mllama whose cross-attention gates are open: at 0 the image would have no say."""
    vision = MllamaVisionConfig(
        hidden_size=VISION_WIDTH,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=2 * VISION_WIDTH,
        vision_output_dim=2 * VISION_WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[1],
        initializer_range=VISION_WIDTH**-0.5,
    )
    text = MllamaTextConfig(
        **_language_config(tokenizer),
        vocab_size=tokenizer.convert_tokens_to_ids("<|image|>"),
        num_hidden_layers=5,
        cross_attention_layers=[1, 3],
    )
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    )
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn_attn_gate"):
            torch.nn.init.constant_(layer.cross_attn_attn_gate, 0.5)
            torch.nn.init.constant_(layer.cross_attn_mlp_gate, 0.5)
    return _generates(model, tokenizer)


def aya_model(tokenizer: PreTrainedTokenizerFast) -> AyaVisionForConditionalGeneration:
    """Build an untrained Aya Vision: SigLIP and Cohere2 with a logit scale as released."""
    vision = SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * VISION_WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = Cohere2Config(
        **_language_config(tokenizer), vocab_size=len(tokenizer), num_hidden_layers=4, logit_scale=LOGIT_SCALE
    )
    config = AyaVisionConfig(
        vision_config=vision,
        text_config=text,
        downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    model = AyaVisionForConditionalGeneration(config)
    with torch.no_grad():  # the scaled logits start as large as those of a head without scale
        model.get_input_embeddings().weight.div_(LOGIT_SCALE)
    return _generates(model, tokenizer)


def text_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama."""
    config = LlamaConfig(**_language_config(tokenizer), vocab_size=len(tokenizer), num_hidden_layers=4)
    return _generates(LlamaForCausalLM(config), tokenizer)


def _language_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # Rows of norm 1: the frozen rows of words that the base never saw stay far enough apart for LoRA to pick them.
        "initializer_range": WIDTH**-0.5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _generates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


FAMILIES = {
    "llama32": Family(takes_images=True, collator=llama32.LlamaCollator, processor=llama_processor, model=llama_model),
    "aya": Family(
        takes_images=True,
        collator=aya.AyaCollator,
        processor=aya_processor,
        model=aya_model,
        logit_scale=LOGIT_SCALE,
    ),
    "text": Family(takes_images=False, collator=text.TextCollator, processor=text_tokenizer, model=text_model),
}
