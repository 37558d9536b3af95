"""The configuration of a NeoBERT."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from params.errors import UserError


@strict
class NeoBERTConfig(PreTrainedConfig):
    """Sizes and variants of a NeoBERT (Le Breton et al. 2025); the defaults are the 12-layer model's.

    Errors: UserError for sizes that do not fit together.
    """

    model_type = "neobert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # before SwiGLU's two thirds
    max_position_embeddings: int = 512  # tokens of the longest document
    hidden_act: Literal["swiglu", "gelu"] = "swiglu"
    rope: bool = True  # false: learned positions
    rope_theta: float | int = 10_000.0
    rms_norm: bool = True  # false: layer norm
    norm_eps: float | int = 1e-5
    dropout_prob: float | int = 0.0  # after attention and feed-forward
    classifier_dropout: float | int = 0.1  # of the head for sequences
    initializer_range: float | int = 0.02  # weights are drawn from U(-range, range)
    tie_word_embeddings: bool = True  # the head's weights are the embedding's
    decoder_bias: bool = False  # of the masked-LM head
    attn_backend: Literal["sdpa", "flash_attn_varlen"] = "sdpa"  # how, not what: it is not stored
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        size, heads = self.hidden_size, self.num_attention_heads
        if size % heads:
            raise UserError(f"hidden_size {size} does not divide into num_attention_heads {heads}.")
        if self.rope and size // heads % 2:
            raise UserError(
                f"hidden_size {size} / num_attention_heads {heads} is {size // heads}, which must be even for rotary "
                "pairs. Change one of the two, or set rope: false."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}.")

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored: a model is written on one machine and read on another, which picks its own backend."""
        stored = super().to_dict()
        stored.pop("attn_backend", None)
        return stored

    @property
    def head_size(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers: two thirds for SwiGLU, rounded up to a multiple of 8."""
        if self.hidden_act == "gelu":
            return self.intermediate_size
        return -(-(2 * self.intermediate_size // 3) // 8) * 8
