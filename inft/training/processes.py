"""Several processes of one run (torchrun): who speaks, what they decide together, how all end when one fails.

The first process (rank 0) alone talks, locks, writes and deletes. Decisions are made there, or by all, and shared. What
fails in one process while the others wait for it is told to them through the launcher's store. In one process every
function here is the identity. torch is imported on use: the command line asks ``is_main`` before it is there.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from params.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets besides WORLD_SIZE
PATIENCE = timedelta(hours=2)  # for the slowest of the others, such as one that still reads its images
CONNECTION_LOST = ("by peer", "Broken pipe", "remote process exited")  # in the words of gloo, the system and NCCL
POLL = 0.2  # seconds between looks at the store
GRACE = 1.0  # seconds in which a process that meets the same mistake tells it itself
OUTLAST = 30.0  # seconds in which the launcher ends a process after the first one has told its mistake


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended one process."""

    rank: int
    kind: str  # class name of the exception
    message: str
    code: int  # exit status: 2 for a user's mistake, 130 for Ctrl-C, 1 otherwise


def process_count() -> int:
    """How many processes the launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that talks and writes."""
    return rank() == 0


def launch_command() -> str:
    """How the inft command was started: by itself, or by torchrun on this machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE", process_count())
    return "inft" if process_count() == 1 else f"torchrun --nproc-per-node {here} -m inft"


def wait_for_main() -> None:
    """In the other processes: let the first tell a mistake that all meet, and end when the launcher says so.

    Returns when nothing has ended this process for OUTLAST seconds: the mistake was met here alone.
    """
    if is_main():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(2))
    time.sleep(OUTLAST)


def on_main(action: Callable[[], T]) -> T:
    """Run ``action`` in the first process; all get its result, or its UserError."""
    return _shared(action, everywhere=False)


def together(action: Callable[[], T]) -> T:
    """Run ``action`` in every process and return its own result; a UserError of any of them is raised in all."""
    return _shared(action, everywhere=True)


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if process_count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    if process_count() == 1:
        return flag
    import torch
    import torch.distributed as dist

    flags = torch.tensor([int(flag)])  # on the CPU, through gloo: cheaper than waiting for a GPU
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def _shared(action: Callable[[], T], *, everywhere: bool) -> T:
    if process_count() == 1:
        return action()
    mine: UserError | None = None
    result: T | None = None
    if everywhere or is_main():
        try:
            result = action()
        except UserError as error:
            mine = error
    messages = gather(None if mine is None else str(mine))
    told = next((message for message in messages if message is not None), None)
    if told is not None:
        raise agreed(mine or UserError(told))
    return result if everywhere else gather(result)[0]  # type: ignore[return-value]


def agreed(error: UserError) -> UserError:
    """The error, known to be raised in every process at the same place: nobody has to be told."""
    if process_count() > 1:
        _watch().agreed = error
    return error


@contextmanager
def joined() -> Iterator[None]:
    """Around a run: the processes find each other, and a failure in one of them ends all."""
    if process_count() == 1:
        yield
        return
    watch = _watch()
    try:
        yield
    except BaseException as error:  # Ctrl-C in one process must end the others, too
        if error is watch.agreed:
            raise
        for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's must not cut the message short
            signal.signal(number, signal.SIG_IGN)
        watch.tell(error)
        raise


class LostProcess(UserError):
    """A collective operation failed because another process is gone."""


@contextmanager
def lost_process_told() -> Iterator[None]:
    """Turn a connection that broke in a collective operation into a message that says what that means."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError of NCCL, and gloo's, which has no class of its own
        if process_count() == 1 or not any(words in str(error) for words in CONNECTION_LOST):
            raise
        raise LostProcess(
            "another process of this run has ended without a word: killed, or out of memory? What was saved before is "
            f"intact: run the same command with --resume. ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def when_another_fails(action: Callable[[Failure], None]) -> Iterator[None]:
    """Have the first process call ``action`` before it ends for what failed elsewhere, while its main thread waits."""
    if process_count() == 1:
        yield
        return
    watch = _watch()
    watch.actions.append(action)
    try:
        yield
    finally:
        watch.actions.remove(action)


class _Watch(threading.Thread):
    """Looks for the failure of another process while this one may be waiting for it in a collective operation."""

    def __init__(self, stores: Sequence["Store"]) -> None:
        super().__init__(name="inft-watch", daemon=True)
        self.mine, self.looking = stores  # a connection answers one thread at a time
        self.actions: list[Callable[[Failure], None]] = []
        self.agreed: UserError | None = None  # raised in every process: nobody has to be told
        self._ending = threading.Lock()
        self._closing = threading.Event()
        self._told = False  # this process says itself why it ends

    def tell(self, error: BaseException) -> None:
        """Let the others know; wait to be ended instead when ``error`` only follows from what failed elsewhere."""
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        failure = Failure(rank=rank(), kind=type(error).__name__, message=str(error), code=code)
        first = json.loads(self.mine.compare_set("failure", "", json.dumps(asdict(failure))))
        if first["rank"] != rank() and isinstance(error, LostProcess):
            self.join(OUTLAST)
        with self._ending:
            self._told = True

    def close(self) -> None:
        """Stop looking: a thread that is still in the store when Python ends aborts the process (std::terminate)."""
        self._closing.set()
        self.join(OUTLAST)

    def run(self) -> None:
        """Poll the store; a failure elsewhere ends this process."""
        import torch.distributed as dist

        try:
            while not self.looking.check(["failure"]):
                if self._closing.wait(POLL):
                    return
            failure = Failure(**json.loads(self.looking.get("failure")))
        except dist.DistError:  # the launcher is gone, and its store with it
            return
        if failure.rank == rank():
            return
        time.sleep(GRACE if is_main() else 2 * GRACE)  # the first process leaves first: its status is the run's
        with self._ending:
            if self._told and is_main():
                return
            if is_main():
                self._say(failure)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failure.code)  # the main thread may never come back from a collective operation

    def _say(self, failure: Failure) -> None:
        for action in reversed(self.actions):
            action(failure)
        if failure.code == 2:
            print("error:", failure.message, file=sys.stderr)
        elif failure.code == 130:
            print("interrupted", file=sys.stderr)


_watching: list[_Watch] = []  # at most one


def _watch() -> _Watch:
    """Join the other processes, once in the life of this one."""
    if not _watching:
        _watching.append(_start())
    return _watching[0]


def _start() -> _Watch:
    import atexit

    import torch
    import torch.distributed as dist

    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={process_count()} is set, but not {', '.join(missing)}: unset it to run in one process, or "
            "start several by torchrun --nproc-per-node N -m inft train …"
        )
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"{here} processes were started for {gpus} GPUs: give torchrun --nproc-per-node {gpus}.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    watch = _Watch([_store(), _store()])
    watch.start()
    atexit.register(watch.close)
    return watch


def _store() -> "Store":
    """A connection to the launcher's store, under a name of this attempt's own."""
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"inft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
