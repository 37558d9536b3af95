"""The `inft` command: ``inft …`` or ``python -m inft …``."""

import logging
import os
import sys
from collections.abc import Sequence

TELEMETRY_SWITCHES = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line (sys.argv's without `args`) and exit with its status."""
    if not any(name in os.environ for name in TELEMETRY_SWITCHES):  # read by huggingface_hub when it is imported
        os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    quiet_libraries()
    from inft.cli.app import app

    app(args, prog_name="inft")


def quiet_libraries() -> None:
    """Keep what libraries say to their developers off a user's terminal; errors and warnings of ours stay."""
    from inft.training.quiet import TALKATIVE

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # bars drawn over each other in a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
