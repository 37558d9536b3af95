"""What is checked of preferences and reference models before a trainer works on them for an hour."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from craft.hooks import unwrap


def check_preferences(*datasets: Any) -> None:
    """ValueError naming the first row that is no preference: equal or empty answers, or an empty prompt.

    Data sets in TRL's form, with ``chosen`` and ``rejected`` (and ``prompt``, unless it is part of both) as texts or
    messages; streams, and rows that were tokenised, are taken as they are.
    """
    for dataset in datasets:
        for name, rows in dataset.items() if isinstance(dataset, dict) else [("", dataset)]:
            columns = getattr(rows, "column_names", None)
            if isinstance(columns, list) and {"chosen", "rejected"} <= set(columns) and hasattr(rows, "__len__"):
                _check_rows(rows, [c for c in ("prompt", "chosen", "rejected") if c in columns], name=name)


def check_reference(model: Any, ref_model: Any) -> None:
    """ValueError when a reference model scores another vocabulary than the model that is trained."""
    if not isinstance(model, nn.Module) or not isinstance(ref_model, nn.Module):
        return
    own, other = (unwrap(m).get_output_embeddings().weight.shape[0] for m in (model, ref_model))
    if own != other:
        raise ValueError(
            f"ref_model has a vocabulary of {other:,} tokens and the model one of {own:,}: their log-probabilities are "
            "not of the same tokens. Leave ref_model out (the initial model is then the reference), or pass one with "
            "the same tokenizer."
        )


def _check_rows(rows: Any, columns: Sequence[str], *, name: str) -> None:
    where = f" of {name!r}" if name else ""
    for number, row in enumerate(rows.select_columns(list(columns))):
        texts = {column: _text(row[column]) for column in columns}
        for column, text in texts.items():
            if not text:
                raise ValueError(f"row {number}{where}: {column} is empty. Fill it in, or drop the row.")
        if row["chosen"] == row["rejected"] or texts["chosen"] == texts["rejected"]:
            raise ValueError(
                f"row {number}{where}: chosen and rejected are equal ({texts['chosen'][:60]!r}), so that nothing is "
                "preferred. Drop the row."
            )


def _text(value: Any) -> str:
    """The text of a string, or of the contents of messages, without surrounding white space."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return _text(value.get("content", value.get("text")) or "")
    if isinstance(value, Sequence):
        return " ".join(filter(None, map(_text, value)))
    return ""
