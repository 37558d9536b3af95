"""A real service over HTTP on a free port of this machine, in this process, for tests of what drives one."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from inft.client.api.app import create_app
from inft.client.engine import Engine
from params.client import EngineParams, ServeParams


@contextmanager
def served(*, port: int = 0, serve: ServeParams | None = None, **engine_params: Any) -> Iterator[str]:
    """The URL of a service with an engine of these parameters."""
    with Engine(EngineParams(**engine_params)) as engine, serving(engine, port=port, serve=serve) as url:
        yield url


@contextmanager
def serving(engine: Engine, *, port: int = 0, serve: ServeParams | None = None) -> Iterator[str]:
    """The URL of a service of this engine."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, serve or ServeParams()), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
