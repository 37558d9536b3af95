import json
import re

import pytest
from client_http_service import ADA, GRACE, error_of, new_client, served, two_tenants
from hypothesis import given
from hypothesis import strategies as st

from inft.client.api.auth import bearer_tenant, read_keys, require_local_host
from inft.client.api.limits import MOST_BUCKETS, Limiter
from inft.client.errors import Forbidden, Unauthorized
from params import UserError
from params.client import ServeParams


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("auth")
    with served(directory, keys=two_tenants(directory)) as found:
        yield found


def key_file(tmp_path, text, mode=0o600):
    path = tmp_path / "keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_keys_that_others_can_read_are_refused_with_the_remedy(tmp_path, mode):
    path = key_file(tmp_path, f"ada {ADA}\n", mode)
    with pytest.raises(UserError, match="chmod 600"):
        read_keys(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no key"),
        ("# ada is away\n", "has no key"),
        ("ada\n", "line 1: give a tenant's name and its key"),
        ("ada secretsecretsecret more\n", "line 1: give a tenant's name and its key"),
        ("\nada short-secret\n", "line 2: the key of ada has 12 characters, and 16 are needed"),
        (f"ada {ADA}\ngrace {ADA}\n", "lines 1 and 2 have the same key"),
        ("ada secretsecretsecrét\n", "line 1: the key has characters that are not ASCII"),
        (f"{'a' * 129} {ADA}\n", "more than 128 characters"),
        (b"ada \xff\xff\n", "not a text in UTF-8"),
    ],
)
def test_a_file_of_keys_is_refused_with_its_line_and_without_its_keys(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as refused:
        read_keys(key_file(tmp_path, text))
    assert ADA not in str(refused.value)
    assert not [word for word in ("secretsecret", "short-secret") if word in str(refused.value)]


def test_a_missing_file_of_keys_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere could not be read"):
        read_keys(tmp_path / "nowhere")


def test_a_tenant_may_have_two_keys_and_no_key_is_kept(tmp_path):
    keys = read_keys(key_file(tmp_path, f"ada {ADA}\nada {GRACE}\n"))
    assert keys.tenants == ("ada",)
    assert keys.tenant_of(GRACE.encode()) == "ada"
    assert keys.tenant_of(GRACE[:-1].encode()) is None
    assert ADA not in repr(vars(keys))


@pytest.mark.parametrize(
    "values",
    [
        (),
        (b"",),
        (b"Bearer",),
        (b"Bearer  ",),
        (b"Basic " + ADA.encode(),),
        (b"Bearer x", b"Bearer x"),
        (b"Bearer no",),
    ],
)
def test_a_request_without_one_known_key_is_unauthorized(tmp_path, values):
    with pytest.raises(Unauthorized):
        bearer_tenant(two_tenants(tmp_path), [(b"authorization", value) for value in values])


@pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:8787", "[::1]", "[::1]:1"])
def test_this_machines_own_names_are_answered(host):
    require_local_host([(b"host", host.encode())])


@pytest.mark.parametrize(
    "hosts", [(), ("evil.example",), ("127.0.0.1.evil.example",), ("localhost", "evil"), ("[::1].evil",), ("10.0.0.1",)]
)
def test_other_names_are_refused_since_a_web_page_may_point_them_here(hosts):
    with pytest.raises(Forbidden, match="localhost"):
        require_local_host([(b"host", host.encode()) for host in hosts])


def test_a_name_with_an_address_in_front_is_refused_over_http(tmp_path):
    with served(tmp_path) as found, found.client() as http:
        assert http.get("/v1/audit_logs").status_code == 200
        error_of(http.get("/v1/audit_logs", headers={"Host": "rebound.example"}), 403)
        error_of(http.get("/v1/health", headers={"Host": "rebound.example"}), 403)
        error_of(http.get("/v1/audit_logs", headers={"X-Tenant-Id": "ada"}), 403)
        assert http.get("/v1/audit_logs", headers={"X-Tenant-Id": "local"}).status_code == 200


def test_no_key_or_a_wrong_one_is_401_on_every_path_but_health_and_the_description(shared):
    with shared.client() as http:
        for path in ("/v1/training_clients", "/v1/futures/fut-0", "/v1/audit_logs", "/v1/nothing", "/", "/docs"):
            for headers in ({}, {"Authorization": f"Bearer {ADA}x"}):
                answer = http.get(path, headers=headers)
                assert error_of(answer, 401)["code"] == "unauthorized"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert http.get("/openapi.json").status_code == 200
        health = http.get("/v1/health")
        assert set(health.json()) == {"status", "version", "models"}


def test_a_large_body_without_a_key_is_refused_before_it_is_read(shared):
    with shared.client() as http:
        answer = http.post("/v1/training_clients", content=b"x" * 100_000, headers={"Content-Type": "text/plain"})
        assert error_of(answer, 401)["code"] == "unauthorized"


def test_another_tenants_name_with_a_key_is_403_and_in_the_log_of_the_key(shared):
    with shared.client(ADA) as http:
        assert http.get("/v1/training_clients", headers={"X-Tenant-Id": "ada"}).status_code == 200
        answer = http.get("/v1/training_clients", headers={"X-Tenant-Id": "grace", "X-Request-Id": "mine-1"})
        assert error_of(answer, 403)["request_id"] == "mine-1"
        [entry] = [
            entry for entry in http.get("/v1/audit_logs").json()["audit_logs"] if entry["request_id"] == "mine-1"
        ]
        assert (entry["tenant"], entry["outcome"]) == ("ada", "refused")
        assert entry["details"] == {"status": 403, "code": "forbidden"}
    with shared.client(GRACE) as http:
        assert "mine-1" not in http.get("/v1/audit_logs").text


def test_what_one_tenant_has_does_not_exist_for_another(shared):
    with shared.client(ADA) as ada, shared.client(GRACE) as grace:
        path = new_client(ada)
        future = ada.post(f"{path}/save_state", json={}).json()
        artifact = future["result"]["artifact_id"]
        other = new_client(grace)
        asked = [
            ("GET", path, None),
            ("POST", f"{path}/optim_step", {}),
            ("POST", f"{path}/forward_backward", {"batch": {"input_ids": [[1, 2]]}}),
            ("POST", f"{other}/load_state", {"artifact_id": artifact}),
            ("GET", f"/v1/futures/{future['id']}", None),
            ("GET", f"/v1/futures/{future['id']}/result", None),
            ("POST", f"/v1/futures/{future['id']}/cancel", None),
            ("GET", f"/v1/artifacts/{artifact}", None),
            ("GET", f"/v1/artifacts/{artifact}/content", None),
        ]
        for method, where, body in asked:
            foreign = error_of(grace.request(method, where, json=body), 404)
            where = where if where.startswith(other) else ended(where)
            missing = error_of(grace.request(method, where, json=body and ended(body)), 404)
            assert foreign["code"] == missing["code"] == "not_found"
            assert ended(foreign["message"]) == missing["message"]
        assert path.rpartition("/")[2] not in grace.get("/v1/training_clients").text
        assert grace.get(other).json()["next_seq"] == 1


def ended(value):
    """The same path, body or message with ids that nobody has."""
    return json.loads(re.sub("-[0-9a-f]{24}", "-" + "0" * 24, json.dumps(value)))


def test_a_tenant_over_its_rate_gets_429_and_others_are_answered(tmp_path):
    params = ServeParams(rate_limit=0.5, rate_burst=3)
    with served(tmp_path, params=params, keys=two_tenants(tmp_path)) as found:
        with found.client(ADA) as ada, found.client(GRACE) as grace:
            assert [ada.get("/v1/training_clients").status_code for _ in range(3)] == [200, 200, 200]
            for _ in range(3):
                answer = ada.get("/v1/training_clients")
                error = error_of(answer, 429)
                assert error["code"] == "rate_limited"
                assert 0 < error["details"]["retry_after"] <= 2
                assert int(answer.headers["Retry-After"]) in (1, 2)
            entries = grace.get("/v1/audit_logs").json()["audit_logs"]
            assert entries == []
        entries = found.engine.audit_logs("ada")
        assert [entry["details"]["code"] for entry in entries] == ["rate_limited"]  # one for the whole streak


def test_requests_without_a_key_are_limited_by_address(tmp_path):
    params = ServeParams(rate_limit=0.01, rate_burst=5)
    with served(tmp_path, params=params, keys=two_tenants(tmp_path)) as found:
        with found.client() as http:
            statuses = [http.get("/v1/training_clients").status_code for _ in range(7)]
            assert statuses == [401] * 5 + [429] * 2
            assert http.get("/v1/health").status_code == 429
        with found.client(ADA) as http:
            assert http.get("/v1/training_clients").status_code == 200


@given(
    rate=st.floats(0.1, 100),
    burst=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=60),
)
def test_never_more_is_taken_than_the_burst_and_the_rate_over_time(rate, burst, pauses):
    now = 0.0
    limiter = Limiter(rate=rate, burst=burst, clock=lambda: now)
    taken = 0
    for pause in pauses:
        now += pause
        wait = limiter.take("ada")
        taken += not wait
        assert taken <= burst + rate * now + 1e-6
        if wait:
            assert 0 < wait <= 1 / rate
            now += wait + 1e-9
            assert limiter.take("ada") == 0
            taken += 1


def test_the_limiter_forgets_addresses_instead_of_growing():
    limiter = Limiter(rate=1, burst=1)
    for number in range(MOST_BUCKETS + 100):
        limiter.take(str(number))
    assert len(limiter._buckets) == MOST_BUCKETS
