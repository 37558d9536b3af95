"""A tokenizer of a few words, encoders of a few thousand weights, and rows of pairs on disk, for contrastive tests."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from inft.models.neobert import NeoBERTConfig, NeoBERTModel
from params.encoder import ContrastiveParams, DatasetParams, EncoderParams, EncoderTrainerParams

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey", "gold", "beige")
THINGS = ("cat", "dog", "car", "tree", "house", "boat", "bird", "horse", "lamp", "chair")
OTHER = ("a", "the", "where", "is", "here", "stands", "of", "query", ":", "passage", "very", "old")
LONGEST = 48


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *COLOURS, *THINGS, *OTHER]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=LONGEST,
    )  # fmt: skip


def vocabulary() -> int:
    return len(tokenizer())


def neobert(dropout: float = 0.0, seed: int = 0, **options) -> NeoBERTModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = NeoBERTConfig(
        vocab_size=vocabulary(), max_position_embeddings=LONGEST, dropout_prob=dropout, initializer_range=0.2,
        **{**sizes, **options},
    )  # fmt: skip
    return NeoBERTModel(config).train()


def bert(dropout: float = 0.0, seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LONGEST, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).train()


def colour_rows(count: int = 100, negatives: int = 2, first: int = 0) -> list[dict]:
    """Rows that can be learnt: where is the red cat → a red cat stands here, not another thing of that colour."""
    rows = []
    for number in range(first, first + count):
        colour, thing = COLOURS[number % 10], THINGS[number // 10 % 10]
        wrong = [THINGS[(number // 10 + k) % 10] for k in range(1, negatives + 1)]
        rows.append(
            {
                "query": f"where is the {colour} {thing}",
                "pos": [f"a {colour} {thing} stands here", f"here is the very old {colour} {thing}"],
                "neg": [f"a {colour} {other} stands here" for other in wrong],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_params(output: Path, path: Path | None = None, **sections) -> EncoderParams:
    """Parameters of a small contrastive run; keyword arguments are dictionaries by section."""
    params = EncoderParams(
        task="contrastive",
        dataset=DatasetParams(path=None if path is None else str(path), max_seq_length=LONGEST),
        trainer=EncoderTrainerParams(
            output_dir=str(output / "run"), logs_dir=str(output / "logs"), per_device_train_batch_size=8,
            mixed_precision="no",
        ),
        contrastive=ContrastiveParams(),
    )  # fmt: skip
    for section, values in sections.items():
        changed = replace(getattr(params, section), **values) if isinstance(values, dict) else values
        params = replace(params, **{section: changed})
    return params
