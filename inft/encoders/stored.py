"""Stored encoders: what a run or an export wrote, a published NeoBERT, or any other encoder of transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTForSequenceClassification
from inft.models.neobert_import import load_published
from params.errors import UserError

TOKENIZER = "tokenizer"  # directory of the tokenizer beside the weights, where it is not among them


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a stored encoder or a hub id; UserError when it cannot be loaded."""
    below = Path(place) / TOKENIZER
    source = str(below) if below.is_dir() else place
    tokenizer = _load(AutoTokenizer.from_pretrained, source, "tokenizer", place)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {place} must be a fast one with a padding token.")
    return tokenizer


def load_masked_lm(place: str) -> NeoBERTForMaskedLM:
    """The NeoBERT with its head, in float32 and in eval mode; UserError for another architecture."""
    return load_published(place).float().eval()


def load_classifier(place: str, *, num_labels: int, regression: bool) -> PreTrainedModel:
    """The encoder in float32 under a classification head that is drawn anew; UserError when it cannot be loaded."""
    problem = "regression" if regression else "single_label_classification"
    if _model_type(place) == NeoBERTConfig.model_type:
        return _neobert_classifier(place, num_labels=num_labels, problem_type=problem)
    with _quiet():  # that a head is new is no news
        return _load(
            AutoModelForSequenceClassification.from_pretrained,
            place,
            "classifier",
            place,
            num_labels=num_labels,
            problem_type=problem,
            ignore_mismatched_sizes=True,  # a head of another task has other classes
            use_safetensors=True,
        ).float()


def longest_text(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Tokens of the longest text that tokenizer and model can take, special tokens included."""
    from inft.encoders.contrastive.encode import longest_text as positions

    return min(tokenizer.model_max_length, positions(config) or 2**31)


def _neobert_classifier(place: str, **head: Any) -> NeoBERTForSequenceClassification:
    from inft.encoders.contrastive.load import load_encoder

    encoder = load_encoder(place)
    config = NeoBERTConfig(**{**encoder.config.to_dict(), **head})
    model = NeoBERTForSequenceClassification(config)
    model.model = encoder
    return model.float()


def _model_type(place: str) -> str | None:
    stored, _ = _load(PreTrainedConfig.get_config_dict, place, "configuration", place)
    kind: str | None = stored.get("model_type")
    return kind


def _load(load: Callable[..., Any], source: str, what: str, place: str, **how: Any) -> Any:
    try:
        return load(source, trust_remote_code=False, **how)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{place}: the {what} cannot be loaded: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing below an error."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
