"""Fine-tune Aya Vision: ``python inft/aya_inft.py --training-mode basic``.

A face of ``inft train aya``, which takes the same flags.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import SFTConfig

    from params import TrainParams

# The names that the guide gives, found where they live now.
NAMES = {"AyaCollator": "inft.models.aya", "list_linear_modules": "inft.models.modules"}


def main() -> None:
    """Run ``inft train aya`` with the flags of this command line."""
    from inft.__main__ import main as inft

    inft(["train", "aya", *sys.argv[1:]])


def _build_sft_args(params: "TrainParams", *, rows: int) -> "SFTConfig":
    """The SFTConfig of a run on that many training rows, evaluated on the held-out ones."""
    from inft.training.plan import count_steps
    from inft.training.sft import sft_config

    return sft_config(params, output_dir=Path(params.output_dir), steps=count_steps(params, rows), evaluate=True)


def __getattr__(name: str) -> Any:
    """The guide's names, imported when they are asked for: a command line must not wait for torch."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(NAMES[name]), name)


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it first: inft/params.py would hide the package params.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    main()
