"""The engine: order, repeats, tenants, limits, cancelling, poison, and what is there after it was opened again."""

import math
import shutil
import sqlite3
import threading
import time

import pytest
import torch
from client_engine_help import CONFIG, SECONDS, TENANT, batch, forward, open_engine, result, run, train

from inft.client.errors import (
    ClientError,
    Closed,
    Conflict,
    InternalError,
    InvalidRequest,
    NotFound,
    QueueFull,
    RateLimited,
)
from inft.client.losses.inputs import LossOutput
from inft.client.store import Store
from params.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine(tmp_path):
    with open_engine(tmp_path / "state") as opened:
        yield opened


@pytest.fixture
def client(engine):
    return engine.create_client(TENANT, CONFIG)["id"]


@pytest.fixture
def gate():
    """A loss that waits: what is behind it in line stays there until the gate is opened."""
    event = threading.Event()

    def waits(inputs):
        assert event.wait(SECONDS)
        return LossOutput(loss=inputs.logits_BTV.float().mean())

    yield waits, event
    event.set()


def test_a_client_trains_and_tells_its_step(engine, client):
    losses = [result(engine, client, "forward_backward", forward())["loss"] for _ in range(1)]
    for _ in range(8):
        result(engine, client, "optim_step", {})
        losses.append(result(engine, client, "forward_backward", forward())["loss"])
    assert losses[-1] < losses[0] - 0.5
    assert engine.get_client(TENANT, client)["step"] == 8


def test_operations_that_arrive_out_of_order_run_in_order(engine, client):
    late = engine.submit(TENANT, client, "optim_step", {}, seq=2)
    assert (late["status"], late["waits_for"]) == ("waiting", 1)
    assert engine.wait(TENANT, late["id"], 0.05)["status"] == "waiting"
    first = engine.submit(TENANT, client, "forward_backward", forward(), seq=1)
    assert engine.wait(TENANT, late["id"], SECONDS)["result"]["step"] == 1
    assert engine.future(TENANT, first["id"])["status"] == "completed"


def test_a_repeated_number_gives_the_same_answer_and_trains_once(engine, client):
    one = run(engine, client, "forward_backward", forward(), seq=1)
    two = run(engine, client, "forward_backward", forward(), seq=1)
    assert one == two
    assert result(engine, client, "optim_step", {}, seq=2)["step"] == 1
    assert result(engine, client, "optim_step", {}, seq=2)["step"] == 1
    assert engine.get_client(TENANT, client)["step"] == 1


def test_a_number_with_other_contents_is_a_conflict_that_names_the_next(engine, client):
    run(engine, client, "forward_backward", forward(0), seq=1)
    with pytest.raises(Conflict, match="other contents") as caught:
        engine.submit(TENANT, client, "forward_backward", forward(1), seq=1)
    assert caught.value.details["next_seq"] == 2
    with pytest.raises(Conflict):
        engine.submit(TENANT, client, "optim_step", {}, seq=1)


def test_a_refused_payload_does_not_use_up_its_number(engine, client):
    ragged = {"batch": {"input_ids": [[5, 6, 7], [5, 6]]}}
    with pytest.raises(UserError, match="row 1"):
        engine.submit(TENANT, client, "forward_backward", ragged, seq=1)
    assert engine.get_client(TENANT, client)["next_seq"] == 1
    assert run(engine, client, "forward_backward", forward(), seq=1)["status"] == "completed"


@pytest.mark.parametrize(
    ("kind", "payload", "told"),
    [
        ("train", {}, "no operation 'train'"),
        ("forward_backward", {}, "needs batch"),
        ("forward_backward", {"batch": [1]}, "batch is of type list"),
        ("forward_backward", {"batch": {"input_ids": [[5000, 6]]}}, "outside the vocabulary"),
        ("forward_backward", {"batch": {"input_ids": [[5, 6]]}, "loss": "token_cee"}, "did you mean"),
        ("forward_backward", {"batch": {"input_ids": [[5, 6]]}, "extra": 1}, "no field 'extra'"),
        ("forward_backward", {"batch": {"input_ids": [[5, float("nan")]]}}, "not plain JSON"),
        ("optim_step", {"apply_dp_noise": 1}, "apply_dp_noise"),
        ("optim_step", {"learning_rate": -1.0}, "learning_rate"),
        ("sample", {"prompts": []}, "prompts"),
        ("save_state", {"metadata": {"a": "x" * 70_000}}, "metadata"),
        ("load_state", {"artifact_id": "../../etc/passwd"}, "no artifact"),
        ("load_state", {}, "needs artifact_id"),
    ],
)
def test_bad_payloads_are_refused_with_the_field(engine, client, kind, payload, told):
    with pytest.raises(UserError, match=told):
        engine.submit(TENANT, client, kind, payload)


@pytest.mark.parametrize("seq", [0, -1, 10**6, 2**80, True])
def test_a_number_out_of_range_is_refused(engine, client, seq):
    with pytest.raises(ClientError, match=r"seq is"):
        engine.submit(TENANT, client, "optim_step", {}, seq=seq)


def test_what_belongs_to_another_tenant_does_not_exist(engine, client):
    saved = result(engine, client, "save_state", {})
    future = engine.submit(TENANT, client, "sample", {"prompts": ["a"], "max_tokens": 1})
    own = engine.create_client("other", CONFIG)["id"]
    for foreign in (
        lambda: engine.get_client("other", client),
        lambda: engine.submit("other", client, "optim_step", {}),
        lambda: engine.future("other", future["id"]),
        lambda: engine.wait("other", future["id"], 0.01),
        lambda: engine.cancel("other", future["id"]),
        lambda: engine.artifact("other", saved["artifact_id"]),
        lambda: engine.artifact_path("other", saved["artifact_id"]),
        lambda: engine.submit("other", own, "load_state", {"artifact_id": saved["artifact_id"]}),
    ):
        with pytest.raises(NotFound):
            foreign()
    assert [info["id"] for info in engine.list_clients("other")] == [own]
    assert all(entry["target"] != client for entry in engine.audit_logs("other"))


def test_two_tenants_train_apart_on_one_base(engine, client, tmp_path):
    other = engine.create_client("other", CONFIG | {"seed": 8})["id"]
    mixed = []
    for number in range(3):
        mixed += train(engine, client, 1, first=number)
        train(engine, other, 1, first=number + 10, tenant="other")
    with open_engine(tmp_path / "alone") as alone:
        assert train(alone, alone.create_client(TENANT, CONFIG)["id"], 3) == mixed


def test_an_operation_that_has_not_begun_can_be_cancelled(engine, client, gate):
    waits, event = gate
    running = engine.submit(TENANT, client, "forward_backward", forward(), loss=waits)
    while engine.future(TENANT, running["id"])["status"] != "running":
        time.sleep(0.001)
    queued = engine.submit(TENANT, client, "forward_backward", forward(1))
    step = engine.submit(TENANT, client, "optim_step", {})
    assert engine.cancel(TENANT, queued["id"])
    assert not engine.cancel(TENANT, queued["id"])
    ended = engine.wait(TENANT, queued["id"], SECONDS)
    assert (ended["status"], ended["error"]["code"]) == ("cancelled", "cancelled")
    event.set()
    assert engine.wait(TENANT, step["id"], SECONDS)["result"]["step"] == 1
    assert not engine.cancel(TENANT, running["id"])


def test_a_cancelled_number_is_passed_after_the_engine_was_opened_again(tmp_path):
    with open_engine(tmp_path) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        ahead = engine.submit(TENANT, client, "optim_step", {}, seq=2)
        assert engine.cancel(TENANT, ahead["id"])
    with open_engine(tmp_path) as engine:
        run(engine, client, "forward_backward", forward(), seq=1)
        assert result(engine, client, "optim_step", {}, seq=3)["step"] == 1


def test_a_step_that_is_not_finite_poisons_until_a_checkpoint_is_loaded(engine, client):
    train(engine, client, 1)
    saved = result(engine, client, "save_state", {})
    losses = train(engine, client, 1, first=1)

    def broken(inputs):
        return LossOutput(loss=inputs.logits_BTV.float().mean() * math.nan)

    assert run(engine, client, "forward_backward", forward(), loss=broken)["error"]["code"] == "not_finite"
    assert engine.get_client(TENANT, client)["status"] == "poisoned"
    refused = run(engine, client, "optim_step", {})
    assert refused["error"]["code"] == "client_poisoned"
    assert "load_state" in refused["error"]["message"]
    assert result(engine, client, "load_state", {"artifact_id": saved["artifact_id"]})["step"] == 1
    assert engine.get_client(TENANT, client)["status"] == "active"
    assert train(engine, client, 1, first=1) == losses


def test_a_poisoned_client_leaves_others_alone(engine, client):
    other = engine.create_client(TENANT, CONFIG)["id"]
    train(engine, other, 1)

    def broken(inputs):
        return LossOutput(loss=inputs.logits_BTV.float().sum() * math.inf)

    assert run(engine, client, "forward_backward", forward(), loss=broken)["status"] == "failed"
    assert len(train(engine, other, 1, first=1)) == 1
    assert engine.get_client(TENANT, other)["status"] == "active"


def test_limits_of_waiting_operations(tmp_path, gate):
    waits, _ = gate
    with open_engine(tmp_path, max_pending=3, max_pending_per_tenant=2) as engine:
        one, two = engine.create_client(TENANT, CONFIG)["id"], engine.create_client("other", CONFIG)["id"]
        engine.submit(TENANT, one, "forward_backward", forward(), loss=waits)
        engine.submit(TENANT, one, "optim_step", {})
        with pytest.raises(RateLimited) as caught:
            engine.submit(TENANT, one, "optim_step", {})
        assert caught.value.details["retry_after"] > 0
        engine.submit("other", two, "forward_backward", forward())
        with pytest.raises(QueueFull):
            engine.submit("other", two, "optim_step", {})
        gate[1].set()


def test_a_directory_serves_one_engine_at_a_time(engine):
    with pytest.raises(UserError, match="another process is running training clients in"):
        open_engine(engine.directory)


def test_after_closing_nothing_is_accepted(tmp_path):
    engine = open_engine(tmp_path)
    client = engine.create_client(TENANT, CONFIG)["id"]
    engine.close()
    engine.close()
    with pytest.raises(Closed):
        engine.submit(TENANT, client, "optim_step", {})
    with pytest.raises(Closed):
        engine.create_client(TENANT, CONFIG)


def test_what_was_accepted_before_closing_runs_when_it_is_opened_again(tmp_path, gate):
    waits, event = gate
    engine = open_engine(tmp_path)
    client = engine.create_client(TENANT, CONFIG)["id"]
    first = engine.submit(TENANT, client, "forward_backward", forward(), loss=waits)
    step = engine.submit(TENANT, client, "optim_step", {})
    while engine.future(TENANT, first["id"])["status"] != "running":
        time.sleep(0.001)
    closing = threading.Thread(target=engine.close)
    closing.start()
    event.set()
    closing.join(SECONDS)
    with open_engine(tmp_path) as engine:
        assert engine.wait(TENANT, step["id"], SECONDS)["result"]["step"] == 1


@pytest.mark.parametrize("snapshot_steps", [1, 2, 100])
def test_a_copy_of_the_directory_at_any_moment_goes_on_bit_equal(tmp_path, snapshot_steps):
    with open_engine(tmp_path / "whole", snapshot_steps=snapshot_steps) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, 3)
        result(engine, client, "forward_backward", forward(3))
        crashed = tmp_path / "crashed"  # what a killed process leaves: no snapshot at the end
        shutil.copytree(tmp_path / "whole", crashed)
        result(engine, client, "optim_step", {})
        expected = train(engine, client, 2, first=4)
    with open_engine(crashed, snapshot_steps=snapshot_steps) as engine:
        assert result(engine, client, "optim_step", {})["step"] == 4
        assert train(engine, client, 2, first=4) == expected
    with open_engine(tmp_path / "whole") as engine:
        assert engine.get_client(TENANT, client)["step"] == 6
        assert len(engine.audit_logs(TENANT)) == 1 + 2 * 12


def test_snapshots_spare_the_log_and_leave_one_directory(tmp_path):
    with open_engine(tmp_path, snapshot_steps=2) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, 5)
        rows = engine._store.operations(client, after=0)
        assert [row.seq for row in rows if row.payload is not None] == [9, 10]
        assert len(list((tmp_path / "snapshots").iterdir())) == 1
        again = engine.submit(TENANT, client, "forward_backward", forward(0), seq=1)
        assert again["status"] == "completed"  # known by its hash, although its payload is gone


def test_more_clients_than_fit_are_put_away_and_brought_back(tmp_path):
    with open_engine(tmp_path / "roomy") as engine:
        clients = [engine.create_client(TENANT, CONFIG | {"seed": seed})["id"] for seed in range(3)]
        expected = [[train(engine, client, 1, first=n) for client in clients] for n in range(2)]
    with open_engine(tmp_path / "narrow", max_resident_clients=1) as engine:
        clients = [engine.create_client(TENANT, CONFIG | {"seed": seed})["id"] for seed in range(3)]
        found = [[train(engine, client, 1, first=n) for client in clients] for n in range(2)]
        assert engine.health()["resident_clients"] == 1
    assert found == expected


def test_a_loss_of_the_process_is_not_run_again_and_what_it_did_is_kept(tmp_path):
    def own(inputs):
        return LossOutput(loss=inputs.logits_BTV.float().square().mean(), denominator=1)

    with open_engine(tmp_path / "whole") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        result(engine, client, "forward_backward", forward(), loss=own)
        shutil.copytree(tmp_path / "whole", tmp_path / "crashed")
        norm = result(engine, client, "optim_step", {})["grad_norm"]
    with open_engine(tmp_path / "crashed") as engine:
        assert result(engine, client, "optim_step", {})["grad_norm"] == norm


def test_a_loss_of_a_process_that_has_ended_fails_its_operation_and_no_other(tmp_path, gate):
    waits, event = gate
    with open_engine(tmp_path / "whole") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        own = engine.submit(TENANT, client, "forward_backward", forward(), loss=waits)
        named = engine.submit(TENANT, client, "forward_backward", forward())
        shutil.copytree(tmp_path / "whole", tmp_path / "crashed")
        event.set()
    with open_engine(tmp_path / "crashed") as engine:
        lost = engine.wait(TENANT, own["id"], SECONDS)
        assert "process that has ended" in lost["error"]["message"]
        assert engine.wait(TENANT, named["id"], SECONDS)["result"]["accumulated"] == 1


def test_a_checkpoint_opens_in_another_client_and_goes_on_bit_equal(engine, client):
    train(engine, client, 2)
    saved = result(engine, client, "save_state", {"metadata": {"notes": "epoch 1"}})
    expected = train(engine, client, 2, first=2)
    other = engine.create_client(TENANT, CONFIG | {"seed": 99})["id"]
    loaded = result(engine, other, "load_state", {"artifact_id": saved["artifact_id"]})
    assert loaded == {"loaded_artifact_id": saved["artifact_id"], "step": 2}
    assert train(engine, other, 2, first=2) == expected
    info = engine.artifact(TENANT, saved["artifact_id"])
    assert (info["step"], info["metadata"], info["client_id"]) == (2, {"notes": "epoch 1"}, client)
    assert info["content_hash"] == saved["content_hash"]


def test_a_deleted_client_is_gone_with_its_log_and_its_checkpoints_stay(tmp_path):
    with open_engine(tmp_path, snapshot_steps=1, max_clients_per_tenant=2) as engine:
        client, other = (engine.create_client(TENANT, CONFIG)["id"] for _ in range(2))
        train(engine, client, 2)
        future = run(engine, client, "forward_backward", forward(9))
        saved = result(engine, client, "save_state", {})
        with pytest.raises(Conflict, match="delete some"):
            engine.create_client(TENANT, CONFIG)
        engine.delete_client(TENANT, client)
        for gone in (
            lambda: engine.get_client(TENANT, client),
            lambda: engine.submit(TENANT, client, "optim_step", {}),
            lambda: engine.future(TENANT, future["id"]),
            lambda: engine.delete_client(TENANT, client),
        ):
            with pytest.raises(NotFound):
                gone()
        assert list((tmp_path / "snapshots").iterdir()) == []
        fresh = engine.create_client(TENANT, CONFIG)["id"]
        assert result(engine, fresh, "load_state", {"artifact_id": saved["artifact_id"]})["step"] == 2
        with pytest.raises(NotFound):
            engine.delete_client("other", other)
    with open_engine(tmp_path) as engine:
        assert {info["id"] for info in engine.list_clients(TENANT)} == {other, fresh}


def test_a_client_with_open_operations_is_not_deleted(engine, client):
    engine.submit(TENANT, client, "optim_step", {}, seq=2)
    with pytest.raises(Conflict, match="have not ended"):
        engine.delete_client(TENANT, client)


def test_a_repeated_request_makes_one_client(engine):
    one = engine.create_client(TENANT, CONFIG, request_id="r1")
    assert engine.create_client(TENANT, CONFIG, request_id="r1") == one
    assert engine.create_client("other", CONFIG, request_id="r1")["id"] != one["id"]
    assert engine.create_client(TENANT, CONFIG, request_id="r2")["id"] != one["id"]
    with pytest.raises(Conflict, match="another configuration"):
        engine.create_client(TENANT, CONFIG | {"batch_size": 3}, request_id="r1")
    unseeded = {name: value for name, value in CONFIG.items() if name != "seed"}
    assert (
        engine.create_client(TENANT, unseeded, request_id="r3")["id"]
        == engine.create_client(TENANT, unseeded, request_id="r3")["id"]
    )


def test_two_threads_on_one_client_lose_nothing(engine, client):
    def submits(numbers):
        for number in numbers:
            engine.submit(TENANT, client, "forward_backward", forward(number), seq=number)

    threads = [threading.Thread(target=submits, args=(range(start, 21, 2),)) for start in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert result(engine, client, "optim_step", {}, seq=21)["step"] == 1
    assert [row.seq for row in engine._store.operations(client, after=0)] == list(range(1, 22))


def test_a_batch_is_not_kept_by_reference(engine, client, gate):
    waits, event = gate
    engine.submit(TENANT, client, "forward_backward", forward(), loss=waits)
    rows = batch(1)
    queued = engine.submit(TENANT, client, "forward_backward", {"batch": rows, "loss": "cross_entropy"})
    rows["input_ids"][0][0] = 10**9
    event.set()
    assert engine.wait(TENANT, queued["id"], SECONDS)["status"] == "completed"


def test_an_unknown_model_is_refused_before_a_client_exists(engine, tmp_path):
    with pytest.raises(UserError):
        engine.create_client(TENANT, CONFIG | {"model_ref": str(tmp_path / "nothing")})
    assert engine.list_clients(TENANT) == []


def test_a_service_offers_the_models_it_names_alone(tmp_path):
    with open_engine(tmp_path, models={"small": "embedded/text"}, any_model=False) as engine:
        assert engine.load_models() == ["small"]
        with pytest.raises(InvalidRequest, match="small"):
            engine.create_client(TENANT, CONFIG)
        assert engine.create_client(TENANT, CONFIG | {"model_ref": "small"})["config"]["model_ref"] == "small"


def test_a_log_that_cannot_be_written_any_more_stops_the_engine_and_leaves_nobody_waiting(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise sqlite3.DatabaseError("database disk image is malformed")

    with open_engine(tmp_path) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        with monkeypatch.context() as patched:
            patched.setattr(Store, "finish", broken)
            future = engine.submit(TENANT, client, "forward_backward", forward())
            behind = engine.submit(TENANT, client, "optim_step", {})
            with pytest.raises(InternalError, match="malformed"):
                engine.wait(TENANT, behind["id"], SECONDS)
        assert engine.health()["status"] == "failed"
        with pytest.raises(InternalError, match="start it again"):
            engine.submit(TENANT, client, "optim_step", {})
        with pytest.raises(ClientError):
            engine.create_client(TENANT, CONFIG)
    with open_engine(tmp_path) as engine:
        assert engine.wait(TENANT, behind["id"], SECONDS)["result"]["step"] == 1
        assert engine.future(TENANT, future["id"])["status"] == "completed"


@pytest.mark.parametrize("rate", [1e300, 1e31])
def test_a_learning_rate_that_would_overflow_is_refused(engine, client, rate):
    with pytest.raises(InvalidRequest, match="learning_rate"):
        engine.submit(TENANT, client, "optim_step", {"learning_rate": rate})
    with pytest.raises(UserError, match="learning_rate"):
        engine.create_client(TENANT, CONFIG | {"optimizer": {"learning_rate": rate}})
