"""The data sets of a run: the bundle a user makes, and both sets as one for a single DataLoader."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from craft.collate import PER_TOKEN, CRAFTCollator
from craft.fields import did_you_mean
from craft.mixing import BATCH_TYPE, CRAFTMixedDataLoader
from craft.schedule import Kind

__all__ = [
    "CRAFTCollator",
    "CRAFTDatasetBundle",
    "CRAFTMixedDataLoader",
    "MixedCollator",
    "MixedRows",
    "make_craft_datasets",
    "may_pack",
]

# A data set with these columns alone has one text in a row; other names may be positives (craft_contrastive_keys).
_OF_ONE_TEXT = {"text", "messages", "prompt", "completion", *PER_TOKEN}
STRATEGIES = ("paired_dataset", "self_align")
Collator = Callable[[list[Any]], Any]


@dataclass
class CRAFTDatasetBundle:
    """The data sets of a run; in self_align the SFT rows are the contrastive ones too."""

    sft_dataset: Any
    contrastive_dataset: Any | None
    strategy: str


def make_craft_datasets(
    primary_dataset: Any,
    contrastive_dataset: Any | None = None,
    strategy: str = "paired_dataset",
) -> CRAFTDatasetBundle:
    """Return the bundle of a strategy.

    Errors: ValueError for an unknown strategy, for pairs that are missing or not wanted, and for pairs that show
    their columns and have those of one text only.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy={strategy!r} must be 'paired_dataset' or 'self_align'{did_you_mean(strategy, STRATEGIES)}."
        )
    if strategy == "paired_dataset" and contrastive_dataset is None:
        raise ValueError(
            "strategy='paired_dataset' needs a contrastive_dataset with columns for both texts of a pair (input_ids "
            "and input_ids_tgt). Pass one, or use strategy='self_align'."
        )
    if strategy == "self_align" and contrastive_dataset is not None:
        raise ValueError(
            "strategy='self_align' takes its pairs from the SFT rows: leave contrastive_dataset out, or use "
            "strategy='paired_dataset'."
        )
    columns = getattr(contrastive_dataset, "column_names", None)
    if isinstance(columns, list) and set(columns) <= _OF_ONE_TEXT:
        raise ValueError(missing_positives(columns))
    return CRAFTDatasetBundle(primary_dataset, contrastive_dataset, strategy)


def missing_positives(columns: Iterable[str], *, text_field: str = "text") -> str:
    """Return the message for pairs without a positive."""
    return (
        f"the contrastive data set has no column of positives: found {', '.join(columns) or 'no column'}. Each row "
        f"needs the second text of its pair as input_ids_tgt (with attention_mask_tgt), or as {text_field}_tgt, "
        "messages_tgt, positive, or prompt_tgt and completion_tgt for craft.pairs.tokenize_pairs. Rename the column, "
        "name it in craft_contrastive_keys, or use strategy='self_align'."
    )


class MixedRows(Dataset[tuple[Kind, Any]]):
    """Both data sets as one: rows of the SFT one, then of the contrastive one, each with its kind."""

    def __init__(self, sft: Any, contrastive: Any) -> None:
        self.sft, self.contrastive = sft, contrastive
        self._sft_rows = len(sft)

    def __len__(self) -> int:
        return self._sft_rows + len(self.contrastive)

    def __getitem__(self, index: int) -> tuple[Kind, Any]:
        if index < self._sft_rows:
            return "sft", self.sft[index]
        return "craft", self.contrastive[index - self._sft_rows]

    def __getitems__(self, indices: list[int]) -> list[tuple[Kind, Any]]:
        """Rows of a batch, read at once where the data set can."""
        if indices[0] < self._sft_rows:
            return [("sft", row) for row in _rows(self.sft, indices)]
        rows = _rows(self.contrastive, [index - self._sft_rows for index in indices])
        return [("craft", row) for row in rows]


def _rows(dataset: Any, indices: list[int]) -> list[Any]:
    at_once = getattr(dataset, "__getitems__", None)
    return at_once(indices) if at_once else [dataset[index] for index in indices]


class MixedCollator:
    """Collates a batch of MixedRows with the collator of its kind and tags it ``craft_batch_type``: sft or craft."""

    def __init__(self, sft_collator: Collator, contrastive_collator: Collator) -> None:
        self.collators: Mapping[Kind, Collator] = {"sft": sft_collator, "craft": contrastive_collator}

    def __call__(self, rows: Sequence[tuple[Kind, Any]]) -> dict[str, Any]:
        """Return the tagged batch of rows that are all of one kind."""
        kind = rows[0][0]
        assert all(other == kind for other, _ in rows), "TaskBatchSampler never mixes kinds"
        return {**self.collators[kind]([row for _, row in rows]), BATCH_TYPE: kind}


def may_pack(collator: Any) -> bool:
    """Whether a collator looks as if it joined several texts into one row, which leaves no pairs to contrast."""
    name = type(collator).__name__.lower()
    packing = any(word in name for word in ("flatten", "packing", "paddingfree"))
    flags = ("return_position_ids", "padding_free", "packing")
    return packing or any(getattr(collator, flag, False) is True for flag in flags) or hasattr(collator, "separator_id")
