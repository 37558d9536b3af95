import io
import json
import tarfile
import time

import httpx
import pytest
from client_http_service import ADA, BATCH, CONFIG, GRACE, MODEL, error_of, new_client, served, two_tenants

from inft.client import audit
from inft.client.errors import QueueFull, RateLimited


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with served(tmp_path_factory.mktemp("routes")) as found:
        yield found


@pytest.fixture
def http(shared):
    with shared.client() as client:
        yield client


def test_a_plain_httpx_script_trains(http):
    path = new_client(http, optimizer={"learning_rate": 0.01})
    losses = []
    for _ in range(8):
        future = http.post(f"{path}/forward_backward", json={"batch": BATCH}).json()
        http.post(f"{path}/optim_step", json={})
        losses.append(http.get(f"/v1/futures/{future['id']}/result").json()["result"]["loss"])
    assert losses[-1] < losses[0] - 0.5
    sample = http.post(f"{path}/sample", json={"prompts": ["Once", "A cat"], "max_tokens": 4, "seed": 1})
    assert sample.status_code == 200
    assert [row["prompt"] for row in sample.json()["result"]["samples"]] == ["Once", "A cat"]
    assert sample.json()["result"]["model_step"] == 8
    info = http.get(path).json()
    assert (info["step"], info["status"], info["next_seq"]) == (8, "active", 18)
    saved = http.post(f"{path}/save_state", json={"metadata": {"notes": "é"}}).json()["result"]
    loaded = http.post(f"{path}/load_state", json={"artifact_id": saved["artifact_id"]}).json()["result"]
    assert loaded == {"loaded_artifact_id": saved["artifact_id"], "step": 8}
    assert http.get(f"/v1/artifacts/{saved['artifact_id']}").json()["metadata"] == {"notes": "é"}


def test_an_operation_answers_202_at_once_and_200_when_it_is_waited_for(http):
    path = new_client(http)
    at_once = http.post(f"{path}/sample?wait=0", json={"prompts": ["a"], "max_tokens": 1})
    assert at_once.status_code == 202
    assert at_once.json()["result"] is None
    waited = http.post(f"{path}/forward_backward?wait=20", json={"batch": BATCH})
    assert waited.status_code == 200
    assert waited.json()["status"] == "completed"
    assert waited.json() == http.get(f"/v1/futures/{waited.json()['id']}").json()


def test_a_repeated_number_is_the_same_future_and_another_payload_a_conflict(http):
    path = new_client(http)
    body = {"batch": BATCH, "seq": 1}
    first = http.post(f"{path}/forward_backward?wait=20", json=body).json()
    again = http.post(f"{path}/forward_backward?wait=20", json=body)
    assert (again.status_code, again.json()) == (200, first)
    assert http.post(f"{path}/forward_backward", json=body).status_code == 202
    error = error_of(http.post(f"{path}/forward_backward", json=body | {"loss": "token_ce"}), 409)
    assert error["code"] == "conflict"
    assert error["details"]["next_seq"] == 2
    assert http.get(path).json()["next_seq"] == 2


def test_operations_that_come_out_of_order_wait_for_their_turn(http):
    path = new_client(http)
    second = http.post(f"{path}/optim_step", json={"seq": 2}).json()
    assert second["status"] == "waiting"
    assert http.get(f"/v1/futures/{second['id']}/result?wait=0.3").status_code == 202
    http.post(f"{path}/forward_backward", json={"batch": BATCH, "seq": 1})
    answer = http.get(f"/v1/futures/{second['id']}/result")
    assert answer.json()["result"]["step"] == 1


def test_a_waiting_operation_is_cancelled_and_its_result_is_409(http):
    path = new_client(http)
    future = http.post(f"{path}/optim_step", json={"seq": 2}).json()
    assert http.post(f"/v1/futures/{future['id']}/cancel").json() == {"cancelled": True}
    assert http.post(f"/v1/futures/{future['id']}/cancel").json() == {"cancelled": False}
    assert error_of(http.get(f"/v1/futures/{future['id']}/result"), 409)["code"] == "cancelled"
    assert http.get(f"/v1/futures/{future['id']}").json()["status"] == "cancelled"


def test_a_failed_operation_has_its_own_status_and_a_client_gone_nan_trains_no_more_until_load_state(http):
    path = new_client(http, loss="reinforce")
    saved = http.post(f"{path}/save_state", json={}).json()["result"]["artifact_id"]
    ids = BATCH["input_ids"]
    advantages = {"advantages": [3e38, 3e38], "input_ids": ids}
    future = http.post(f"{path}/forward_backward", json={"batch": advantages}).json()
    answer = http.get(f"/v1/futures/{future['id']}/result")
    assert error_of(answer, 422)["code"] == "not_finite"
    assert http.get(f"/v1/futures/{future['id']}").json()["status"] == "failed"
    assert http.get(path).json()["status"] == "poisoned"
    poisoned = http.post(f"{path}/forward_backward?wait=30", json={"batch": {**advantages, "advantages": [1, 1]}})
    assert error_of(poisoned, 409)["code"] == "client_poisoned"
    assert http.post(f"{path}/sample", json={"prompts": ["a"], "max_tokens": 2}).status_code == 200
    assert http.post(f"{path}/load_state", json={"artifact_id": saved}).status_code == 200
    assert http.get(path).json()["status"] == "active"


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("forward_backward", {"batch": {"input_ids": [[1, 2], [3]]}}, "row 1"),
        ("forward_backward", {"batch": {"input_ids": [[1, 2]], "labels": [[1, 2], [3, 4]]}}, "labels"),
        ("forward_backward", {"batch": {"input_ids": [[1, 99_999]]}}, "row 0, position 1 is 99999"),
        ("forward_backward", {"batch": {"input_ids": [[1, -1]]}}, "row 0, position 1 is -1"),
        ("forward_backward", {"batch": {"input_ids": []}}, "input_ids"),
        ("forward_backward", {"batch": {"prompt": ["a"], "completion": ["b"], "images": ["x"]}}, "image"),
        ("forward_backward", {"batch": BATCH, "loss": "token_cee"}, "token_ce"),
        ("forward_backward", {"batch": BATCH, "loss": "os:system"}, "os:system"),
        ("forward_backward", {"batch": BATCH, "loss_options": {"margn": 1}}, "margn"),
        ("forward_backward", {"batch": BATCH, "seq": 0}, "seq should be greater"),
        ("forward_backward", {"batch": BATCH, "seq": "1"}, "seq should be a valid integer"),
        ("forward_backward", {"batch": BATCH, "seq": 10**18}, "seq should be less"),
        ("forward_backward", {"batch": BATCH, "seq": 1_000_000}, "10000 ahead"),
        ("forward_backward", {"batch": [1]}, "batch should be a valid dictionary"),
        ("forward_backward", {}, "batch is missing"),
        ("optim_step", {"lr": 1}, "lr is not known here"),
        ("optim_step", {"learning_rate": -1}, "learning_rate should be"),
        ("optim_step", {"apply_dp_noise": "yes"}, "apply_dp_noise should be"),
        ("sample", {"prompts": "Once"}, "prompts should be a valid list"),
        ("sample", {"prompts": []}, "prompts should have at least 1 item"),
        ("sample", {"prompts": ["a"], "max_tokens": 10**6}, "max_tokens"),
        ("sample", {"prompts": ["a"], "temperature": -1}, "temperature should be"),
        ("save_state", {"metadata": {"notes": "x" * 70_000}}, "metadata has more than"),
        ("load_state", {}, "artifact_id is missing"),
    ],
)
def test_a_wrong_request_is_422_names_its_place_and_changes_nothing(shared, http, wrong_path, kind, body, words):
    error = error_of(http.post(f"{wrong_path}/{kind}", json=body), 422)
    assert error["code"] == "invalid_request"
    assert words in error["message"]
    info = http.get(wrong_path).json()
    assert (info["next_seq"], info["step"]) == (1, 0)
    entry = shared.engine.audit_logs("local", after=0, limit=10_000)[-1]
    assert (entry["action"], entry["outcome"], entry["target"]) == (kind, "refused", f"{wrong_path}/{kind}")
    assert entry["details"] == {"status": 422, "code": "invalid_request"}
    assert entry["request_id"] == error["request_id"]


@pytest.fixture(scope="module")
def wrong_path(shared):
    with shared.client() as http:
        return new_client(http)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "model_ref is missing"),
        ({"model_ref": "elsewhere/model"}, "not offered here. Offered: text"),
        ({"model_ref": "/etc"}, "not offered here"),
        ({"model_ref": MODEL, "batchsize": 3}, "batchsize is not a parameter"),
        ({"model_ref": MODEL, "lora_config": {"rank": 0}}, "rank must be at least 1"),
        ({"model_ref": MODEL, "lora_config": {"target_modules": ["nowhere"]}}, "nowhere"),
    ],
)
def test_a_wrong_configuration_is_422_with_the_remedy(http, config, words):
    assert words in error_of(http.post("/v1/training_clients", json=config), 422)["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/training_clients/tc-000000000000000000000000",
        "/v1/training_clients/tc-%00",
        "/v1/training_clients/tc-%ff%fe",
        "/v1/training_clients/..",
        "/v1/futures/..%2f..%2fclient.sqlite",
        "/v1/futures/fut-0/result",
        "/v1/artifacts/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/artifacts/..%2f..%2fclient.sqlite/content",
        "/v1/artifacts/art-..%5c..%5cx/content",
        "/v1/artifacts/%2e%2e/content",
        "/v1/artifacts/" + "a" * 5000,
        "/v1/nothing",
        "/v2/health",
        "/",
        "/docs",
        "/v1/training_clients/",
    ],
)
def test_what_is_not_there_is_404_whatever_the_path_tries(http, path):
    assert error_of(http.get(path), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/v1/training_clients", {"GET", "POST"}),
        ("GET", "/v1/training_clients/tc-0/sample", {"POST"}),
        ("GET", "/v1/futures/fut-0/cancel", {"POST"}),
        ("OPTIONS", "/v1/health", {"GET"}),
    ],
)
def test_another_method_is_405_and_says_which_is_taken(http, method, path, allow):
    answer = http.request(method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert set(answer.headers["Allow"].split(", ")) <= allow


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/audit_logs?limti=3", "'limti' is not known here: this path takes after, limit"),
        ("/v1/audit_logs?limit=0", "limit should be greater"),
        ("/v1/audit_logs?limit=1001", "limit should be less"),
        ("/v1/audit_logs?after=-1", "after should be greater"),
        ("/v1/audit_logs?after=99999999999999999999", "after should be less"),
        ("/v1/futures/fut-0/result?wait=nan", "wait should be"),
        ("/v1/futures/fut-0/result?wait=inf", "wait should be"),
        ("/v1/futures/fut-0/result?wait=-1", "wait should be"),
        ("/v1/training_clients?wait=1", "takes none"),
    ],
)
def test_a_wrong_query_is_422(http, path, words):
    assert words in error_of(http.get(path), 422)["message"]


def test_every_answer_has_a_request_id_and_the_callers_own_where_it_is_plain(http):
    assert http.get("/v1/health", headers={"X-Request-Id": "run-7.a_B"}).headers["X-Request-Id"] == "run-7.a_B"
    for given in ("", "a b", "x" * 129, "a\u00e9"):
        found = http.get("/v1/health", headers={"X-Request-Id": given.encode("latin-1")}).headers["X-Request-Id"]
        assert len(found) == 32
        assert found != given


def test_a_checkpoint_is_the_same_tar_whenever_it_is_asked_for(shared, http):
    path = new_client(http)
    artifact = http.post(f"{path}/save_state", json={}).json()["result"]["artifact_id"]
    answers = [http.get(f"/v1/artifacts/{artifact}/content") for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["Content-Type"] == "application/x-tar"
    assert int(answers[0].headers["Content-Length"]) == len(answers[0].content)
    directory = shared.engine.artifact_path("local", artifact)
    with tarfile.open(fileobj=io.BytesIO(answers[0].content)) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
        assert {(member.mtime, member.uid, member.uname) for member in archive.getmembers()} == {(0, 0, "")}
    assert found == {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_audit_log_is_paged_and_its_chain_can_be_checked_by_the_caller(http):
    new_client(http)
    entries, after = [], 0
    while page := http.get(f"/v1/audit_logs?after={after}&limit=7").json()["audit_logs"]:
        entries += page
        after = page[-1]["number"]
    assert [entry["number"] for entry in entries] == list(range(1, len(entries) + 1))
    previous = audit.FIRST
    for entry in entries:
        plain = {name: value for name, value in entry.items() if name not in ("previous", "hash")}
        assert entry["previous"] == previous
        previous = audit.entry_hash(previous, plain)
        assert entry["hash"] == previous


def test_no_key_and_no_contents_are_in_the_audit_log_or_the_answers(tmp_path):
    with served(tmp_path, keys=two_tenants(tmp_path)) as found, found.client(ADA) as http:
        path = new_client(http)
        http.post(f"{path}/forward_backward?wait=20", json={"batch": {"prompt": "sEcReT1", "completion": "sEcReT2"}})
        refused = http.post(f"{path}/sample", json={"prompts": 5, "sEcReT3": "sEcReT4"})
        texts = http.get("/v1/audit_logs").text + json.dumps(found.engine.audit_logs("ada"))
        assert "sEcReT" not in texts
        assert "sEcReT4" not in refused.text
        assert ADA not in texts + refused.text
        database = (tmp_path / "state" / "client.sqlite").read_bytes()
        assert ADA.encode() not in database


def test_a_full_queue_is_503_for_all_and_429_for_one_tenant_with_a_time_to_retry(tmp_path):
    with (
        served(tmp_path, keys=two_tenants(tmp_path), max_pending=3, max_pending_per_tenant=2) as found,
        found.client(ADA) as ada,
        found.client(GRACE) as grace,
    ):
        first, second = new_client(ada), new_client(grace)
        for seq in (5, 6):  # they wait for the numbers before them
            assert ada.post(f"{first}/optim_step", json={"seq": seq}).status_code == 202
        answer = ada.post(f"{first}/optim_step", json={"seq": 7})
        assert error_of(answer, 429)["code"] == RateLimited.code
        assert int(answer.headers["Retry-After"]) >= 1
        assert grace.post(f"{second}/optim_step", json={"seq": 5}).status_code == 202
        answer = grace.post(f"{second}/optim_step", json={"seq": 6})
        assert error_of(answer, 503)["code"] == QueueFull.code
        assert int(answer.headers["Retry-After"]) >= 1


def test_two_tenants_at_once_train_each_their_own(tmp_path):
    with (
        served(tmp_path, keys=two_tenants(tmp_path)) as found,
        found.client(ADA) as ada,
        found.client(GRACE) as grace,
    ):
        paths = {http: new_client(http, optimizer={"learning_rate": 0.01}) for http in (ada, grace)}
        futures = {ada: [], grace: []}
        for _ in range(4):
            for http, ids in ((ada, [[1, 2, 3]]), (grace, [[9, 8, 7]])):
                body = {"batch": {"input_ids": ids}}
                futures[http].append(http.post(f"{paths[http]}/forward_backward", json=body).json()["id"])
                http.post(f"{paths[http]}/optim_step", json={})
        for http in (ada, grace):
            losses = [http.get(f"/v1/futures/{name}/result").json()["result"]["loss"] for name in futures[http]]
            assert losses == sorted(losses, reverse=True)
            assert http.get(paths[http]).json()["next_seq"] == 9
        assert [client["id"] for client in ada.get("/v1/training_clients").json()["training_clients"]] == [
            paths[ada].rpartition("/")[2]
        ]


def test_a_long_poll_answers_as_soon_as_the_operation_has_finished(http):
    path = new_client(http)
    http.post(f"{path}/forward_backward?wait=20", json={"batch": BATCH})
    begun = time.monotonic()
    for _ in range(10):
        http.post(f"{path}/sample?wait=20", json={"prompts": ["a"], "max_tokens": 1, "temperature": 0})
    assert time.monotonic() - begun < 2  # the original's futures were asked once a second


def test_a_fault_of_the_service_is_500_without_its_text(tmp_path, caplog):
    with served(tmp_path) as found, found.client() as http:
        found.service.engine = Broken()
        error = error_of(http.get("/v1/training_clients"), 500)
        assert error["code"] == "internal_error"
        assert "inner words" not in json.dumps(error)
        assert error["request_id"] in caplog.text
        assert "inner words" in caplog.text


class Broken:
    def list_clients(self, tenant):
        raise RuntimeError("inner words")


def test_the_configuration_that_was_sent_is_the_one_that_is_shown(http):
    shown = http.get(new_client(http)).json()["config"]
    for name, value in CONFIG.items():
        assert shown[name] == value or value.items() <= shown[name].items()


def test_a_request_in_http_1_0_is_answered(shared):
    import socket

    host, port = httpx.URL(shared.url).host, httpx.URL(shared.url).port
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(b"GET /v1/health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
