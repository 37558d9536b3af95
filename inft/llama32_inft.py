"""Fine-tune Llama 3.2 Vision: ``python inft/llama32_inft.py --training-mode basic``.

A face of ``inft train llama32``, which takes the same flags.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# The names that the guide gives, found where they live now.
NAMES = {"LlamaCollator": "inft.models.llama32", "_build_sft_args": "inft.aya_inft"}


def main() -> None:
    """Run ``inft train llama32`` with the flags of this command line."""
    from inft.__main__ import main as inft

    inft(["train", "llama32", *sys.argv[1:]])


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
