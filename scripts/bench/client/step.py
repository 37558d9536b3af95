"""A training step through the client, in process and over HTTP, against a bare loop of the same model.

    python scripts/bench/client/step.py [--rows 8] [--tokens 168] [--repetitions 60]

All three take the same rows as lists and return the loss, with the guide's adapter (rank 16, dropout .05) and AdamW.
The service is `inft serve` in a process of its own on the loopback; everything has one thread. The first losses must
agree before anything is timed. --rows and --tokens set how long a step is: the limits are for steps of 100 ms.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from measured import Ratio, finish
from plain_loop import CONFIG, PlainLoop, Rows, rows_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import interleave, parser

from inft.client import ServiceClient, TrainingClient

BARE, IN_PROCESS, HTTP = "bare loop", "client, in process", "client, over HTTP"
RATIOS = [Ratio(ours=IN_PROCESS, peer=BARE, limit=1.02), Ratio(ours=HTTP, peer=BARE, limit=1.10)]


def main() -> None:
    """Check, time, print; the exit code is 1 when a limit is missed."""
    options = parser(__doc__, repetitions=60)
    options.add_argument("--rows", type=int, default=8, help="rows of a batch")
    options.add_argument("--tokens", type=int, default=168, help="tokens of a row")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(chosen.rows, chosen.tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(served(folder / "served"))
        local = stack.enter_context(ServiceClient({"state_dir": str(folder / "local"), "device": "cpu"}))
        remote = stack.enter_context(ServiceClient(url))
        loop = PlainLoop()
        clients = [service.create_training_client(CONFIG | {"batch_size": chosen.rows}) for service in (local, remote)]
        steps = {
            BARE: lambda: loop.step(rows),
            IN_PROCESS: lambda: client_step(clients[0], rows),
            HTTP: lambda: client_step(clients[1], rows),
        }
        check({name: step() for name, step in steps.items()})
        seconds = interleave(steps, repetitions=chosen.repetitions)
    title = f"A step of {chosen.rows} x {chosen.tokens} tokens through the training client"
    finish(title, seconds, RATIOS, out=chosen.out)


def client_step(client: TrainingClient, rows: Rows) -> float:
    """A step as the guide writes it."""
    forward = client.forward_backward(rows)
    step = client.optim_step()
    loss = forward.result().loss
    step.result()
    return loss


def check(losses: dict[str, float]) -> None:
    """Refuse to time what does not compute the same: an adapter is nothing at first, so only its dropout differs."""
    if not all(math.isclose(loss, losses[BARE], rel_tol=1e-5) for loss in losses.values()):
        raise SystemExit(f"the first losses differ: {losses}")


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The URL of `inft serve` in a process of its own, with one thread."""
    command = [sys.executable, "-m", "inft", "serve", "--port", "0", "--state-dir", str(directory)]
    limits = ["--device", "cpu", "--rate-limit", "100000", "--rate-burst", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serving (http://\S+)", line):
                yield found[1]
                break
        else:
            raise SystemExit("inft serve ended before it answered")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
