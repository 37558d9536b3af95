"""The end of an example: its figures as a table on the screen and as JSON beside the plots."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from inft.training.storage import write_text
from shared.options import Options
from shared.texts import Translation

BEGAN = time.perf_counter()  # when the example imported this, after the heavy libraries


def table(columns: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Print figures by name: a line for each, a column for each state or run; a missing one is left empty."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    width = max(len(title), *map(len, names)) + 2
    cells = {column: [f"{values[n]:.4g}" if n in values else "" for n in names] for column, values in columns.items()}
    widths = [max(len(column), *map(len, values)) + 3 for column, values in cells.items()]
    print("\n" + title.ljust(width) + "".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    for row, name in enumerate(names):
        print(name.ljust(width) + "".join(v[row].rjust(w) for v, w in zip(cells.values(), widths, strict=True)))


def show_texts(translations: Sequence[Translation], written: Mapping[str, Sequence[str]], *, count: int = 3) -> None:
    """Print the first texts, their references and what was written for them."""
    for number, each in enumerate(translations[:count]):
        lines = {"text": each.text, "reference": each.translation, **{k: v[number] for k, v in written.items()}}
        print("\n" + "\n".join(f"  {name + ':':<11}{line}" for name, line in lines.items()))


def finish(options: Options, figures: Mapping[str, object]) -> None:
    """Write the figures and the options to figures.json and say where they are."""
    asked = {name: str(value) if name == "output_dir" else value for name, value in asdict(options).items()}
    seconds = round(time.perf_counter() - BEGAN, 1)
    path = options.output_dir / "figures.json"
    text = json.dumps({**figures, "seconds": seconds, "options": asked}, ensure_ascii=False, indent=2)
    write_text(path, text + "\n")
    print(f"\n{seconds:.0f} s; figures: {path}")
