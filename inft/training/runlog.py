"""The JSON-lines log of a run: one event a line, flushed; its schema stands here and nowhere else."""

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from params.errors import UserError

SCHEMA_VERSION = 1

COMMON = frozenset({"schema", "event", "time", "run"})  # time: seconds since 1970; run: id of one process's run

# event -> the keys it always has besides COMMON; an event may have more. An eval event with generated captions has
# captions (name in METRICS -> value), caption_rows and caption_examples (of language, reference, generated).
EVENTS: Mapping[str, frozenset[str]] = {
    "run_start": frozenset({"task", "params", "versions", "hardware", "data", "resumed_from_step"}),
    "guard": frozenset({"name", "ok", "detail"}),
    "log": frozenset({"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"}),
    # languages: code -> loss, or reward where answers are rewarded (grpo, ppo), which have no loss
    "eval": frozenset({"step", "epoch", "loss", "tokens", "languages", "seconds"}),
    "checkpoint": frozenset({"step", "path"}),
    "best": frozenset({"step", "metric", "value", "path"}),  # metric: eval_loss, eval_reward, …; null: the last step
    "error": frozenset({"kind", "message"}),
    # best_metric: the value of the best event's metric
    "run_end": frozenset({"status", "step", "best_step", "best_metric", "seconds", "peak_rss_bytes", "peak_gpu_bytes"}),
}


class JsonlLogger:
    """Appends events to a file; each is on disk (flushed) before the call returns.

    ``path`` None discards every event: a dry run leaves no trace. Only what the caller passes is written: no
    environment, no command line, so that no credential can end up here. Numbers that JSON has no word for are
    written as the strings "nan", "inf" and "-inf", which ``float()`` reads back. Errors: UserError when the file
    cannot be written.
    """

    def __init__(self, path: str | Path | None, *, setting: str = "basic.logs_dir") -> None:
        self.setting = setting  # what names the directory, for messages
        self.path = None if path is None else Path(path)
        self.run = uuid.uuid4().hex[:8]  # tells runs apart that write to one file at the same time
        if self.path is None:
            self._file = None
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            broken_tail = _ends_inside_a_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        if broken_tail:  # a killed run left half an event: keep ours on a line of its own
            self._file.write("\n")

    def event(self, event: str, **fields: Any) -> None:
        """Write one event; its name and keys must be those of EVENTS."""
        missing = EVENTS[event] - fields.keys()
        assert not missing, f"event {event!r} lacks {sorted(missing)}"
        if self._file is None:
            return
        record = {"schema": SCHEMA_VERSION, "event": event, "time": time.time(), "run": self.run, **fields}
        line = json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None  # what it buffers would fail again at every later event
            with suppress(OSError):
                file.close()
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"the log {self.path} cannot be written: {error.strerror}. "
            f"Free space there or choose another {self.setting}."
        )

    def close(self) -> None:
        """Close the file; further events are an error."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "JsonlLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def errors_logged(log: JsonlLogger) -> Iterator[None]:
    """Write what ends a run to its log before it goes on its way."""
    try:
        yield
    except BaseException as error:
        with suppress(UserError):  # a log that cannot be written must not hide the error
            log.event("error", kind=type(error).__name__, message=str(error))
        raise


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log, oldest first; lines that a killed run left unfinished are passed over."""
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _jsonable(value: Any) -> Any:
    """``value`` with non-finite floats as strings, tuples as lists and paths as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def __getattr__(name: str) -> Any:
    """TrainerLoggingCallback is found here too, without making a reader of logs import transformers."""
    if name == "TrainerLoggingCallback":
        from inft.training.callbacks import TrainerLoggingCallback

        return TrainerLoggingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
