"""The console that commands print on."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200  # columns when the output is a file or a pipe: nothing is folded that a reader may search for


def make_console() -> "Console":
    """A console on stdout, as wide as the terminal; of several processes, only the first one's says anything."""
    from rich.console import Console

    from inft.training.processes import is_main

    return Console(quiet=not is_main(), width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def stderr_console() -> "Console":
    """Where progress goes when stdout is for a program to read."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
