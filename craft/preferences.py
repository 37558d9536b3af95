"""What is checked of preferences and reference models before a trainer works on them for an hour."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from craft.hooks import unwrap

SHOWN = 60  # characters of an answer in a message


def given_datasets(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The data sets among the arguments of a trainer, by position or by name."""
    names = list(inspect.signature(cls).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get("train_dataset"), given.get("eval_dataset")]


def check_preferences(*datasets: Any) -> None:
    """ValueError naming the first row that is no preference: equal or empty answers, or an empty prompt.

    Data sets in TRL's form, with ``chosen`` and ``rejected`` (and ``prompt``, unless it is part of both) as texts or
    messages; streams, and rows that were tokenised, are taken as they are.
    """
    for rows, where in _tables(datasets, {"chosen", "rejected"}):
        for number, row in enumerate(_read(rows, ("prompt", "chosen", "rejected"))):
            _refuse_empty(row, f"row {number}{where}")
            if _plain(row["chosen"]) == _plain(row["rejected"]):
                shown = str(_plain(row["chosen"]))[:SHOWN]
                raise ValueError(
                    f"row {number}{where}: chosen and rejected are equal ({shown!r}), so that nothing is preferred. "
                    "Drop the row."
                )


def check_labelled(*datasets: Any) -> None:
    """ValueError naming the first row of ``prompt`` and ``completion`` (KTO) in which one of them is empty."""
    for rows, where in _tables(datasets, {"prompt", "completion"}):
        for number, row in enumerate(_read(rows, ("prompt", "completion"))):
            _refuse_empty(row, f"row {number}{where}")


def check_prompts(*datasets: Any) -> None:
    """ValueError naming the first row with an empty ``prompt``."""
    for rows, where in _tables(datasets, {"prompt"}):
        for number, row in enumerate(_read(rows, ("prompt",))):
            _refuse_empty(row, f"row {number}{where}")


def check_labels(dataset: Any) -> None:
    """ValueError naming the first tokenised row of which no answer is left, as ORPO's ``max_length`` cuts them."""
    for rows, where in _tables([dataset], {"chosen_labels", "rejected_labels"}):
        for number, row in enumerate(_read(rows, ("chosen_labels", "rejected_labels"))):
            for side in ("chosen", "rejected"):
                if all(label == -100 for label in row[f"{side}_labels"]):
                    raise ValueError(
                        f"row {number}{where}: nothing of its {side} answer is left within max_length, and its loss "
                        "would be 0 / 0. Raise max_length, or drop the row."
                    )


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


def _tables(datasets: Sequence[Any], needed: set[str]) -> Iterator[tuple[Any, str]]:
    """The data sets in memory or on disk that have some columns, with the words that name them."""
    for dataset in datasets:
        for name, rows in dataset.items() if isinstance(dataset, dict) else [("", dataset)]:
            columns = getattr(rows, "column_names", None)
            if isinstance(columns, list) and needed <= set(columns) and hasattr(rows, "__len__"):
                yield rows, f" of {name!r}" if name else ""


def _read(rows: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of each row; the prompt is left out where the row has an image, which may be all it asks about."""
    asked = [name for name in columns if name in rows.column_names]
    if {"image", "images"} & set(rows.column_names):
        asked = [name for name in asked if name != "prompt"]
    yield from rows.select_columns(asked)


def _refuse_empty(row: Mapping[str, Any], where: str) -> None:
    for column, value in row.items():
        if not _plain(value):
            raise ValueError(f"{where}: {column} is empty. Fill it in, or drop the row.")


def _plain(value: Any) -> Any:
    """A text without surrounding white space; of messages what is said in them, with nothing for what is empty."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        said = {key: _plain(part) for key, part in value.items() if key not in ("role", "type")}
        kind = value.get("type")
        placed = {"type": kind} if kind and kind != "text" else {}  # an image is said without a text
        return {**{key: part for key, part in said.items() if part}, **placed}
    if isinstance(value, Sequence):
        return [part for part in map(_plain, value) if part]
    return value
