"""What belongs to a run: its parameters, its log, its stored adapter, and the evaluations of that adapter."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inft.evaluation.records import EVALUATION_FILE, Evaluation, Stored, is_evaluation, read_evaluation, read_stored
from inft.training.logfiles import PREFIX, Event, last_run, run_status, split_runs
from inft.training.resume import PARAMS_FILE
from inft.training.runlog import read_events
from inft.training.storage import BEST_FILE
from inft.training.stored import RUN_BEST, StoredAdapter, read_adapter
from params import TrainParams, UserError
from params.resolve import load_params


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run left behind."""

    params: TrainParams
    log: Path  # where its log should be
    events: Sequence[Event]  # its own, after those of the runs that it went on from; empty when none were found
    best_dir: Path
    adapter: StoredAdapter | None  # None while none is stored

    @property
    def sha256(self) -> str | None:
        """Of the stored adapter's weights, by which evaluations name it."""
        return self.adapter.sha256 if self.adapter is not None else None

    @property
    def status(self) -> str:
        """How the run ended, as far as its log says."""
        return run_status(list(self.events)) if self.events else "not known: its log was not found"

    @property
    def seconds(self) -> float | None:
        """How long its processes ran, together; None without a log."""
        runs = split_runs(self.events)
        return sum(_seconds(run) for run in runs) if runs else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the runs of a report: a directory of the command line."""

    label: str
    directory: Path
    training: Training | None  # None: only an evaluation of its adapter was named
    evaluations: Sequence[Stored]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Everything that a report is made of."""

    runs: Sequence[Run]
    bases: Sequence[Stored]  # evaluations of the runs' base models, and those that were named themselves
    metric_dirs: Sequence[Path]  # where evaluations were looked for
    notes: Sequence[str]  # what was passed over and why


def gather(directories: Sequence[Path], *, metric_dir: Path | None = None) -> Gathered:
    """Read the runs and evaluations in ``directories`` and what belongs to them.

    Evaluations are looked for directly below ``metric_dir``, by default each run's own. Errors: UserError for a
    directory that is neither, one that is named twice, and damaged files.
    """
    _refuse(directories)
    labels = _labels(directories)
    trained = {path: _training(path) for path in directories if not is_evaluation(path)}
    named = [read_stored(path) for path in directories if is_evaluation(path)]
    places = _metric_dirs(trained, named, metric_dir)
    notes: list[str] = []
    found = _evaluations(places, notes)

    adapters = {training.sha256 for training in trained.values() if training.sha256 is not None}
    theirs = _read_once([*named, *(path for path, one in found.items() if one.adapter_sha256 in adapters)])
    alone = {one.directory: one for one in named if one.evaluation.adapter_sha256 not in adapters}
    runs = []
    for path in directories:
        if path in trained:
            own = [one for one in theirs if one.evaluation.adapter_sha256 == trained[path].sha256 is not None]
            runs.append(Run(label=labels[path], directory=path, training=trained[path], evaluations=own))
        elif path in alone and alone[path].evaluation.adapter is not None:
            runs.append(Run(label=labels[path], directory=path, training=None, evaluations=[alone[path]]))

    compared = {_compared(one.evaluation) for run in runs for one in run.evaluations}
    bases = [one for one in named if one.evaluation.adapter is None]
    of_runs = (path for path, one in found.items() if one.adapter is None and _compared(one) in compared)
    return Gathered(runs=runs, bases=_read_once([*bases, *of_runs]), metric_dirs=places, notes=notes)


def _compared(evaluation: Evaluation) -> tuple[str, str, str]:
    """Equal for evaluations of a base and its adapter on the same rows."""
    return evaluation.fingerprint, evaluation.model, evaluation.base_model


def _refuse(directories: Sequence[Path]) -> None:
    """UserError for what is not a run nor an evaluation, and for one that is named twice."""
    seen: dict[Path, Path] = {}
    for path in directories:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such directory. {_EXPECTED}")
        if not is_evaluation(path) and not (path / PARAMS_FILE).is_file():
            hint = f" Did you mean {path.parent}?" if (path.parent / PARAMS_FILE).is_file() else ""
            raise UserError(f"{path} is neither a run nor an evaluation.{hint} {_EXPECTED}")
        if path.resolve() in seen:
            raise UserError(f"{seen[path.resolve()]} and {path} are the same directory: drop one.")
        seen[path.resolve()] = path


_EXPECTED = (
    f"Name the output directory of `inft train` (it holds {PARAMS_FILE}), such as outputs/aya_basic, or a directory "
    f"that `inft evaluate` wrote (it holds {EVALUATION_FILE})."
)


def _labels(directories: Sequence[Path]) -> dict[Path, str]:
    """The name of each directory, with as many of its parents' as tell it from the others."""
    parts = {path: path.resolve().parts for path in directories}
    for length in range(1, max(len(one) for one in parts.values()) + 1):
        labels = {path: "/".join(one[-length:]).encode("utf-8", "replace").decode() for path, one in parts.items()}
        if max(Counter(labels.values()).values()) == 1:
            break
    return labels


def _training(directory: Path) -> Training:
    params = load_params(directory / PARAMS_FILE)
    root = _started_in(directory, params)
    log, events = _log(directory, params, root)
    best_dirs = [path for path in (directory / RUN_BEST, root / params.best_model_dir) if (path / BEST_FILE).is_file()]
    best_dir = best_dirs[0] if best_dirs else directory / RUN_BEST
    return Training(
        params=params,
        log=log,
        events=events,
        best_dir=best_dir,
        adapter=read_adapter(best_dir) if best_dirs else None,
    )


def _started_in(directory: Path, params: TrainParams) -> Path:
    """The directory in which training was started, since the paths of a run may be relative to it.

    It is what stands above ``params.output_dir`` in the run's path; the current directory where that does not fit.
    """
    output = Path(os.path.normpath(params.output_dir))
    here = directory.resolve()
    if not output.is_absolute() and here.parts[-len(output.parts) :] == output.parts:
        return Path(*here.parts[: -len(output.parts)])
    return Path.cwd()


def _log(directory: Path, params: TrainParams, root: Path) -> tuple[Path, Sequence[Event]]:
    """The log in which the run's events are, and they; where the log should be, and none, when there are none."""
    name = f"{PREFIX}{params.task}.jsonl"
    places = dict.fromkeys([root / params.basic.logs_dir / name, Path.cwd() / params.basic.logs_dir / name])
    for path in places:
        if path.is_file():
            started = [run for run in split_runs(read_events(path)) if _wrote_to(run[0], directory, params, root)]
            events = last_run(event for run in started for event in run)
            if events:
                return path, events
    return next(iter(places)), []


def _wrote_to(event: Event, directory: Path, params: TrainParams, root: Path) -> bool:
    """Whether a run's first event says that it wrote to the directory."""
    output = (event.get("params") or {}).get("output_dir")
    if not isinstance(output, str):
        return False
    return output == params.output_dir or (root / output).resolve() == directory.resolve()


def _seconds(run: Sequence[Event]) -> float:
    """How long a process ran: as it said at its end, else up to its last event."""
    for event in reversed(run):
        if event.get("event") == "run_end":
            return float(event["seconds"])
    times = [event["time"] for event in run if isinstance(event.get("time"), (int, float))]
    return max(times) - min(times) if times else 0.0


def _metric_dirs(trained: Mapping[Path, Training], named: Sequence[Stored], given: Path | None) -> list[Path]:
    """Where evaluations are looked for: where told, else where the runs keep them and beside those that are named."""
    if given is not None:
        if not given.is_dir():
            raise UserError(f"--metric-dir {given}: there is no such directory.")
        return [given]
    places = [one.directory.parent for one in named]
    for path, training in trained.items():
        own = training.params.basic.metric_dir
        places += [_shortened(_started_in(path, training.params) / own), Path(own)]
    return list({path.resolve(): path for path in reversed(places)}.values())[::-1]


def _shortened(path: Path) -> Path:
    """A path relative to the current directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _evaluations(places: Iterable[Path], notes: list[str]) -> dict[Path, Evaluation]:
    """The evaluations directly below the directories; a damaged one is passed over with a note."""
    found = {}
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if is_evaluation(path):
                try:
                    found[path] = read_evaluation(path)
                except UserError as error:
                    notes.append(f"Passed over: {error}")
    return found


def _read_once(found: Iterable[Stored | Path]) -> list[Stored]:
    """Everything in the directories, each of which counts once however it is spelled."""
    by_place = {(one if isinstance(one, Path) else one.directory).resolve(): one for one in found}
    return [read_stored(one) if isinstance(one, Path) else one for one in by_place.values()]
