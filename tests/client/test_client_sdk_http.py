"""The SDK over HTTP: where requests and answers are lost, no operation is lost and none is done twice."""

import io
import math
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from client_services import served, serving

from inft.client import (
    Closed,
    Conflict,
    Engine,
    InternalError,
    InvalidRequest,
    NotFound,
    ServiceClient,
    TimedOut,
    TrainingClient,
    UserError,
)
from inft.client.losses.token_ce import token_ce
from inft.client.sdk.archive import check_content, unpack
from params.client import EngineParams, ServeParams

ROWS = {"prompt": ["star, blue: ", "tree, red: "], "completion": ["A blue star.", "A red tree."]}
CONFIG = {"model_ref": "embedded/text", "optimizer": {"learning_rate": 1e-2}, "seed": 5}
Fault = Callable[[int, str], str]  # (number of the request, its path) -> what becomes of it


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a service, or loses them, or loses their answers."""

    daemon_threads = True

    def __init__(self, url: str, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.fault = fault
        self.requests: list[tuple[str, str, str]] = []  # method, path, request id
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.command, self.path, self.headers["X-Request-Id"]))
        what = self.server.fault(number, self.path)
        if what == "lose request":
            self.close_connection = True
            return
        if what == "page":
            self._send(200, b"<html>Welcome</html>")
            return
        if what.isdigit():
            self._send(int(what), b'{"error": {"code": "queue_full", "message": "later", "details": {}}}')
            return
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")
        }
        found = self.server.upstream.request(self.command, self.path, content=body or None, headers=headers)
        if what == "lose answer":
            self.close_connection = True
            return
        self._send(found.status_code, found.content)

    do_GET = do_POST = answer

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status in (429, 503):
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def proxied(url: str, fault: Fault) -> Iterator[tuple[str, Proxy]]:
    proxy = Proxy(url, fault)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        proxy.upstream.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(state_dir=str(tmp_path_factory.mktemp("state")), device="cpu") as found:
        yield found


@pytest.fixture
def service(url: str) -> Iterator[ServiceClient]:
    with ServiceClient(url) as made:
        yield made


def trained(client: TrainingClient, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        future = client.forward_backward(ROWS)
        client.optim_step().result(30)
        losses.append(future.result(30).loss)
    return losses


def test_training_over_http_is_that_in_process_to_the_bit(service: ServiceClient, tmp_path: Path):
    remote = service.create_training_client(CONFIG)
    with ServiceClient({"state_dir": tmp_path / "local", "device": "cpu"}) as in_process:
        here = in_process.create_training_client(CONFIG)
        assert trained(remote) == trained(here)
        assert remote.sample(["star, "], seed=3) == here.sample(["star, "], seed=3)
        one, two = remote.save_state(), here.save_state()
        files = [
            (place.pull_artifact(saved.artifact_id, tmp_path) / "adapter_model.safetensors").read_bytes()
            for place, saved in ((service, one), (in_process, two))
        ]
        assert files[0] == files[1]
        assert remote.load_state(one.artifact_id).step == remote.step == 3
        assert repr(remote.config) == repr(here.config)


@pytest.mark.parametrize("what", ["lose request", "lose answer", "503", "429", "502"])
def test_a_request_that_fails_is_repeated_and_done_once(url: str, service: ServiceClient, what: str):
    expected = trained(service.create_training_client(CONFIG))
    client_id = service.create_training_client(CONFIG).id
    # Every other request fails, so each has to be sent twice.
    with (
        proxied(url, lambda number, path: what if number % 2 == 0 else "") as (unsafe, proxy),
        ServiceClient(unsafe) as shaky,
    ):
        client = shaky.get_training_client(client_id)
        assert trained(client) == expected
        assert client.sample(["A "], max_tokens=2).model_step == 3
    info = service.get_training_client(client_id)
    assert info.step == 3
    assert info.forward_backward(ROWS).seq == 8, "three losses, three steps and a sample, each once"
    repeated = [request[2] for request in proxy.requests[0:2]]
    assert repeated[0] == repeated[1], "a repeated request keeps its id"


def test_a_lost_answer_to_a_creation_makes_no_second_client(url: str, service: ServiceClient):
    before = len(service.list_training_clients())
    with (
        proxied(url, lambda number, path: "lose answer" if number == 0 else "") as (unsafe, _),
        ServiceClient(unsafe) as shaky,
    ):
        client = shaky.create_training_client(CONFIG)
        assert trained(client) == trained(service.create_training_client(CONFIG))
    assert len(service.list_training_clients()) == before + 2


def test_faults_by_chance_lose_nothing(url: str, service: ServiceClient):
    expected = trained(service.create_training_client(CONFIG), steps=5)
    dice = random.Random(4)
    faults = ["lose request", "lose answer", "503", "", "", "", ""]
    client_id = service.create_training_client(CONFIG).id
    with (
        proxied(url, lambda number, path: dice.choice(faults)) as (unsafe, proxy),
        ServiceClient(unsafe) as shaky,
    ):
        assert trained(shaky.get_training_client(client_id), steps=5) == expected
        assert len(proxy.requests) > 20


def test_when_nobody_answers_the_timeout_holds_and_says_where(caplog: pytest.LogCaptureFixture):
    with ServiceClient({"base_url": "http://127.0.0.1:9", "timeout": 0.3}) as nowhere:
        begun = time.monotonic()
        with pytest.raises(TimedOut, match=r"127\.0\.0\.1:9 refused the connection.*inft serve"):
            nowhere.list_training_clients()
        assert time.monotonic() - begun < 2
    warnings = [record.getMessage() for record in caplog.records if record.name == "inft.client.sdk.http"]
    assert len(warnings) == 1, "the first refusal is told at once, and the others are not"
    assert "refused the connection" in warnings[0]
    assert "It is tried again for 0 s" in warnings[0]


def test_after_an_unanswered_operation_the_service_is_asked_for_the_number(url: str, service: ServiceClient):
    client_id = service.create_training_client(CONFIG).id
    lost = {"on": False}
    with (
        proxied(url, lambda number, path: "lose answer" if lost["on"] and "backward" in path else "") as (unsafe, _),
        ServiceClient({"base_url": unsafe, "timeout": 0.2}) as shaky,
    ):
        client = shaky.get_training_client(client_id)
        assert client.forward_backward(ROWS).seq == 1
        lost["on"] = True
        with pytest.raises(TimedOut):
            client.forward_backward(ROWS)
        lost["on"] = False
        assert client.forward_backward(ROWS).seq == 3, "the second was accepted, though nobody heard of it"


def test_a_full_queue_and_a_rate_limit_are_waited_for_but_not_a_limit_that_stays(tmp_path: Path):
    limits = ServeParams(rate_limit=20.0, rate_burst=2)
    with (
        served(serve=limits, state_dir=str(tmp_path), max_pending_per_tenant=2, max_clients_per_tenant=1) as url,
        ServiceClient(url) as service,
    ):
        client = service.create_training_client(CONFIG)
        assert [client.forward_backward(ROWS) for _ in range(8)][-1].result(30).accumulated == 8
        with pytest.raises(Conflict, match="1 training clients"):
            service.create_training_client(CONFIG)


def test_a_budget_without_a_limit_is_the_same_over_the_wire(service: ServiceClient):
    dp = {"dataset_size": 10, "noise_multiplier": 1.0, "target_epsilon": None, "target_delta": 1e-2}
    assert service.create_training_client({**CONFIG, "dp_config": dp}).config.dp.target_epsilon is None
    with pytest.raises(UserError, match="finite"):
        service.create_training_client({**CONFIG, "dp_config": dp | {"target_epsilon": math.inf}})


def test_a_refused_request_uses_up_no_number_and_keeps_its_words(service: ServiceClient):
    client = service.create_training_client(CONFIG)
    with pytest.raises(UserError, match="row 1"):
        client.forward_backward({"input_ids": [[5, 6], [7]]})
    with pytest.raises(InvalidRequest, match="finite"):
        client.forward_backward({"input_ids": [[5, 6]], "advantages": [float("nan")]}, loss="reinforce")
    with pytest.raises(InvalidRequest, match="a function cannot be sent"):
        client.forward_backward(ROWS, loss=token_ce)
    assert client.forward_backward(ROWS).seq == 1


def test_handles_of_one_client_share_its_numbers(url: str, service: ServiceClient):
    client = service.create_training_client(CONFIG)
    with ServiceClient(url) as other:
        same = other.get_training_client(client.id)
        futures = [handle.forward_backward(ROWS) for handle in (client, same, client, same)]
        assert [future.seq for future in futures] == [1, 2, 3, 4]
        assert [future.result(30).accumulated for future in futures] == [1, 2, 3, 4]


def test_another_program_on_the_same_client_is_a_conflict_and_then_they_go_on(url: str, service: ServiceClient):
    client = service.create_training_client(CONFIG)
    client.forward_backward(ROWS)
    path = f"{url}/v1/training_clients/{client.id}/optim_step"
    assert httpx.post(path, json={"seq": 2}, trust_env=False).status_code == 202
    with pytest.raises(Conflict, match="Another program"):
        client.forward_backward(ROWS)
    assert client.forward_backward(ROWS).seq == 3


def test_a_future_over_http_waits_without_sleeping_and_times_out(service: ServiceClient):
    client = service.create_training_client(CONFIG)
    slow = client.forward_backward({"input_ids": [[5] * 512] * 8})
    with pytest.raises(TimedOut):
        slow.result(timeout=0.001)
    assert slow.result(30).loss > 0
    assert slow.done()
    begun = time.monotonic()
    trained(client, steps=5)
    assert time.monotonic() - begun < 4, "the project of the guide took a second for each result"
    again = service.get_future(slow.id)
    assert again.result() == slow.result()
    assert not again.cancel()


def test_a_failure_keeps_its_kind_over_http(service: ServiceClient):
    with pytest.raises(NotFound):
        service.get_training_client("tc-0000")
    for name in ("../audit_logs", "tc-0/../..", "", "tc-\u00e9", "a b"):
        with pytest.raises(NotFound):
            service.get_training_client(name)
    client = service.create_training_client({**CONFIG, "max_steps": 1})
    trained(client, steps=1)
    client.forward_backward(ROWS)
    failed = client.optim_step()
    assert "max_steps" in str(failed.exception(30))
    with pytest.raises(UserError, match="max_steps"):
        failed.result()


def test_what_is_not_the_service_is_told(url: str):
    with (
        proxied(url, lambda number, path: "page") as (other, _),
        ServiceClient(other) as wrong,
        pytest.raises(InternalError, match="is base_url that of"),
    ):
        wrong.list_training_clients()
    with ServiceClient(url) as service:
        pass
    with pytest.raises(Closed):
        service.list_training_clients()


def test_training_goes_on_where_the_service_was_started_again(tmp_path: Path):
    params = EngineParams(state_dir=str(tmp_path), device="cpu")
    with Engine(params) as engine, serving(engine) as url, ServiceClient(url) as service:
        expected = trained(service.create_training_client(CONFIG), steps=4)
        port = int(url.rpartition(":")[2])
        client = service.create_training_client(CONFIG)
        losses = trained(client, steps=2)
    restarted = threading.Event()

    def restart() -> None:
        time.sleep(0.3)  # the SDK is trying meanwhile
        with Engine(params) as engine, serving(engine, port=port):
            restarted.wait(30)

    thread = threading.Thread(target=restart)
    with ServiceClient({"base_url": url, "timeout": 20}) as service:
        thread.start()
        try:
            losses += trained(service.get_training_client(client.id), steps=2)
        finally:
            restarted.set()
            thread.join()
    assert losses == expected


# Checkpoints that come over the wire


def tar(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", ".", "a\\b", "./a"])
def test_a_member_of_a_tar_cannot_leave_its_directory(tmp_path: Path, name: str):
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(InternalError, match="no new plain file"):
        unpack(iter([tar((name, b"x"))]), inside)
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_nothing_but_files_comes_out_of_a_tar(tmp_path: Path, kind: bytes):
    with pytest.raises(InternalError, match="no new plain file"):
        unpack(iter([tar(("link", b""), kind=kind)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tar_comes_in_pieces_of_any_size(tmp_path: Path):
    content = tar(("a", b"1" * 5000), ("b", b""))
    for size in (1, 511, 512, 100_000):
        place = tmp_path / str(size)
        place.mkdir()
        unpack(iter([content[start : start + size] for start in range(0, len(content), size)]), place)
        assert [(path.name, len(path.read_bytes())) for path in sorted(place.iterdir())] == [("a", 5000), ("b", 0)]
    with pytest.raises(InternalError, match="damaged"):
        unpack(iter([content[:3000]]), tmp_path)


def test_a_checkpoint_with_one_other_byte_is_refused(service: ServiceClient, tmp_path: Path):
    client = service.create_training_client(CONFIG)
    saved = client.save_state()
    place = service.pull_artifact(saved.artifact_id, tmp_path)
    check_content(place, saved.content_hash)
    with pytest.raises(InternalError, match=r"state\.json"):
        check_content(place, "0" * 64)
    for path in place.iterdir():
        content = path.read_bytes()
        for damaged in (content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InternalError, match="missing or not as it was written"):
                check_content(place, saved.content_hash)
        path.write_bytes(content)
    (place / "more").write_text("x")
    with pytest.raises(InternalError, match="more"):
        check_content(place, saved.content_hash)


def test_a_client_is_deleted_over_http_and_its_checkpoint_opens_elsewhere(service: ServiceClient):
    client = service.create_training_client(CONFIG)
    client.forward_backward(ROWS)
    client.optim_step().result()
    saved = client.save_state()
    client.delete()
    with pytest.raises(NotFound):
        service.get_training_client(client.id)
    with pytest.raises(NotFound):
        client.delete()
    assert service.create_training_client(CONFIG).load_state(saved.artifact_id).step == 1


def test_an_operation_that_waits_for_a_number_says_so(url: str, service: ServiceClient):
    client = service.create_training_client(CONFIG)
    path = f"{url}/v1/training_clients/{client.id}/optim_step"
    future = service.get_future(httpx.post(path, json={"seq": 3}, trust_env=False).json()["id"])
    with pytest.raises(TimedOut, match="it waits for number 1, which has not come"):
        future.result(timeout=0.05)
    assert future.cancel()
