"""Fine-tune Llama 3.2 Vision: ``python inft/llama32_inft.py --training-mode basic``.

A face of ``inft train llama32``, which takes the same flags.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run ``inft train llama32`` with the flags of this command line."""
    from inft.__main__ import main as inft

    inft(["train", "llama32", *sys.argv[1:]])


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it first: inft/params.py would hide the package params.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    main()
