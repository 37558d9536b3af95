"""Tiny encoders and a tokenizer, new each time, for tests of evaluation."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inft.data.sample import combinations
from inft.data.scene_captions import GRAMMARS, caption
from inft.encoders.contrastive.export import EmbeddingSettings, export_sentence_transformers
from inft.encoders.demo_tokenizer import demo_tokenizer
from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM

POSITIONS = 48


def captions(split: str = "train") -> list[str]:
    """Captions in every language."""
    return [caption(attributes, language) for attributes in combinations(split) for language in GRAMMARS]


def tiny_tokenizer(directory: Path, *, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Small enough that words have several tokens."""
    demo_tokenizer(directory, captions(), vocab_size)
    return AutoTokenizer.from_pretrained(directory)


def tiny_masked_lm(vocab_size: int = 500, *, seed: int = 0, scale: float = 1.0) -> NeoBERTForMaskedLM:
    """Two layers of 32, in eval mode; a scale above 1 makes predictions differ more."""
    torch.manual_seed(seed)
    config = NeoBERTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=POSITIONS,
        initializer_range=0.02 * scale,
    )
    return NeoBERTForMaskedLM(config).eval()


def tiny_stored_encoder(directory: Path, *, seed: int = 0) -> Path:
    """As a run stores it: weights, and the tokenizer in a directory below."""
    tokenizer = tiny_tokenizer(directory / "tokenizer")
    tiny_masked_lm(len(tokenizer), seed=seed).save_pretrained(directory)
    return directory


def tiny_sentence_encoder(directory: Path, *, seed: int = 0) -> Path:
    """As inft finetune-encoder exports it, with mean pooling."""
    tokenizer = tiny_tokenizer(directory.with_name(f"{directory.name}-tokenizer"))
    model = tiny_masked_lm(len(tokenizer), seed=seed).model
    settings = EmbeddingSettings(pooling="mean", max_length=POSITIONS)
    return export_sentence_transformers(model, tokenizer, settings, directory)
