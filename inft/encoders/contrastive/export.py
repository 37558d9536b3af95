"""A fine-tuned encoder as sentence-transformers reads it: weights, tokenizer, pooling, prompts, a README.

Nothing of that package is imported: its files are a handful of small JSON documents.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from craft.pooling import PoolingStrategy
from inft.training.storage import staged
from params.encoder import EncoderParams

# Ours -> theirs. Each is the same under any padding side: both count positions of real tokens.
POOLINGS: Mapping[PoolingStrategy, str] = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "last_token": "lasttoken",
    "weighted_mean": "weightedmean_tokens",
}
LEGACY = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"
POOLING = "1_Pooling"
NORMALIZE = "2_Normalize"


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """What turns texts into the vectors that a model was trained for."""

    pooling: PoolingStrategy
    max_length: int  # tokens of a document
    query_prefix: str = ""
    document_prefix: str = ""
    query_max_length: int | None = None  # tokens; none: as documents
    normalize: bool = True

    @classmethod
    def of(cls, params: EncoderParams) -> "EmbeddingSettings":
        """Those of a contrastive run."""
        contrastive = params.contrastive
        return cls(
            pooling=contrastive.pooling,
            max_length=params.dataset.max_seq_length,
            query_prefix=contrastive.query_prefix,
            document_prefix=contrastive.document_prefix,
            query_max_length=contrastive.query_max_length,
        )


def export_sentence_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EmbeddingSettings, output: Path
) -> Path:
    """Write a directory that `SentenceTransformer(output)` loads and that gives the same vectors; returns it.

    It appears whole or not at all and replaces what is there.
    """
    with staged(output, what="the exported model", remedy="Free space there or choose another output.") as directory:
        model.save_pretrained(directory)
        add_sentence_transformers_files(directory, model, tokenizer, settings)
    return output


def add_sentence_transformers_files(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EmbeddingSettings
) -> None:
    """Put beside a stored model what sentence-transformers needs."""
    stored = copy.deepcopy(tokenizer)
    stored.padding_side = "right"  # as in training: absolute positions count from the left
    stored.model_max_length = settings.max_length
    stored.save_pretrained(directory)
    for place, content in _files(model.config.hidden_size, settings).items():
        file = directory / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = _readme(model.config.model_type, settings)
    (directory / "README.md").write_text(readme, encoding="utf-8")


def _files(size: int, settings: EmbeddingSettings) -> dict[str, Any]:
    kinds = [("", "Transformer"), (POOLING, "Pooling"), *([(NORMALIZE, "Normalize")] if settings.normalize else [])]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds)
    ]
    pooling = {f"pooling_mode_{name}": name == POOLINGS[settings.pooling] for name in LEGACY}
    files: dict[str, Any] = {
        MODULES: modules,
        PROMPTS: {
            "prompts": {"query": settings.query_prefix, "document": settings.document_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        LENGTHS: {"max_seq_length": settings.max_length, "do_lower_case": False},
        f"{POOLING}/config.json": {"word_embedding_dimension": size, **pooling, "include_prompt": True},
    }
    if settings.normalize:
        files[f"{NORMALIZE}/config.json"] = {}
    return files


def _readme(model_type: str, settings: EmbeddingSettings) -> str:
    neobert = model_type == "neobert"
    first = "import inft.models.neobert  # registers NeoBERT with transformers\n" if neobert else ""
    needs = "`pip install inft sentence-transformers`: the import tells transformers what a NeoBERT is, so that\n"
    needs += "`trust_remote_code` stays off.\n\n"
    longest = settings.query_max_length
    note = (
        f"In training, queries were cut at {longest} tokens; sentence-transformers has one limit for all texts, "
        f"{settings.max_length}.\n"
        if longest not in (None, settings.max_length)
        else ""
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# A text encoder, fine-tuned by contrast

{needs if neobert else ""}```python
{first}from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/directory")
queries = model.encode(["..."], prompt_name="query")
documents = model.encode(["..."], prompt_name="document")
similarities = model.similarity(queries, documents)
```

Pooling: {settings.pooling}. Prefix of a query: {settings.query_prefix!r}, of a document: {settings.document_prefix!r}.
Tokens: at most {settings.max_length}. {note}
The same vectors from the command line: `inft embed path/to/this/directory texts.txt -o vectors.npy --prompt query`.
"""
