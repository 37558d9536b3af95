import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from client_http_service import BATCH, error_of, new_client, served

from inft.client import ClientUnavailable, ServiceClient
from inft.client.api.service import PLACES, SLICE
from params.client import ServeParams


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    params = ServeParams(rate_limit=1e6, rate_burst=10**6, max_wait_s=30)
    with served(tmp_path_factory.mktemp("polls"), params=params) as found:
        yield found


@pytest.fixture
def http(shared):
    with shared.client() as client:
        yield client


def until(holds, seconds=10.0):
    """Wait until a condition holds, and return how long that took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
    return time.monotonic() - begun


def waiting_future(http):
    """A future that has not finished, and how to let it finish."""
    path = new_client(http)
    future = http.post(f"{path}/optim_step", json={"seq": 2}).json()["id"]
    return future, lambda: http.post(f"{path}/forward_backward", json={"batch": BATCH, "seq": 1})


def test_more_long_polls_than_places_block_nobody_and_all_are_answered(shared, http):
    future, finish = waiting_future(http)
    polls = PLACES + 40
    limits = httpx.Limits(max_connections=polls)
    with shared.client(limits=limits) as many, ThreadPoolExecutor(polls) as threads:
        answers = [threads.submit(many.get, f"/v1/futures/{future}/result?wait=30") for _ in range(polls)]
        until(lambda: shared.service.waiting == polls)
        begun = time.monotonic()
        for _ in range(5):
            assert http.get("/v1/training_clients").status_code == 200
        assert time.monotonic() - begun < 5
        finish()
        assert {answer.result(timeout=30).json()["status"] for answer in answers} == {"completed"}
    assert shared.service.waiting == 0


def test_a_client_that_vanishes_mid_poll_frees_its_place_and_the_operation_goes_on(shared, http):
    future, finish = waiting_future(http)
    url = httpx.URL(shared.url)
    connection = socket.create_connection((url.host, url.port), timeout=10)
    request = f"GET /v1/futures/{future}/result?wait=30 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    connection.sendall(request.encode())
    until(lambda: shared.service.waiting == 1)
    connection.close()
    assert until(lambda: shared.service.waiting == 0) < 20 * SLICE
    finish()
    assert http.get(f"/v1/futures/{future}/result").json()["status"] == "completed"


def test_a_client_that_vanishes_in_the_middle_of_its_body_leaves_nothing(shared, http):
    path = new_client(http)
    url = httpx.URL(shared.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        head = f"POST {path}/optim_step HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 500\r\n\r\n{{"seq": 1'.encode())
        time.sleep(0.1)
    assert http.get(path).json()["next_seq"] == 1


def test_a_poll_ends_after_its_time_and_after_the_services_own_limit(tmp_path):
    with served(tmp_path, params=ServeParams(max_wait_s=0.3)) as found, found.client() as http:
        future, _ = waiting_future(http)
        for wait, most in ((0.1, 0.3), (50, 1.5)):
            begun = time.monotonic()
            answer = http.get(f"/v1/futures/{future}/result?wait={wait}")
            assert (answer.status_code, answer.json()["status"]) == (202, "waiting")
            assert min(wait, 0.3) <= time.monotonic() - begun < most + 2


def test_a_service_that_stops_answers_open_polls_and_the_operation_is_kept(tmp_path):
    with served(tmp_path) as found, found.client() as http:
        future, _ = waiting_future(http)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(http.get(f"/v1/futures/{future}/result?wait=30")))
        thread.start()
        until(lambda: found.service.waiting == 1)
        begun = time.monotonic()
        found.server.stop()
        thread.join(10)
        assert time.monotonic() - begun < 5
        assert (answers[0].status_code, answers[0].json()["id"]) == (202, future)
    with served(tmp_path) as found, found.client() as http:
        assert http.get(f"/v1/futures/{future}").json()["status"] == "waiting"


def test_a_client_that_cannot_be_brought_back_is_503_to_its_polls_and_not_asked_again(shared, http, monkeypatch):
    future, finish = waiting_future(http)
    asked = []

    def unavailable(tenant, future_id, timeout):
        asked.append(future_id)
        raise ClientUnavailable("its snapshot is damaged.", client_id="tc-1")

    with monkeypatch.context() as broken, ServiceClient(shared.url) as service:
        broken.setattr(shared.engine, "wait", unavailable)
        answer = http.get(f"/v1/futures/{future}/result?wait=30")
        error = error_of(answer, 503)
        assert (error["code"], error["details"]) == ("client_unavailable", {"client_id": "tc-1"})
        assert answer.headers["Retry-After"]
        with pytest.raises(ClientUnavailable, match="snapshot is damaged"):
            service.get_future(future).result(20)
    assert len(asked) == 2
    finish()
    assert http.get(f"/v1/futures/{future}/result?wait=30").json()["status"] == "completed"


def test_a_client_says_which_number_runs_next(http):
    future, finish = waiting_future(http)
    client = http.get(f"/v1/futures/{future}").json()["client_id"]
    info = http.get(f"/v1/training_clients/{client}").json()
    assert (info["next_seq"], info["next_run"]) == (3, 1)
    finish()
    http.get(f"/v1/futures/{future}/result?wait=30")
    assert http.get(f"/v1/training_clients/{client}").json()["next_run"] == 3
