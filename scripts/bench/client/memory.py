"""Memory of many clients' adapters on one base against a process for each: measured with a few, reckoned for all.

    python scripts/bench/client/memory.py [--clients 32] [--processes 4] [--hidden 512] [--layers 8]

The base is a Llama of random weights (--hidden 0 takes the embedded one). Each client has the guide's adapter and has
taken a step, so that its optimizer has its state. One process with an engine holds all clients, measured as they are.
The bare loops are as many processes as --processes says, alive together; what N of them hold is a + b·N, fitted to the
measured ones, and the figure for --clients of them is this line at that N and marked as such. Memory is PSS of
/proc/PID/smaps_rollup, which divides a shared page among those that share it.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from measured import machine
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import parser

ROWS, TOKENS = 4, 64
VOCABULARY = 1161  # of the embedded tokenizer
MIB = 2**20


def main() -> None:
    """Measure, print the table, append one JSON line to --out."""
    options = parser(__doc__, repetitions=1)
    options.add_argument("--clients", type=int, default=32, help="clients on one base")
    options.add_argument("--processes", type=int, default=4, help="processes of bare loops that are really started")
    options.add_argument("--hidden", type=int, default=512, help="hidden size of the base; 0: the embedded model")
    options.add_argument("--layers", type=int, default=8, help="layers of the base")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = make_base(Path(folder) / "base", chosen.hidden, chosen.layers) if chosen.hidden else "embedded/text"
        engine = measure(in_engine, [(source, str(Path(folder) / "state"), 1), chosen.clients - 1])
        loops = measure_loops(source, chosen.processes)
        weights = sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) if chosen.hidden else 0
    show(engine, loops, clients=chosen.clients, weights=weights, out=chosen.out)


def make_base(directory: Path, hidden: int, layers: int) -> str:
    """Save a Llama of random weights with the embedded tokenizer; return its directory."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from inft.models.loading import EMBEDDED

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(EMBEDDED / "text", local_files_only=True).save_pretrained(directory)
    return str(directory)


def in_engine(connection: Connection, source: str, state_dir: str, count: int) -> None:
    """Hold so many clients in one engine, and more when told."""
    import torch
    from plain_loop import CONFIG, rows_of

    from inft.client import ServiceClient

    torch.set_num_threads(1)
    with ServiceClient({"state_dir": state_dir, "device": "cpu", "max_resident_clients": 1024}) as service:
        while count:
            for _ in range(count):
                client = service.create_training_client(CONFIG | {"model_ref": source})
                client.forward_backward(rows_of(ROWS, TOKENS)).result()
                client.optim_step().result()
            connection.send(pss())
            count = connection.recv()


def bare_loop(connection: Connection, source: str) -> None:
    """Hold one bare loop, and measure when told."""
    import torch
    from plain_loop import EMBEDDED, PlainLoop, rows_of

    torch.set_num_threads(1)
    loop = PlainLoop(str(EMBEDDED / "text") if source == "embedded/text" else source)
    loop.step(rows_of(ROWS, TOKENS))
    connection.send(0)
    while connection.recv():
        connection.send(pss())


def measure(target: Callable[..., None], asked: list[object]) -> list[int]:
    """The bytes of one engine's process after its first clients, and after the rest."""
    first, *others = asked
    process, connection = start(target, *first)  # type: ignore[misc]
    found = [connection.recv()]
    for count in [*others, 0]:
        connection.send(count)
        if count:
            found.append(connection.recv())
    process.join()
    return found


def measure_loops(source: str, most: int) -> list[int]:
    """The bytes that 1, 2, … `most` processes hold together."""
    found: list[int] = []
    with ExitStack() as stack:
        connections: list[Connection] = []
        for _ in range(most):
            process, connection = start(bare_loop, source)
            stack.callback(process.join)
            stack.callback(connection.send, None)
            connection.recv()
            connections.append(connection)
            for each in connections:
                each.send(True)
            found.append(sum(each.recv() for each in connections))
    return found


def start(target: Callable[..., None], *args: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Begin a process that shares nothing with this one but the files that both read."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *args))
    process.start()
    there.close()
    return process, here


def pss() -> int:
    """This process's own pages and its part of those it shares, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system's /proc/self/smaps_rollup has no Pss")


def fitted(found: list[int], count: int) -> float:
    """Least squares of found[N - 1] = a + b·N, at N = count."""
    if len(found) == 1:
        return float(found[0] * count)
    numbers = range(1, len(found) + 1)
    middle, mean = sum(numbers) / len(found), sum(found) / len(found)
    slope = sum((number - middle) * (value - mean) for number, value in zip(numbers, found, strict=True)) / sum(
        (number - middle) ** 2 for number in numbers
    )
    return mean + slope * (count - middle)


def show(engine: list[int], loops: list[int], *, clients: int, weights: int, out: Path | None) -> None:
    """Print what was measured and what was reckoned, each marked."""
    table = Table(title=f"{clients} clients on one base against {clients} processes; {machine()}")
    for heading in ("what", "MiB", "how"):
        table.add_column(heading, justify="right" if heading == "MiB" else "left")
    reckoned = fitted(loops, clients)
    rows: list[tuple[str, float, str]] = [("weights of the base, on disk", weights, "measured")] if weights else []
    rows += [
        ("one engine with 1 client", engine[0], "measured"),
        (f"one engine with {clients} clients", engine[-1], "measured"),
        ("each further client", (engine[-1] - engine[0]) / max(clients - 1, 1), "their difference"),
        *((f"{number} bare loops, a process each", value, "measured") for number, value in enumerate(loops, start=1)),
        (f"{clients} bare loops, a process each", reckoned, f"line through 1 to {len(loops)}"),
    ]
    for what, value, how in rows:
        table.add_row(what, f"{value / MIB:,.1f}", how)
    table.add_row(f"{clients} processes / one engine", f"{reckoned / engine[-1]:.1f} ×", "reckoned / measured")
    Console().print(table)
    if out is not None:
        record = {"bench": "client memory", "clients": clients, "engine": engine, "loops": loops, "machine": machine()}
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record | {"reckoned": reckoned}) + "\n")


if __name__ == "__main__":
    main()
