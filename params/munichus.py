"""Which rows are read: languages, caps, filters, the held-out share and the prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from params.bounds import Count, CountOrZero, PartialShare, Share

Column = Literal["image", "title", "content", "caption", "language", "prompt", "chosen", "rejected"]

LANGUAGE_NAMES: Mapping[str, str] = {
    "ar": "Arabic",
    "en": "English",
    "fr": "French",
    "hi": "Hindi",
    "id": "Indonesian",
    "ja": "Japanese",
    "si": "Sinhala",
    "ur": "Urdu",
    "yue": "Cantonese",
    "zh": "Chinese",
}


@dataclass(frozen=True, kw_only=True)
class MUNIChusLoadConfig:
    """Rows of MUNIChus (arXiv 2603.10613) or of any captions data set with its columns."""

    dataset_id: str = "tharindu/MUNIChus"  # hub id of the munichus source
    data: str | None = None  # a source (munichus, sample, hub:<id>) or a path to jsonl, folder, parquet, saved tables
    languages: tuple[str, ...] = tuple(LANGUAGE_NAMES)  # codes of the rows that are read; "all": all that have a name
    cjk_tokens: tuple[str, ...] = ("ja", "zh", "yue")  # languages whose words jieba or MeCab finds, for metrics
    language_names: Mapping[str, str] = field(default_factory=lambda: dict(LANGUAGE_NAMES))  # as the prompt says them
    split: str = "train"  # of the source
    batch_size: Count = 1  # of the DataLoader that build_processed_dataset makes
    num_workers: CountOrZero = 4  # DataLoader processes; 0 loads in the main process
    remove_empty: bool = True  # drop rows without a caption (False: they are errors)
    max_rows_per_lang: Count | None = None  # rows of each language at most, for smoke tests
    seed: CountOrZero = 42  # of the shuffle and the held-out split
    eval_fraction: PartialShare = 0.05  # share of the titles held out when the source has no validation split; 0: none
    max_eval_rows: Count | None = 512  # held-out rows that are scored at each evaluation
    max_bad_fraction: Share = 0.01  # share of unreadable rows above which a run does not start
    context: Literal["content", "title", "none"] = "content"  # the column that the prompt quotes
    max_context_chars: CountOrZero = 1200  # news text is cut to this many characters
    instruction: str = "Write a caption for this image in {language}."  # {language} is replaced by the name
    columns: Mapping[Column, str] = field(default_factory=dict)  # our name -> theirs
    default_language: str = "en"  # of rows without a language column
