import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from client_http_service import BATCH, error_of, new_client, served
from hypothesis import given
from hypothesis import strategies as st

from inft.client.api import routes, server
from inft.client.api.bodies import LARGEST_INT, MOST_DEPTH, MOST_PARTS, parse_json
from inft.client.api.service import PARSED_AT_ONCE
from inft.client.errors import InvalidRequest
from params.client import ServeParams

LIMIT = 200_000  # bytes

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-LARGEST_INT, LARGEST_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=30,
)


@given(plain)
def test_plain_values_come_back_as_they_were_sent(value):
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} x', "not JSON: Extra data at character 9"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": NaN}', "NaN or infinite"),
        (b'{"a": [1.5, -Infinity]}', "NaN or infinite"),
        (b'{"a": [1, 1e999]}', "NaN or infinite"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7"),
        (b'{"a": ["\\ud800"]}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"x": {"b": 1, "b": 1}}', "'b' twice"),
        (b'{"a": 9223372036854775808}', "more than 64 bits"),
        (b'{"a": [0, -9223372036854775808]}', "more than 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "more than 64 bits"),
        (b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), f"more than {MOST_DEPTH} lists"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, f"more than {MOST_DEPTH} lists"),
        (b"[" + b"[]," * MOST_PARTS + b"[]]", f"more than {MOST_PARTS} lists and objects"),
        (b"[" + b"{}," * (MOST_PARTS // 2) + b"[]," * (MOST_PARTS // 2) + b"1]", f"more than {MOST_PARTS} lists"),
        (b"[" * 100_000, f"more than {MOST_DEPTH} lists"),
    ],
)
def test_what_json_does_not_mean_plainly_is_refused(body, words):
    with pytest.raises(InvalidRequest, match=words):
        parse_json(body)


def test_the_deepest_nesting_and_the_largest_numbers_are_taken():
    assert parse_json(b"[" * MOST_DEPTH + b"]" * MOST_DEPTH)
    assert parse_json(b"[9223372036854775807, 1e308]") == [LARGEST_INT, 1e308]


def test_a_large_batch_is_checked_in_little_more_time_than_it_is_parsed_in():
    body = json.dumps({"input_ids": [[1] * 1000, list(range(1000))] * 250}).encode()

    def fastest(function):
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        return min(times)

    assert fastest(lambda: parse_json(body)) < 5 * fastest(lambda: json.loads(body))


def test_a_body_of_too_many_lists_is_refused_before_it_is_read():
    body = b"[" + b"[]," * 11_000_000 + b"[]]"
    begun = time.perf_counter()
    with pytest.raises(InvalidRequest, match="send smaller batches"):
        parse_json(body)
    assert time.perf_counter() - begun < 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    params = ServeParams(rate_limit=1e6, rate_burst=10**6, max_body_bytes=LIMIT)
    with served(tmp_path_factory.mktemp("bodies"), params=params) as found:
        yield found


@pytest.fixture(scope="module")
def path(shared):
    with shared.client() as http:
        return new_client(http)


JSON = {"Content-Type": "application/json"}


def test_a_body_over_the_limit_is_refused_by_its_declared_length(shared, path):
    with shared.client() as http:
        error = error_of(http.post(f"{path}/forward_backward", content=b" " * (LIMIT + 1), headers=JSON), 413)
        assert (error["code"], error["details"]) == ("payload_too_large", {"limit": LIMIT})


def test_a_body_over_the_limit_without_a_length_is_counted_as_it_comes(shared, path):
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(5_000):
            sent += 10_000
            yield b" " * 10_000

    with shared.client() as http:
        answer = http.post(f"{path}/forward_backward", content=chunks(), headers=JSON)
        assert error_of(answer, 413)["code"] == "payload_too_large"
        assert answer.request.headers["Transfer-Encoding"] == "chunked"


def test_a_body_just_within_the_limit_is_taken_in_chunks_too(shared, path):
    body = json.dumps({"batch": BATCH}).encode()

    def chunks():
        yield body
        yield b" " * (LIMIT - len(body))

    with shared.client() as http:
        assert http.post(f"{path}/forward_backward?wait=20", content=chunks(), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/jsonl"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_what_is_not_plain_json_is_415(shared, path, headers):
    with shared.client() as http:
        error = error_of(http.post(f"{path}/optim_step", content=b"{}", headers=headers), 415)
        assert error["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"']
)
def test_json_may_say_that_it_is_utf8(shared, path, kind):
    with shared.client() as http:
        answer = http.post(f"{path}/load_state", content=b'{"artifact_id": "art-0"}', headers={"Content-Type": kind})
        assert error_of(answer, 404)["code"] == "not_found"


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"x"', b"", b'{"batch": {"input_ids": [[1, NaN]]}}'])
def test_a_body_that_is_no_object_of_the_operation_is_422_and_uses_no_number(shared, path, body):
    with shared.client() as http:
        before = http.get(path).json()["next_seq"]
        assert error_of(http.post(f"{path}/forward_backward", content=body, headers=JSON), 422)["message"]
        assert http.get(path).json()["next_seq"] == before


def test_a_body_where_none_is_taken_is_refused(shared):
    with shared.client() as http:
        error_of(http.post("/v1/futures/fut-0/cancel", json={"really": True}), 422)
        error_of(http.request("GET", "/v1/audit_logs", json={"after": 3}), 422)


def test_large_bodies_take_turns_and_small_requests_do_not_wait_for_them(shared, path, monkeypatch):
    lock, room, now, most = threading.Lock(), threading.Semaphore(0), 0, 0

    def parse(body):
        nonlocal now, most
        if len(body) > routes.LARGE:
            with lock:
                now += 1
                most = max(most, now)
            assert room.acquire(timeout=30)
            with lock:
                now -= 1
        return parse_json(body)

    monkeypatch.setattr(routes, "parse_json", parse)
    body = json.dumps({"batch": BATCH}).encode() + b" " * routes.LARGE
    with shared.client() as http, ThreadPoolExecutor(6) as threads:
        posts = [threads.submit(http.post, f"{path}/forward_backward", content=body, headers=JSON) for _ in range(6)]
        begun = time.monotonic()
        while now < PARSED_AT_ONCE:
            assert time.monotonic() - begun < 10
            time.sleep(0.01)
        assert http.post(f"{path}/forward_backward?wait=20", json={"batch": BATCH}).status_code == 200
        room.release(6)
        assert [post.result(30).status_code for post in posts] == [202] * 6
    assert most == PARSED_AT_ONCE


def test_more_connections_than_the_service_takes_are_turned_away_until_some_are_gone(tmp_path, monkeypatch):
    assert server.MOST_CONNECTIONS >= 1000
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 4)
    with served(tmp_path) as found:
        url = httpx.URL(found.url)
        idle = [socket.create_connection((url.host, url.port), timeout=10) for _ in range(4)]
        with found.client() as http:
            assert http.get("/v1/health").status_code == 503
        for connection in idle:
            connection.close()
        begun = time.monotonic()
        with found.client() as http:
            while http.get("/v1/health").status_code != 200:
                assert time.monotonic() - begun < 10
                time.sleep(0.05)
