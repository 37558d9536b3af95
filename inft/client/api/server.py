"""The service run by uvicorn, from a bound socket to a clean end."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from inft.client.api.auth import is_loopback
from params.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LARGEST_PORT = 65_535
MOST_CONNECTIONS = 1000  # at once; more are answered with 503 and no envelope
GRACE_S = 10  # seconds that open requests have to end once the service closes


class Server(uvicorn.Server):
    """A uvicorn server of one application, which says when it is ready and leaves signals to its caller."""

    def __init__(self, app: FastAPI, *, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,  # an address that a caller may choose would get round the limits
                ws="none",
                lifespan="on",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._app, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield

    def stop(self) -> None:
        """Take no more connections, answer open long polls at once, and end; may be called from any thread."""
        self._app.state.service.closing = True
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the first address of a host; port 0: any that is free.

    Errors: UserError for a host that is unknown, and an address that cannot be used.
    """
    if port > LARGEST_PORT:  # the system would take the remainder
        raise UserError(f"port {port} is above {LARGEST_PORT}: choose another, or 0 for any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"host {host!r}, port {port}: there is no such address ({error}).") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(f"{host}:{port} cannot be used ({error.strerror}): choose another port, or 0.") from error
    return bound


def is_public(bound: socket.socket) -> bool:
    """Return whether others than this machine can reach a bound socket."""
    return not is_loopback(str(bound.getsockname()[0]))


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def stopping(server: Server) -> Iterator[None]:
    """Within it the first SIGINT or SIGTERM stops the server, and a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        server.stop()

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
