"""What the client's benchmarks share: ratios of medians with their limits, as a table, as JSON lines, and as an end."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import machine

Seconds = Mapping[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median time of one variant over that of another."""

    ours: str  # names of variants
    peer: str
    limit: float | None = None  # the largest acceptable ratio; None: informative

    def of(self, seconds: Seconds) -> float:
        """The ratio of the medians."""
        return statistics.median(seconds[self.ours]) / statistics.median(seconds[self.peer])


def finish(title: str, seconds: Seconds, ratios: Sequence[Ratio], *, out: Path | None) -> None:
    """Print the table, append JSON lines to `out`, and end with 1 where a limit is missed."""
    table = Table(title=f"{title}; {machine()}, one thread")
    for heading in ("variant", "ms", "quartiles", "against", "ratio", "limit"):
        table.add_column(heading, justify="left" if heading in ("variant", "against") else "right")
    of = {ratio.ours: ratio for ratio in ratios}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        ratio = of.get(name)
        compared = ("", "", "")
        if ratio is not None:
            limit = "" if ratio.limit is None else f"{ratio.limit:.2f}"
            compared = (ratio.peer, f"{ratio.of(seconds):.3f}", limit)
        table.add_row(name, f"{middle * 1e3:.1f}", f"{low * 1e3:.1f} to {high * 1e3:.1f}", *compared)
    Console().print(table)
    if out is not None:
        with out.open("a", encoding="utf-8") as lines:
            for name, values in seconds.items():
                lines.write(
                    json.dumps({"bench": title, "variant": name, "seconds": values, "machine": machine()}) + "\n"
                )
    missed = [ratio for ratio in ratios if ratio.limit is not None and ratio.of(seconds) > ratio.limit]
    if missed:
        raise SystemExit(
            "\n".join(f"{each.ours}: {each.of(seconds):.3f} × {each.peer}, limit {each.limit}" for each in missed)
        )
