"""A service on a real engine and a real port, for the tests of its HTTP face."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from inft.client.api.app import create_app
from inft.client.api.auth import Keys, read_keys
from inft.client.api.server import Server, bind, url_of
from inft.client.api.service import Service
from inft.client.engine import Engine
from inft.client.losses.registry import BUILT_IN
from params.client import EngineParams, ServeParams

MODEL = "text"  # the name that clients give
CONFIG = {"model_ref": MODEL, "lora_config": {"rank": 2, "dropout": 0.0}, "seed": 0}
BATCH = {"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]}
ADA, GRACE = "tml-of-ada-0123456789", "tml-of-grace-0123456789"
UNLIMITED = ServeParams(rate_limit=1e6, rate_burst=1_000_000)


class Served(NamedTuple):
    url: str
    engine: Engine
    service: Service
    server: Server

    def client(self, key: str | None = None, **kwargs) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **kwargs)


@contextmanager
def served(
    directory: Path, *, params: ServeParams = UNLIMITED, keys: Keys | None = None, **engine_params
) -> Iterator[Served]:
    """Serve the embedded text model from this process until the block ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    offered = {"models": {MODEL: "embedded/text"}, "any_model": False, "losses": tuple(BUILT_IN), "device": "cpu"}
    engine_params = offered | engine_params
    try:
        with Engine(EngineParams(state_dir=str(directory / "state"), **engine_params)) as engine:
            bound, ready = bind("127.0.0.1", 0), threading.Event()
            app = create_app(engine, params, keys=keys)
            server = Server(app, ready=ready.set)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
            thread.start()
            assert ready.wait(20)
            try:
                yield Served(url_of(bound), engine, app.state.service, server)
            finally:
                server.stop()
                thread.join(20)
                assert not thread.is_alive()
    finally:
        torch.set_num_threads(threads)


def two_tenants(directory: Path) -> Keys:
    """The keys of ada and grace, from a file."""
    path = directory / "keys"
    path.write_text(f"# tenants\nada {ADA}\n\ngrace  {GRACE}\n")
    path.chmod(0o600)
    return read_keys(path)


def new_client(http: httpx.Client, **config) -> str:
    """The path of a new training client."""
    answer = http.post("/v1/training_clients", json=CONFIG | config)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/v1/training_clients/{answer.json()['id']}"
    return answer.headers["Location"]


def error_of(answer: httpx.Response, status: int) -> dict:
    """The error of an answer, whose envelope is checked."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert list(error) == ["code", "message", "details", "request_id"]
    assert error["request_id"] == answer.headers["X-Request-Id"]
    assert isinstance(error["message"], str)
    assert isinstance(error["details"], dict)
    return error
