"""The engine opened again: after closing, after a crash, with what it needs gone, and with a full disk."""

import errno
import shutil
import sqlite3
import threading
import time

import pytest
from client_engine_help import CONFIG, SECONDS, TENANT, forward, open_engine, result, run, train

from inft.client.errors import (
    ClientError,
    ClientUnavailable,
    Closed,
    InternalError,
    InvalidRequest,
)
from inft.client.losses import registry
from inft.client.losses.inputs import LossOutput
from inft.client.running import Running
from inft.client.store import Store
from params.errors import UserError


def test_a_cancelled_number_is_passed_after_the_engine_was_opened_again(tmp_path):
    with open_engine(tmp_path) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        ahead = engine.submit(TENANT, client, "optim_step", {}, seq=2)
        assert engine.cancel(TENANT, ahead["id"])
    with open_engine(tmp_path) as engine:
        run(engine, client, "forward_backward", forward(), seq=1)
        assert result(engine, client, "optim_step", {}, seq=3)["step"] == 1


def test_a_directory_serves_one_engine_at_a_time(tmp_path):
    with (
        open_engine(tmp_path),
        pytest.raises(UserError, match="another process is running training clients in"),
    ):
        open_engine(tmp_path)


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


def test_a_client_whose_model_is_not_there_waits_and_goes_on_when_it_is(tmp_path):
    here = {"models": {"m": "embedded/text"}, "any_model": False}
    config = CONFIG | {"model_ref": "m"}
    with open_engine(tmp_path / "whole", **here) as engine:
        client = engine.create_client(TENANT, config)["id"]
        expected = train(engine, client, 2)
    with open_engine(tmp_path / "state", **here) as engine:
        client = engine.create_client(TENANT, config)["id"]
        assert train(engine, client, 1) == expected[:1]
        engine.submit(TENANT, client, "optim_step", {}, seq=4)
        shutil.copytree(tmp_path / "state", tmp_path / "crashed")
        engine.submit(TENANT, client, "forward_backward", forward(1), seq=3)
    rows = sqlite3.connect(tmp_path / "crashed" / "client.sqlite")
    [(step,)] = rows.execute("SELECT id FROM operations WHERE seq = 4").fetchall()
    rows.close()
    with open_engine(tmp_path / "crashed", any_model=False) as engine:
        with pytest.raises(InvalidRequest, match="not offered"):
            engine.submit(TENANT, client, "forward_backward", forward(1), seq=3)
        assert engine.future(TENANT, step)["status"] == "waiting"
    with open_engine(tmp_path / "crashed", **here) as engine:
        assert result(engine, client, "forward_backward", forward(1), seq=3)["loss"] == expected[1]
        assert engine.wait(TENANT, step, SECONDS)["result"]["step"] == 2


def test_operations_of_a_client_that_cannot_be_brought_back_are_kept_and_tried_again(tmp_path):
    def own(inputs):
        return LossOutput(loss=inputs.logits_BTV.float().square().mean(), denominator=1)

    name = "kept_until_it_is_registered"
    registry._registered[name] = own
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        result(engine, client, "forward_backward", forward(loss=name))
        shutil.copytree(tmp_path / "state", tmp_path / "crashed")
    del registry._registered[name]
    with open_engine(tmp_path / "crashed") as engine:
        step = engine.submit(TENANT, client, "optim_step", {})
        with pytest.raises(ClientUnavailable, match=name):
            engine.wait(TENANT, step["id"], SECONDS)
        other = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, other, 1)  # which others do not notice
        registry._registered[name] = own
        assert result(engine, client, "sample", {"prompts": ["a"], "max_tokens": 1})["model_step"] == 1
        assert engine.wait(TENANT, step["id"], SECONDS)["result"]["step"] == 1
    del registry._registered[name]


def test_a_client_that_cannot_be_put_away_does_not_fail_anothers_operation(tmp_path, monkeypatch):
    with open_engine(tmp_path, max_resident_clients=1) as engine:
        one = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, one, 1)
        with monkeypatch.context() as patched:
            patched.setattr("inft.client.residents.write_checkpoint", disk_full)
            other = engine.create_client("other", CONFIG)["id"]
            assert len(train(engine, other, 1, tenant="other")) == 1
        assert len(train(engine, one, 1, first=1)) == 1


def disk_full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_step_that_could_not_be_stored_has_not_been_taken(tmp_path, monkeypatch):
    private = {"dp_config": {"dataset_size": 10, "noise_multiplier": 1.0, "target_delta": 1e-2}, "batch_size": 2}
    with open_engine(tmp_path) as engine:
        client = engine.create_client(TENANT, CONFIG | private)["id"]
        train(engine, client, 1)
        before = engine.get_client(TENANT, client)
        result(engine, client, "forward_backward", forward(1))
        with monkeypatch.context() as patched:
            patched.setattr("inft.client.residents.write_checkpoint", disk_full)
            failed = run(engine, client, "optim_step", {})
        assert failed["error"]["code"] == "storage_full"
        assert str(tmp_path) not in failed["error"]["message"]
        after = engine.get_client(TENANT, client)
        assert (after["step"], after["dp_metrics"]) == (before["step"], before["dp_metrics"])
        again = result(engine, client, "optim_step", {})
        assert (again["step"], again["dp_metrics"]["steps"]) == (2, 2)


def test_forward_backwards_without_a_step_are_snapshotted_too(tmp_path):
    with open_engine(tmp_path, snapshot_steps=1) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        for number in range(9):
            result(engine, client, "forward_backward", forward(number))
        assert engine._store.client(client).snapshot_seq == 8


def test_what_ran_elsewhere_is_not_run_again_here_with_other_results(tmp_path):
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, 1)
        shutil.copytree(tmp_path / "state", tmp_path / "crashed")
    with open_engine(tmp_path / "crashed", dtype="bfloat16") as engine:
        step = engine.submit(TENANT, client, "sample", {"prompts": ["a"], "max_tokens": 1})
        with pytest.raises(ClientUnavailable, match="cpu, float32"):
            engine.wait(TENANT, step["id"], SECONDS)
    with open_engine(tmp_path / "crashed") as engine:
        assert engine.wait(TENANT, step["id"], SECONDS)["status"] == "completed"


def test_a_stray_file_does_not_stop_the_start(tmp_path):
    with open_engine(tmp_path):
        pass
    (tmp_path / "snapshots" / ".DS_Store").write_text("x")
    (tmp_path / "artifacts" / "art-0123456789abcdef01234567").mkdir()
    with open_engine(tmp_path):
        pass
    assert list((tmp_path / "artifacts").iterdir()) == list((tmp_path / "snapshots").iterdir()) == []


@pytest.mark.parametrize("ends", [1, 4, 5])
def test_an_operation_that_ends_the_process_again_and_again_is_given_up_and_the_others_run(tmp_path, ends):
    with open_engine(tmp_path) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        last = engine.submit(TENANT, client, "forward_backward", forward(1), seq=2)  # waits for the first
    store = sqlite3.connect(tmp_path / "client.sqlite")
    store.execute("UPDATE clients SET next_run = 2")  # as if the first had been: now it is what runs at a start
    store.commit()
    store.close()
    for _ in range(ends):
        (tmp_path / "running").write_text(last["id"].ljust(64))  # what a process leaves that ends while it runs
        store = Store(tmp_path, durable=False)
        running = Running(tmp_path)
        store.count_attempt(running.left_over())
        running.set(None)
        running.close()
        store.close()
    with open_engine(tmp_path) as engine:
        ended = engine.wait(TENANT, last["id"], SECONDS)
        assert ended["status"] == ("failed" if ends == 5 else "completed")
        assert ends < 5 or "ended 5 times" in ended["error"]["message"]
        assert result(engine, client, "forward_backward", forward())["loss"] > 0


def test_a_start_tells_which_operation_the_process_before_it_ended_in(tmp_path, gate):
    waits, event = gate
    with open_engine(tmp_path / "whole") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        future = engine.submit(TENANT, client, "forward_backward", forward(), loss=waits)
        while engine.future(TENANT, future["id"])["status"] != "running":
            time.sleep(0.001)
        shutil.copytree(tmp_path / "whole", tmp_path / "crashed")
        event.set()
        engine.wait(TENANT, future["id"], SECONDS)
    with open_engine(tmp_path / "crashed") as engine:
        assert engine._store.operation(future["id"]).attempts == 1
    with open_engine(tmp_path / "whole") as engine:
        assert engine._store.operation(future["id"]).attempts == 0
