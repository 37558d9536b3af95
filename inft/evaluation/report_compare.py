"""Which evaluations can be compared row by row, and what each is called and coloured everywhere in a report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from inft.evaluation.records import Prediction, Stored
from inft.evaluation.report_runs import Gathered, Run

# Told apart by all common kinds of colour blindness (Okabe and Ito 2008); black and yellow left out for their contrast.
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BASE_COLOURS = ("#8b929a", "#c3c8ce", "#5d646c", "#a9b4a2")
PLAIN = "zero-shot"


@dataclass(frozen=True, kw_only=True)
class System:
    """A model with a way of prompting it, evaluated on some rows: a bar of one colour."""

    label: str
    colour: str
    stored: Stored
    run: Run | None  # None: a base model

    @property
    def base(self) -> tuple[str, str]:
        """Family and name of the base model."""
        return self.stored.evaluation.model, self.stored.evaluation.base_model

    @property
    def finished(self) -> bool:
        """Whether it is scored."""
        return bool(self.stored.scores)

    @property
    def predictions(self) -> Mapping[str, Prediction]:
        """Row -> what was generated."""
        return {prediction.row: prediction for prediction in self.stored.predictions}

    @property
    def progress(self) -> str:
        """How far an unfinished evaluation is: "unfinished, 12 of 40 rows"."""
        return f"unfinished, {len(self.predictions):,} of {self.stored.evaluation.rows:,} rows"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Evaluations of the same rows, bases first."""

    title: str  # "sample, split test"
    rows: int
    left_out: int  # rows without a reference
    systems: Sequence[System]

    @property
    def scored(self) -> Sequence[System]:
        """The systems whose evaluation is finished."""
        return [system for system in self.systems if system.finished]

    @property
    def languages(self) -> Sequence[str]:
        """Codes of the languages that have rows."""
        return self.systems[0].stored.evaluation.languages

    @property
    def names(self) -> Mapping[str, str]:
        """Code -> name of the languages."""
        return self.systems[0].stored.evaluation.language_names

    @property
    def has_base(self) -> bool:
        """Whether there is a base to compare with."""
        return any(system.run is None for system in self.systems)


def colours_of(runs: Sequence[Run]) -> Mapping[str, str]:
    """Label -> colour of each run."""
    return {run.label: RUN_COLOURS[number % len(RUN_COLOURS)] for number, run in enumerate(runs)}


def comparisons(gathered: Gathered) -> list[Comparison]:
    """The evaluations by their rows, those of the first run first."""
    colours = colours_of(gathered.runs)
    groups: dict[str, list[System]] = {}
    for run in gathered.runs:
        for stored in run.evaluations:
            system = System(label=run.label, colour=colours[run.label], stored=stored, run=run)
            groups.setdefault(stored.evaluation.fingerprint, []).append(system)
    for stored in gathered.bases:
        system = System(label="base", colour=BASE_COLOURS[0], stored=stored, run=None)
        groups.setdefault(stored.evaluation.fingerprint, []).append(system)
    return [_comparison(systems) for systems in groups.values()]


def _comparison(systems: Sequence[System]) -> Comparison:
    bases = [system for system in systems if system.run is None]
    bases.sort(key=lambda one: (one.base, one.stored.evaluation.setting != PLAIN, one.stored.evaluation.setting))
    bases = [replace(one, colour=BASE_COLOURS[number % len(BASE_COLOURS)]) for number, one in enumerate(bases)]
    runs = _recoloured([one for one in systems if one.run is not None])
    record = systems[0].stored.evaluation
    return Comparison(
        title=f"{record.data}, split {record.split}",
        rows=record.rows,
        left_out=record.without_reference,
        systems=_told_apart([*bases, *runs]),
    )


def _recoloured(systems: Sequence[System]) -> list[System]:
    """A second evaluation of a run in a colour that no run of the comparison has, while there is one."""
    free = [colour for colour in RUN_COLOURS if colour not in {system.colour for system in systems}]
    seen: set[str] = set()
    found = []
    for system in systems:
        again = system.colour in seen and len(free) > 0
        found.append(replace(system, colour=free.pop(0)) if again else system)
        seen.add(found[-1].colour)
    return found


def _told_apart(systems: Sequence[System]) -> list[System]:
    """Labels with what sets a system apart: its family among bases of several, its prompting, at last its directory."""
    families = {system.base for system in systems if system.run is None}
    found = []
    for system in systems:
        record = system.stored.evaluation
        family = f" {record.model}" if system.run is None and len(families) > 1 else ""
        setting = f", {record.setting}" if record.setting != PLAIN else ""
        found.append(replace(system, label=f"{system.label}{family}{setting}"))
    alike = Counter(system.label for system in found)
    return [
        replace(system, label=f"{system.label} ({system.stored.name})") if alike[system.label] > 1 else system
        for system in found
    ]
