"""Fine-tune Aya Vision: ``python inft/aya_inft.py --training-mode basic``.

A face of ``inft train aya``, which takes the same flags.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run ``inft train aya`` with the flags of this command line."""
    from inft.__main__ import main as inft

    inft(["train", "aya", *sys.argv[1:]])


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it first: inft/params.py would hide the package params.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    main()
