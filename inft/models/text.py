"""Text models: any causal language model, with or without a chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from inft.models.collate import CaptionCollator
from inft.models.spec import ModelSpec
from inft.sample import Sample

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class TextCollator(CaptionCollator):
    """Collator of causal language models: answers are found by rendering the tokenizer's own template twice.

    A template's text with the answer must begin with its generation prompt; everything from there to the end-of-turn
    token is supervised. Images of samples are left out: the prompt's text is all that the model sees.
    """

    parts = False

    def _load(self, sample: Sample) -> None:
        return None

    def _encode(self, rows: Sequence[tuple[Sample, Any]]) -> dict[str, Any]:
        splits = [self._split(*row) for row in rows]
        batch = self._tokenise([before + answer + after for before, answer, after in splits], "right")
        offsets = batch.pop("offset_mapping")  # [rows, tokens, 2]: first character and the one after the last
        begin, end = (
            torch.tensor([[len(before)] for before, _, _ in splits]),
            torch.tensor([[len(before) + len(answer)] for before, answer, _ in splits]),
        )
        # A token that overlaps the answer is supervised; padding is zero characters wide.
        batch["assistant_masks"] = (offsets[..., 0] < end) & (offsets[..., 1] > begin)
        return batch

    def _encode_prompts(
        self, rows: Sequence[tuple[Sample, Any]], shots: Sequence[Sequence[tuple[Sample, Any]]] = ()
    ) -> dict[str, Any]:
        befores = shots or [()] * len(rows)
        texts = [self._prompt_text(*row, before=before) for row, before in zip(rows, befores, strict=True)]
        batch = self._tokenise(texts, "left")
        del batch["offset_mapping"]
        return batch

    def _tokenise(self, texts: list[str], side: str) -> dict[str, Any]:
        # The template writes every special token itself.
        return dict(
            self.tokenizer(
                texts,
                add_special_tokens=False,
                padding=True,
                padding_side=side,
                return_offsets_mapping=True,
                return_token_type_ids=False,
                return_tensors="pt",
            )
        )


def prepare(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model as it is."""
    return model


def smollm2_135m() -> "PretrainedConfig":
    """Return the configuration of SmolLM2-135M-Instruct."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


SPEC = ModelSpec(
    name="text",
    title="text models",
    auto_class="AutoModelForCausalLM",
    model_types=(),
    takes_images=False,
    parts={
        "self-attention": r".*\.(self_attn|self_attention|attention|attn)\.(.*\.)?[^.]+",
        "MLP": r".*\.(mlp|feed_forward|ffn|block_sparse_moe)\.(.*\.)?[^.]+",
        "head": r"lm_head|embed_out|output",
    },
    keep_16bit=("lm_head", "embed_out"),
    attn_implementations=("eager", "sdpa", "flash"),
    chat_template=None,
    collator=TextCollator,
    released={"HuggingFaceTB/SmolLM2-135M-Instruct": smollm2_135m, "smollm2": smollm2_135m},
    prepare=prepare,
    most_image_tokens=lambda processor: 0,
    image_token_count=None,
    image_features=None,
    plain_differs="",
)
