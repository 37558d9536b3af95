"""Stored encoders: what a run or an export wrote, a published NeoBERT, or any other encoder of transformers."""

import warnings
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

# One of these tells what a tokenizer is; the vocabularies are those of tokenizers before tokenizer.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
TOKENIZER = "tokenizer"  # directory of the tokenizer beside the weights, where it is not among them


def find_model(place: str) -> str:
    """Return the newest stored model of a run's directory; any other place is itself.

    Errors: UserError for a run that has stored none yet.
    """
    from inft.encoders.checkpoints import MODELS, STATES, newest_model

    run = Path(place).expanduser()
    if (run / "config.json").is_file() or not any((run / kind).is_dir() for kind in (MODELS, STATES)):
        return place
    newest = newest_model(run)
    if newest is None:
        raise UserError(f"{place} is a run that has stored no model yet: {run / MODELS} is empty. Train it further.")
    return str(newest)


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a stored encoder or a hub id; UserError when it cannot be loaded."""
    below = Path(place) / TOKENIZER
    source = str(below) if below.is_dir() else place
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"{place} has no tokenizer: neither it nor {below} holds {' or '.join(TOKENIZER_FILES)}. Copy the "
            "tokenizer's files there, or give a directory in which a run stored its model."
        )
    tokenizer = _load(AutoTokenizer.from_pretrained, source, "tokenizer", place)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {place} must be a fast one with a padding token.")
    return tokenizer


def load_masked_lm(place: str) -> NeoBERTForMaskedLM:
    """The NeoBERT with its head, in float32 and in eval mode.

    Errors: UserError for another architecture, and for an encoder whose head was not stored with it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing head is an error below
        model = load_published(place)
    stored, _ = _load(PreTrainedConfig.get_config_dict, place, "configuration", place)
    named = any("LM" in name for name in stored.get("architectures") or ())  # NeoBERTForMaskedLM, NeoBERTLMHead
    if model.config.tie_word_embeddings and not (named and stored.get("tie_word_embeddings")):
        raise UserError(
            f"{place} holds an encoder without a masked-LM head, as contrastive fine-tuning stores it: what it would "
            "predict by its embedding alone means nothing. Give a pretrained model."
        )
    return model.float().eval()


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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
