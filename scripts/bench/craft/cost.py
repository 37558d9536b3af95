"""What CRAFT costs: each part of it against the same step without it, and GradCache against other libraries'.

    python scripts/bench/craft/cost.py [--parts self_align queue pcgrad methods gradcache] [--markdown]
        [--peer-python PYTHON] [--published-python PYTHON]

Everything runs on one thread and in one interleaved run, after the checks that both sides of each ratio compute the
same. The other libraries run in environments of their own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 sentence-transformers
    python -m venv published && published/bin/pip install torch==2.13.0 transformers
    published/bin/pip install --no-deps contrastive-ft==0.4.3
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from compared import Compared, Fact, Ratio
from gradcache_steps import gradcache, published
from method_steps import methods
from pair_model import hand_over, new_encoder, new_head
from rich.console import Console
from rich.table import Table
from served import Peer
from trainer_steps import pcgrad, queue, self_align

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import interleave, machine, parser

PARTS = {"self_align": self_align, "queue": queue, "pcgrad": pcgrad, "methods": methods}

Seconds = Mapping[str, list[float]]


def main() -> None:
    """Check, time, print; the exit code is 1 when a limit is missed."""
    options = parser(__doc__, repetitions=15)
    options.add_argument("--parts", nargs="+", default=[*PARTS, "gradcache"], choices=[*PARTS, "gradcache"])
    options.add_argument("--peer-python", help="Python of an environment with sentence-transformers")
    options.add_argument("--published-python", help="Python of an environment with contrastive-ft")
    options.add_argument("--markdown", action="store_true", help="print the rows of a Markdown table as well")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = Compared()
        for part in chosen.parts:
            if part in PARTS:
                found.add(PARTS[part](directory))
            else:
                found.add(cached(stack, directory, chosen.peer_python, chosen.published_python))
        seconds = interleave(found.variants, repetitions=chosen.repetitions)
    show(found, seconds)
    if chosen.markdown:
        print("\n".join(markdown(found, seconds)))
    if chosen.out is not None:
        with chosen.out.open("a", encoding="utf-8") as lines:
            lines.writelines(f"{json.dumps(record)}\n" for record in records(found, seconds))
    if missed := [*misses(found, seconds)]:
        raise SystemExit("\n".join(missed))


def cached(stack: ExitStack, directory: Path, python: str | None, published_python: str | None) -> Compared:
    """The parts about GradCache, with the libraries whose environments were named."""
    hand_over(directory, new_encoder(), new_head())  # the peers read it when they start
    peer = None
    if python is not None:
        peer = stack.enter_context(Peer(python, "peer_sentence_transformers.py", directory))
    found = gradcache(directory, peer)
    if published_python is not None:
        found.add(published(stack.enter_context(Peer(published_python, "peer_published.py", directory))))
    return found


def ratio_of(ratio: Ratio, seconds: Seconds) -> float:
    return statistics.median(seconds[ratio.ours]) / statistics.median(seconds[ratio.peer])


def show(found: Compared, seconds: Seconds) -> None:
    """Print the ratios with their limits, then the facts."""
    table = Table(title=f"What CRAFT costs; {machine()}, one thread")
    for heading in ("what", "ms", "peer ms", "ratio", "limit"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows(found, seconds):
        table.add_row(*row)
    Console().print(table)


def rows(found: Compared, seconds: Seconds) -> Iterator[tuple[str, str, str, str, str]]:
    """What is compared, both medians in ms, their ratio, its limit; facts have a value alone."""
    for ratio in found.ratios:
        times = [f"{statistics.median(seconds[name]) * 1e3:,.0f}" for name in (ratio.ours, ratio.peer)]
        yield ratio.what, *times, f"{ratio_of(ratio, seconds):.3f}", limit_of(ratio)
    compared = {name for ratio in found.ratios for name in (ratio.ours, ratio.peer)}
    for name in [name for name in seconds if name not in compared]:
        yield name, f"{statistics.median(seconds[name]) * 1e3:,.0f}", "", "", ""
    for fact in found.facts:
        yield fact.what, "", "", fact.value if isinstance(fact.value, str) else f"{fact.value:.3g}", limit_of(fact)


def limit_of(measured: Ratio | Fact) -> str:
    return "" if measured.limit is None else f"{measured.limit:g}"


def markdown(found: Compared, seconds: Seconds) -> Iterator[str]:
    """The same as rows of a Markdown table."""
    yield "| what | ms | peer ms | ratio or value | limit |"
    yield "|---|---|---|---|---|"
    for row in rows(found, seconds):
        yield f"| {' | '.join(row)} |"


def records(found: Compared, seconds: Seconds) -> Iterator[dict[str, object]]:
    """One record per variant and per fact."""
    for name, values in seconds.items():
        yield {"bench": "craft cost", "variant": name, "seconds": values, "machine": machine()}
    for fact in found.facts:
        yield {"bench": "craft cost", "fact": fact.what, "value": fact.value, "machine": machine()}


def misses(found: Compared, seconds: Seconds) -> Iterator[str]:
    """A line for each limit that is missed."""
    measured = [(r.what, ratio_of(r, seconds), r.limit) for r in found.ratios]
    measured += [(fact.what, fact.value, fact.limit) for fact in found.facts if isinstance(fact.value, float)]
    for what, value, limit in measured:
        if limit is not None and value > limit:
            yield f"{what}: {value:.3g} is above its limit {limit:g}"


if __name__ == "__main__":
    main()
