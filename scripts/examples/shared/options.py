"""The options of an example: flags of a script, defaults in a notebook."""

import argparse
import builtins
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can turn in every example."""

    model: str  # "": the embedded one; smollm2, a directory or a hub id
    data: str  # "": the drawn scenes; a file, see shared/texts.py
    source: str  # language codes
    target: str
    steps: int  # optimizer steps
    batch_size: int  # rows of a micro-batch
    learning_rate: float  # peak
    seed: int
    output_dir: Path


DEFAULTS = {"model": "", "data": "", "source": "en", "target": "si", "seed": 42}


def options(description: str | None, *, name: str, **defaults: Any) -> Options:
    """Return the flags of the command line; in a notebook, whose kernel has flags of its own, the defaults.

    ``defaults`` are the example's own, `steps` at least: in a notebook, this is the place to change what is trained.
    """
    own = {"batch_size": 16, "learning_rate": 3e-3, "output_dir": Path("outputs/examples") / name}
    values = {**DEFAULTS, **own, **defaults}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="smollm2, a directory or a hub id (default: the embedded tiny model)")
    add("--data", help="JSONL or TSV of texts with translations, see shared/texts.py (default: drawn scenes)")
    add("--source", metavar="CODE", help="language of the texts (default: %(default)s)")
    add("--target", metavar="CODE", help="language of their translations (default: %(default)s)")
    add("--steps", type=_count, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=_several, help="rows of a micro-batch, 2 or more (default: %(default)s)")
    add("--learning-rate", type=_rate, help="peak; released models want less, such as 2e-4 (default: %(default)s)")
    add("--seed", type=int, help="of data order and new weights (default: %(default)s)")
    add("--output-dir", type=Path, help="for figures.json and the plots (default: %(default)s)")
    parser.set_defaults(**values)
    found = Options(**vars(parser.parse_args([] if in_notebook() else None)))
    found.output_dir.mkdir(parents=True, exist_ok=True)
    return found


def in_notebook() -> bool:
    """Whether IPython runs this."""
    return hasattr(builtins, "__IPYTHON__")


def _several(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError("a row alone in its micro-batch has nothing to be told from: give 2 or more")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
