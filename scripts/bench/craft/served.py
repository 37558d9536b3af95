"""A process in another environment that answers one JSON line per JSON line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def serve(answers: Mapping[str, Callable[..., Answer]]) -> None:
    """Answer requests {"do": name, ...} on stdin until it ends; anything else that is printed goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("do")](**request)), file=replies, flush=True)


class Peer:
    """One of the scripts beside this file, run by the Python of its own environment on one thread."""

    def __init__(self, python: str, script: str, directory: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, do: str, **request: Any) -> Answer:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended; run it by hand to see why")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
