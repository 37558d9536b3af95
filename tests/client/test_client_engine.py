"""The engine: order, repeats, tenants, limits, cancelling, poison, and what is there after it was opened again."""

import math
import threading
import time

import pytest
from client_engine_help import CONFIG, SECONDS, TENANT, batch, forward, open_engine, result, run, train

from inft.client.engine import Engine
from inft.client.errors import (
    ClientError,
    Conflict,
    InvalidRequest,
    NotFound,
    QueueFull,
    RateLimited,
)
from inft.client.losses.inputs import LossOutput
from params.client import EngineParams
from params.errors import UserError


@pytest.fixture
def engine(tmp_path):
    with open_engine(tmp_path / "state") as opened:
        yield opened


@pytest.fixture
def client(engine):
    return engine.create_client(TENANT, CONFIG)["id"]


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
        assert engine.health()["models"] == ["small"]
        with pytest.raises(InvalidRequest, match="small"):
            engine.create_client(TENANT, CONFIG)
        assert engine.create_client(TENANT, CONFIG | {"model_ref": "small"})["config"]["model_ref"] == "small"


@pytest.mark.parametrize("rate", [1e300, 1e31])
def test_a_learning_rate_that_would_overflow_is_refused(engine, client, rate):
    with pytest.raises(InvalidRequest, match="learning_rate"):
        engine.submit(TENANT, client, "optim_step", {"learning_rate": rate})
    with pytest.raises(UserError, match="learning_rate"):
        engine.create_client(TENANT, CONFIG | {"optimizer": {"learning_rate": rate}})


def test_a_poisoned_client_whose_checkpoint_could_not_be_loaded_stays_poisoned(engine, client):
    saved = result(engine, client, "save_state", {})
    heavy = {"loss": "cross_entropy", "batch": batch() | {"weights": [3e38, 3e38]}}
    assert run(engine, client, "forward_backward", heavy)["error"]["code"] == "not_finite"
    (engine.artifact_path(TENANT, saved["artifact_id"]) / "state.json").write_text("{}")
    failed = run(engine, client, "load_state", {"artifact_id": saved["artifact_id"]})
    assert saved["artifact_id"] in failed["error"]["message"]
    assert str(engine.directory) not in failed["error"]["message"]
    assert engine.get_client(TENANT, client)["status"] == "poisoned"


def test_a_poisoned_client_still_gives_its_weights(engine, client):
    train(engine, client, 1)
    heavy = {"loss": "cross_entropy", "batch": batch() | {"weights": [3e38, 3e38]}}
    assert run(engine, client, "forward_backward", heavy)["error"]["code"] == "not_finite"
    saved = result(engine, client, "save_state", {})
    assert saved["step"] == 1
    assert result(engine, client, "load_state", {"artifact_id": saved["artifact_id"]})["step"] == 1
    assert len(train(engine, client, 1, first=1)) == 1


@pytest.mark.parametrize("problem", [SystemExit("gone"), ValueError("half a pair \ud800"), KeyError("x")])
def test_whatever_a_loss_raises_is_its_operations_failure_alone(engine, client, problem):
    def own(inputs):
        raise problem

    failed = run(engine, client, "forward_backward", forward(), loss=own)
    assert failed["status"] == "failed"
    assert len(train(engine, client, 1)) == 1


def test_a_private_step_after_a_refused_batch_does_not_spend_the_budget_on_noise_alone(engine):
    private = {"dp_config": {"dataset_size": 10, "noise_multiplier": 1.0, "target_delta": 1e-2}, "batch_size": 2}
    client = engine.create_client(TENANT, CONFIG | private)["id"]
    unlabelled = {"batch": batch() | {"labels": [[-100] * 8] * 2}}
    failed = engine.submit(TENANT, client, "forward_backward", unlabelled)
    step = engine.submit(TENANT, client, "optim_step", {})  # as the guide's loop does, without waiting
    assert engine.wait(TENANT, failed["id"], SECONDS)["status"] == "failed"
    refused = engine.wait(TENANT, step["id"], SECONDS)
    assert "without them" in refused["error"]["message"]
    assert engine.get_client(TENANT, client)["dp_metrics"]["steps"] == 0
    assert result(engine, client, "optim_step", {})["dp_metrics"]["steps"] == 1  # now an empty draw is meant


def test_two_functions_under_one_number_are_a_conflict(engine, client):
    losses = [lambda inputs, scale=scale: LossOutput(loss=inputs.logits_BTV.mean() * scale) for scale in (1, 2)]
    run(engine, client, "forward_backward", forward(), seq=1, loss=losses[0])
    assert run(engine, client, "forward_backward", forward(), seq=1, loss=losses[0])["status"] == "completed"
    with pytest.raises(Conflict):
        engine.submit(TENANT, client, "forward_backward", forward(), seq=1, loss=losses[1])


def test_a_batch_of_more_tokens_than_are_taken_at_once_is_refused(tmp_path):
    with open_engine(tmp_path, max_batch_tokens=15) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        with pytest.raises(InvalidRequest, match="16 tokens with its padding"):
            engine.submit(TENANT, client, "forward_backward", forward())


def test_a_loss_that_is_not_allowed_is_refused_when_the_client_is_made(tmp_path):
    with open_engine(tmp_path, losses=("token_ce",)) as engine:
        for loss in ("os:system", "mse"):
            with pytest.raises(UserError, match="not allowed"):
                engine.create_client(TENANT, CONFIG | {"loss": loss})


def test_a_full_queue_takes_the_number_that_the_others_wait_for(tmp_path):
    with open_engine(tmp_path, max_pending=3, max_pending_per_tenant=2) as engine:
        client, other = engine.create_client(TENANT, CONFIG)["id"], engine.create_client("other", CONFIG)["id"]
        late = [engine.submit(TENANT, client, "forward_backward", forward(seq), seq=seq) for seq in (3, 4)]
        engine.submit("other", other, "optim_step", {}, seq=2)
        with pytest.raises(RateLimited):
            engine.submit(TENANT, client, "forward_backward", forward(2), seq=2)
        run(engine, client, "forward_backward", forward(1), seq=1)
        with pytest.raises(RateLimited):
            engine.submit(TENANT, client, "forward_backward", forward(5), seq=5)
        run(engine, client, "forward_backward", forward(2), seq=2)
        assert engine.wait(TENANT, late[1]["id"], SECONDS)["result"]["accumulated"] == 4


def test_models_that_are_loaded_at_the_start_are_there_before_what_was_accepted_runs(tmp_path):
    with open_engine(tmp_path, models={"small": "embedded/text"}) as engine:
        client = engine.create_client(TENANT, CONFIG | {"model_ref": "small"})["id"]
        late = engine.submit(TENANT, client, "optim_step", {}, seq=2)
    params = EngineParams(state_dir=str(tmp_path), models={"small": "embedded/text"})
    with Engine(params, preload=True) as engine:
        assert engine._bases.loaded("small") is not None
        run(engine, client, "forward_backward", forward(), seq=1)
        assert engine.wait(TENANT, late["id"], SECONDS)["result"]["step"] == 1
    missing = EngineParams(state_dir=str(tmp_path), models={"gone": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere"):
        Engine(missing, preload=True)
    with Engine(params):  # the directory is free again
        pass
