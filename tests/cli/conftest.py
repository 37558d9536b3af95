from collections.abc import Callable
from typing import NamedTuple

import pytest

from inft.__main__ import main


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def inft(capsys) -> Callable[..., Outcome]:
    """Run a command line in this process: inft("train", "aya") -> status, stdout, stderr."""

    def run(*args: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(args)
        captured = capsys.readouterr()
        return Outcome(ended.value.code or 0, captured.out, captured.err)

    return run
