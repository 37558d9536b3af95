"""Interleaved timing of named variants: shuffled inside each repetition, medians, one JSON line per measurement."""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Beside this file stands a directory with the name of a package that is measured: nothing else is imported from here.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]


def parser(doc: str, *, repetitions: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=repetitions, help="timed runs of each variant")
    options.add_argument("--out", type=Path, default=None, help="append one JSON line per measurement to this file")
    return options


def interleave(
    variants: Mapping[str, Callable[[], object]], *, repetitions: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each call of each variant, in an order shuffled anew in each repetition; one warm-up call each."""
    for call in variants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(seed)
    for _ in range(repetitions):
        for name in order.sample(list(variants), len(variants)):
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(
    title: str,
    seconds: Mapping[str, list[float]],
    *,
    ours: str,
    peer: str,
    limit: float,
    out: Path | None,
    unit: str = "ms",
    images: int = 0,
) -> None:
    """Print medians and the ratio ours / peer beside its limit, and append each measurement to `out`.

    limit is the largest acceptable ratio of the two medians (times, so smaller is better). With `images` a call, their
    rate is shown too.
    """
    ratio = statistics.median(seconds[ours]) / statistics.median(seconds[peer])
    table = Table(title=title)
    for heading in ("variant", f"median {unit}", *(("images/s",) if images else ()), "ratio to the peer", "limit"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, values in seconds.items():
        mine = name == ours
        table.add_row(
            name + (" (peer)" if name == peer else ""),
            f"{statistics.median(values) * 1e3:.1f}",
            *((f"{images / statistics.median(values):.0f}",) if images else ()),
            f"{statistics.median(values) / statistics.median(seconds[peer]):.3f}",
            f"{limit:.2f}" if mine else "",
        )
    Console().print(table)
    if out is not None:
        with out.open("a", encoding="utf-8") as lines:
            for name, values in seconds.items():
                record: dict[str, Any] = {"bench": title, "variant": name, "seconds": values, "machine": machine()}
                lines.write(json.dumps(record) + "\n")
    if ratio > limit:
        raise SystemExit(f"{title}: ratio {ratio:.3f} is above its limit {limit}")


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's allocator holds during a call beyond what it held before, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> str:
    """The processor and the Python that a figure belongs to."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} x{len(names)}" if names else model
    return f"{model}, Python {platform.python_version()}"
