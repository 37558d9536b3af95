"""The tasks of GLUE (Wang et al. 2018) and rows in their format: one or two texts and a label."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inft.encoders.evaluation.tables import SUFFIXES, TableRow, read_table
from params.errors import UserError

HUB = "nyu-mll/glue"
TRAIN = "train"
VALIDATION = ("validation", "dev")  # names of a local validation file, tried in this order
SHOWN = 5  # labels in a message


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a task's rows look like and how it is scored."""

    name: str
    columns: tuple[str, ...] = ("sentence1", "sentence2")  # one or two texts
    label: str = "label"  # column
    metrics: tuple[str, ...] = ("accuracy",)  # names of metrics.METRICS; the score is their mean
    regression: bool = False
    classes: tuple[str, ...] = ()  # names in the order of their numbers, which F1 depends on; none: as the rows have
    validation: tuple[str, ...] = ("validation",)  # splits; the best epoch is chosen by the first


_CORRELATIONS = ("pearson", "spearman")
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(name="cola", columns=("sentence",), metrics=("matthews",), classes=("unacceptable", "acceptable")),
        Task(name="sst2", columns=("sentence",), classes=("negative", "positive")),
        Task(name="mrpc", metrics=("accuracy", "f1"), classes=("not_equivalent", "equivalent")),
        Task(
            name="qqp",
            columns=("question1", "question2"),
            metrics=("accuracy", "f1"),
            classes=("not_duplicate", "duplicate"),
        ),
        Task(name="stsb", metrics=_CORRELATIONS, regression=True),
        Task(
            name="mnli",
            columns=("premise", "hypothesis"),
            classes=("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        Task(name="qnli", columns=("question", "sentence"), classes=("entailment", "not_entailment")),
        Task(name="rte", classes=("entailment", "not_entailment")),
        Task(name="wnli", classes=("not_entailment", "entailment")),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: its texts, and a class number or a value."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The rows of a task by split."""

    task: Task
    train: Sequence[Example]
    validation: Mapping[str, Sequence[Example]]
    classes: tuple[str, ...]  # in the order of their numbers; empty in a regression


def named_task(name: str) -> Task:
    """Return a task of GLUE; UserError for another name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"GLUE has no task {name!r}; it has {', '.join(TASKS)}.{hint} For rows of your own give --data."
        )
    return TASKS[name]


def own_task(name: str, columns: tuple[str, ...], label: str, *, regression: bool) -> Task:
    """Return the task of rows of one's own: accuracy and macro-F1, or the two correlations."""
    metrics = _CORRELATIONS if regression else ("accuracy", "macro_f1")
    return Task(name=name, columns=columns, label=label, metrics=metrics, regression=regression)


def read_task(task: Task, directory: Path | None) -> TaskData:
    """Read a task from a directory with a train and a validation file, or without one from the hub.

    Errors: UserError for a missing file or column, a row without a text or label, a class that is not trained on, and
    labels of one class only.
    """
    names = (TRAIN, *task.validation)
    tables = _hub(task) if directory is None else {name: _file(directory, name, task) for name in names}
    if task.regression:
        _check_values(tables[TRAIN], task)
    classes = None if task.regression else _classes(tables[TRAIN], task)
    found = {name: [_example(row, task, classes) for row in tables[name]] for name in names}
    validation = {name: found[name] for name in task.validation}
    names_of_classes = task.classes or tuple(classes or ())
    return TaskData(task=task, train=found[TRAIN], validation=validation, classes=names_of_classes)


def local_task(task: Task, directory: Path) -> Task:
    """Return the task with the validation splits that a directory has: of MNLI's two the one that is there."""
    present = [name for name in task.validation if _find(directory, (name, _other_name(name)))]
    return replace(task, validation=tuple(present or task.validation))


def _hub(task: Task) -> dict[str, list[TableRow]]:
    from inft.data.hub import hub_tables

    tables = hub_tables(HUB, task.name)
    return {
        name: [
            TableRow(values=values, where=f"{HUB} {task.name} {name} row {number}")
            for number, values in enumerate(tables[name])
        ]
        for name in (TRAIN, *task.validation)
    }


def _file(directory: Path, split: str, task: Task) -> list[TableRow]:
    names = (split, _other_name(split)) if split != TRAIN else (split,)
    path = _find(directory, names)
    if path is None:
        wanted = " or ".join(f"{name}{suffix}" for name in names for suffix in SUFFIXES)
        there = ", ".join(sorted(entry.name for entry in directory.iterdir())) if directory.is_dir() else "not there"
        raise UserError(f"{directory}: needs a file {wanted} (found: {there or 'nothing'}).")
    return read_table(path, (*task.columns, task.label))


def _find(directory: Path, names: Iterable[str]) -> Path | None:
    candidates = (directory / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _other_name(split: str) -> str:
    """How GLUE's own files call a split that the hub calls validation."""
    return split.replace(VALIDATION[0], VALIDATION[1])


def _example(row: TableRow, task: Task, classes: Mapping[str, int] | None) -> Example:
    texts = tuple(row.values[name] for name in task.columns)
    for name, text in zip(task.columns, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row.where}: the column {name!r} has no text ({text!r}). Mend or drop the row.")
    word = _label_text(row, task)
    if classes is None:
        return Example(texts=texts, label=_number(word, row, task))
    if word not in classes:
        if task.classes:
            raise UserError(
                f"{row.where}: {task.label} is {word!r}. {_told_classes(task)} For labels of your own add --columns."
            )
        known = ", ".join(list(classes)[:SHOWN])
        raise UserError(f"{row.where}: no row that is trained on has the label {word!r}. They have {known}.")
    return Example(texts=texts, label=classes[word])


def _label_text(row: TableRow, task: Task) -> str:
    value = row.values[task.label]
    word = "" if value is None else str(value).strip()
    if not word or (word == "-1" and task.name in TASKS):  # how GLUE marks the labels that it keeps to itself
        raise UserError(f"{row.where}: has no label ({task.label} is {value!r}). Mend or drop the row.")
    return word


def _classes(rows: Sequence[TableRow], task: Task) -> dict[str, int]:
    """What labels may stand in the rows, with their class's number: of a task of GLUE its names and numbers."""
    words = {_label_text(row, task) for row in rows}
    if len(words) < 2:
        raise UserError(f"{task.name}: all {len(rows)} rows that are trained on have the label {words.pop()!r}.")
    fractions = [word for word in words if _is_fraction(word)]
    if fractions:
        raise UserError(
            f"{task.name}: {task.label} has numbers such as {fractions[0]}. If they are values to be predicted, and "
            "no classes, add --regression."
        )
    if task.classes:
        return _named_classes(rows, task)
    whole = all(word.removeprefix("-").isdecimal() for word in words)
    ordered = sorted(words, key=int) if whole else sorted(words)
    return {word: number for number, word in enumerate(ordered)}


def _named_classes(rows: Sequence[TableRow], task: Task) -> dict[str, int]:
    known = {name: number for number, name in enumerate(task.classes)}
    known |= {str(number): number for number in known.values()}
    there = {_example(row, task, known).label for row in rows}
    if len(there) < len(task.classes):
        raise UserError(
            f"{task.name}: the rows that are trained on have {len(there)} of its {len(task.classes)} classes. "
            f"{_told_classes(task)}"
        )
    return known


def _told_classes(task: Task) -> str:
    numbers = ", ".join(map(str, range(len(task.classes))))
    return f"The classes of {task.name} are {', '.join(task.classes)}, or {numbers} in this order."


def _check_values(rows: Sequence[TableRow], task: Task) -> None:
    """UserError where all values are one: there is nothing to learn."""
    values = {_number(_label_text(row, task), row, task) for row in rows}
    if len(values) < 2:
        raise UserError(f"{task.name}: all {len(rows)} rows that are trained on have the value {values.pop()}.")


def _number(word: str, row: TableRow, task: Task) -> float:
    try:
        value = float(word)
    except ValueError as error:
        raise UserError(f"{row.where}: {task.label} is {word!r}, not a number.") from error
    if not math.isfinite(value):
        raise UserError(f"{row.where}: {task.label} is {word!r}, not a number to predict.")
    return value


def _is_fraction(word: str) -> bool:
    try:
        value = float(word)
    except ValueError:
        return False
    return math.isfinite(value) and not value.is_integer()
