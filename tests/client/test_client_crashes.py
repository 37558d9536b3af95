"""Killed processes, full disks and damaged files: what was accepted is there afterwards, and trains on bit by bit."""

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from client_engine_help import CONFIG, TENANT, forward, open_engine, result, run, train
from client_engine_process import EngineProcess, Killed, wait
from small_files import small_files

from inft.client.errors import ClientError, ClientUnavailable, StorageFull
from inft.client.store import OperationRow, Store

STEPS = 6
SEEDS = (7, 8)  # of the two clients that train at once


def operations() -> list[tuple[str, dict[str, Any]]]:
    """Steps of one and of two batches, a checkpoint after the third, a return to it at the end, and a sample."""
    listed: list[tuple[str, dict[str, Any]]] = []
    for step in range(STEPS):
        listed += [("forward_backward", forward(step))] * (1 + step % 2) + [("optim_step", {})]
        if step == 2:
            listed.append(("save_state", {}))
    listed.append(("load_state", {}))
    listed += [("forward_backward", forward(99)), ("sample", {"prompts": ["A red"], "max_tokens": 4, "seed": 1})]
    return listed


def told(kind: str, outcome: dict[str, Any]) -> Any:
    """What must come out the same: ids and hashes of ids differ from run to run."""
    if kind in ("save_state", "load_state"):
        return outcome["step"]
    return outcome


class Driver:
    """Two clients that do `operations`, across as many deaths of their process as there are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clients: list[str] = []
        self.futures: dict[tuple[str, int], str] = {}  # what was accepted
        self.saved: dict[str, str] = {}
        self.results: dict[tuple[int, int], Any] = {}

    def go_on(self, engine: EngineProcess) -> None:
        """Send everything that was not accepted yet, then wait for everything."""
        for (_, number), future_id in self.futures.items():
            assert engine.call("future", future_id)["seq"] == number
        infos = engine.call("list_clients")
        known = {info["config"]["seed"]: info["id"] for info in infos}
        self.clients = [
            known.get(seed) or engine.call("create_client", {**CONFIG, "seed": seed})["id"] for seed in SEEDS
        ]
        for number, (kind, payload) in enumerate(operations(), start=1):
            for client in self.clients:
                if kind == "load_state" and (client, number) not in self.futures:
                    payload = {"artifact_id": self._saved(engine, client)}
                if (client, number) not in self.futures:
                    self.futures[client, number] = engine.call("submit", client, kind, payload, seq=number)["id"]
        for (client, number), future_id in self.futures.items():
            ended = wait(engine, future_id)
            assert ended["status"] == "completed", ended
            self.results[self.clients.index(client), number] = told(ended["kind"], ended["result"])

    def _saved(self, engine: EngineProcess, client: str) -> str:
        number = [kind for kind, _ in operations()].index("save_state") + 1
        ended = wait(engine, self.futures[client, number])
        return str(ended["result"]["artifact_id"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """The results of a run that nothing happens to."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "state"
    engine = EngineProcess(directory, snapshot_steps=2)
    driver = Driver(directory)
    driver.go_on(engine)
    engine.close()
    return driver.results


def kill_at_random(directory: Path, expected: dict[tuple[int, int], Any], *, times: int, seed: int) -> None:
    """Start over and over, and kill; whenever a run comes to its end, compare it, and begin another."""
    draws, killed, runs = random.Random(seed), 0, 0
    driver = Driver(directory / "0")
    while killed < times or driver.results:
        engine = EngineProcess(driver.directory, snapshot_steps=2)
        timer = threading.Timer(draws.uniform(0, 0.5), engine.kill_soon)
        if killed < times:
            timer.start()
        try:
            driver.go_on(engine)
            timer.cancel()
            engine.close()
        except Killed:
            killed += 1
            continue
        finally:
            timer.cancel()
        assert driver.results == expected
        runs += 1
        driver = Driver(directory / str(runs))
    assert runs


def test_killed_at_random_moments_it_loses_nothing_and_its_losses_are_bit_equal(
    tmp_path: Path, uninterrupted: dict[tuple[int, int], Any]
) -> None:
    kill_at_random(tmp_path, uninterrupted, times=6, seed=1)


@pytest.mark.slow
def test_killed_a_hundred_times_it_loses_nothing_and_its_losses_are_bit_equal(
    tmp_path: Path, uninterrupted: dict[tuple[int, int], Any]
) -> None:
    kill_at_random(tmp_path, uninterrupted, times=100, seed=2)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def killed_before(directory: Path, number: int, kind: str, expected: float, **params: Any) -> bool:
    """Kill before the number-th change of files that the third operation makes; False where it makes fewer."""
    engine = EngineProcess(directory, **params)
    client = engine.call("create_client", CONFIG)["id"]
    for payload in ({"batch": forward()["batch"]}, {}):
        sent = engine.call("submit", client, "forward_backward" if payload else "optim_step", payload)
        wait(engine, sent["id"])
    if kind == "optim_step":
        wait(engine, engine.call("submit", client, "forward_backward", forward(1))["id"])
    engine.call("kill_before", str(directory), number)
    accepted = engine.call("submit", client, kind, {})
    try:
        wait(engine, accepted["id"])
    except Killed:
        engine = EngineProcess(directory, **params)
    else:
        engine.kill()
        return False
    again = engine.call("submit", client, kind, {}, seq=accepted["seq"])
    assert again["id"] == accepted["id"]
    ended = wait(engine, accepted["id"])
    assert ended["status"] == "completed", ended
    if kind == "save_state":
        artifact = ended["result"]["artifact_id"]
        assert files(directory / "artifacts") == [artifact]
        wait(engine, engine.call("submit", client, "load_state", {"artifact_id": artifact})["id"])
    after = wait(engine, engine.call("submit", client, "forward_backward", forward(2))["id"])
    assert after["result"]["loss"] == expected
    snapshots = engine.call("get_client", client), files(directory / "snapshots")
    assert len(snapshots[1]) <= 1
    engine.close()
    return True


def losses_after(tmp_path: Path, steps: int) -> float:
    """The loss of batch 2 after so many steps, in an engine that nothing happens to."""
    with open_engine(tmp_path / "plain") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, steps)
        return float(result(engine, client, "forward_backward", forward(2))["loss"])


@pytest.mark.parametrize("number", [0, 2, 5, 9, 12, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_within_a_save_state_it_saves_once_and_whole(tmp_path: Path, number: int | None) -> None:
    expected = losses_after(tmp_path, 1)
    if number is not None:
        assert killed_before(tmp_path / "state", number, "save_state", expected)
        return
    reached = [killed_before(tmp_path / f"state{n}", n, "save_state", expected) for n in range(40)]
    assert 10 < sum(reached) < 40  # every change of files, and the end of them


@pytest.mark.parametrize("number", [1, 6, 11, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_within_a_snapshot_it_goes_on_from_the_one_before(tmp_path: Path, number: int | None) -> None:
    expected = losses_after(tmp_path, 2)
    if number is not None:
        assert killed_before(tmp_path / "state", number, "optim_step", expected, snapshot_steps=1)
        return
    reached = [killed_before(tmp_path / f"state{n}", n, "optim_step", expected, snapshot_steps=1) for n in range(60)]
    assert 10 < sum(reached) < 60


def test_a_full_disk_in_save_state_leaves_nothing_half_saved_and_training_goes_on(tmp_path: Path) -> None:
    large = {**CONFIG, "lora_config": {"rank": 64, "dropout": 0.1}}  # 1 MB, far above what the log writes
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, large)["id"]
        train(engine, client, 1)
        before = result(engine, client, "save_state", {})["artifact_id"]
        with small_files(500_000):
            failed = run(engine, client, "save_state", {})
        assert failed["error"]["code"] == StorageFull.code
        assert "Free space" in failed["error"]["message"]
        assert files(tmp_path / "state" / "artifacts") == [before]
        found = train(engine, client, 2, first=1)
        result(engine, client, "load_state", {"artifact_id": before})
        assert train(engine, client, 2, first=1) == found
        result(engine, client, "save_state", {})
    with open_engine(tmp_path / "plain") as engine:
        client = engine.create_client(TENANT, large)["id"]
        assert train(engine, client, 3)[1:] == found


def test_an_operation_that_the_log_has_no_room_for_is_refused_and_its_number_stays_free(tmp_path: Path) -> None:
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, 1)
        number = engine.get_client(TENANT, client)["next_seq"]
        with small_files(10), pytest.raises(StorageFull):
            engine.submit(TENANT, client, "forward_backward", forward(1), seq=number)
        assert engine.get_client(TENANT, client)["next_seq"] == number
        assert result(engine, client, "forward_backward", forward(1), seq=number)["loss"] > 0


def test_an_outcome_that_the_log_has_no_room_for_comes_when_there_is_room(tmp_path: Path) -> None:
    with open_engine(tmp_path / "plain") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        expected = train(engine, client, 2)
    with open_engine(tmp_path / "state", snapshot_steps=1) as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, 1)
        ahead = engine.submit(TENANT, client, "optim_step", {}, seq=4)
        first = engine.submit(TENANT, client, "forward_backward", forward(1), seq=3)
        with small_files(10):
            assert engine.wait(TENANT, first["id"], 0.2)["status"] in ("queued", "running", "completed")
        assert engine.wait(TENANT, first["id"], 60)["result"]["loss"] == expected[1]
        assert engine.wait(TENANT, ahead["id"], 60)["status"] == "completed"
        assert engine.get_client(TENANT, client)["step"] == 2


def damage(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"]
)
def test_a_damaged_checkpoint_is_refused_by_name_and_changes_nothing(tmp_path: Path, name: str) -> None:
    draws = random.Random(name)
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        train(engine, client, 1)
        saved = result(engine, client, "save_state", {"metadata": {"run": 1}})["artifact_id"]
        place = engine.artifact_path(TENANT, saved) / name
        whole = place.read_bytes()
        expected = train(engine, client, 1, first=1)
        result(engine, client, "load_state", {"artifact_id": saved})
        for _ in range(4):
            place.write_bytes(whole)
            damage(place, draws)
            failed = run(engine, client, "load_state", {"artifact_id": saved})
            assert failed["status"] == "failed"
            assert name in failed["error"]["message"] or "damaged" in failed["error"]["message"]
        place.unlink()
        assert run(engine, client, "load_state", {"artifact_id": saved})["status"] == "failed"
        assert train(engine, client, 1, first=1) == expected


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "gradient.safetensors", "state.json"])
def test_a_damaged_snapshot_is_never_loaded_silently(tmp_path: Path, name: str) -> None:
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        other = engine.create_client(TENANT, {**CONFIG, "seed": 3})["id"]
        for each in (client, other):
            train(engine, each, 1)
            result(engine, each, "forward_backward", forward(5))
    (snapshot,) = (tmp_path / "state" / "snapshots").glob(f"{client}-*")
    damage(snapshot / name, random.Random(name))
    with open_engine(tmp_path / "state") as engine:
        waiting = engine.submit(TENANT, client, "optim_step", {})
        with pytest.raises(ClientUnavailable, match="damaged") as caught:
            engine.wait(TENANT, waiting["id"], 30)
        assert str(tmp_path) not in str(caught.value)
        assert engine.cancel(TENANT, waiting["id"])
        assert result(engine, other, "optim_step", {})["step"] == 2
        assert engine.get_client(TENANT, client)["step"] == 1


LARGE = {"loss": "cross_entropy", "batch": {**forward(1)["batch"], "weights": [1e6, 1e6]}}
OVERFLOW = {"loss": "cross_entropy", "batch": {**forward()["batch"], "weights": [1e30, 1e30]}}


@pytest.mark.parametrize("end", ["kill", "close"])
@pytest.mark.parametrize(("kind", "payload"), [("forward_backward", OVERFLOW), ("optim_step", {"learning_rate": 1e30})])
def test_a_poisoned_client_stays_so_until_its_checkpoint_is_loaded_and_that_is_whole(
    tmp_path: Path, kind: str, payload: dict[str, Any], end: str
) -> None:
    engine = EngineProcess(tmp_path / "state", snapshot_steps=1)
    config = {**CONFIG, "optimizer": {"name": "sgd", "learning_rate": 1e-2}}
    client, other = (engine.call("create_client", {**config, "seed": seed})["id"] for seed in (1, 2))

    def do(client_id: str, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        return wait(engine, engine.call("submit", client_id, kind, payload)["id"])

    do(client, "forward_backward", forward())
    do(client, "optim_step", {})
    saved = do(client, "save_state", {})["result"]["artifact_id"]
    expected = do(client, "forward_backward", LARGE)["result"]
    failed = do(client, kind, payload)
    assert failed["error"]["code"] == "not_finite"
    getattr(engine, end)()
    engine = EngineProcess(tmp_path / "state", snapshot_steps=1)
    assert engine.call("get_client", client)["status"] == "poisoned"
    assert engine.call("get_client", client)["step"] == 1
    assert do(client, "forward_backward", forward())["error"]["code"] == "client_poisoned"
    assert do(other, "forward_backward", forward())["status"] == "completed"
    assert do(client, "load_state", {"artifact_id": saved})["result"]["step"] == 1
    assert do(client, "forward_backward", LARGE)["result"] == expected
    engine.close()


def test_results_are_json_that_every_reader_takes(tmp_path: Path) -> None:
    """A ratio of two probabilities can be beyond all floats, and JSON has no word for an infinite number."""
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        rows = {**forward()["batch"], "advantages": [1.0, 1.0], "old_logprobs": [[-1e4] * 8] * 2}
        ended = run(engine, client, "forward_backward", {"batch": rows, "loss": "cispo"})
        assert json.loads(json.dumps(ended, allow_nan=False)) == ended
        with pytest.raises(ClientError):
            engine.submit(TENANT, client, "optim_step", {"learning_rate": float("inf")})


@pytest.mark.parametrize("end", ["kill", "close"])
def test_ended_between_forward_backward_and_optim_step_it_steps_as_if_nothing_had_been(
    tmp_path: Path, end: str
) -> None:
    def do(engine: EngineProcess, client: str, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        ended = wait(engine, engine.call("submit", client, kind, payload)["id"])
        assert ended["status"] == "completed", ended
        return dict(ended["result"])

    found = []
    for disturbed in (False, True):
        engine = EngineProcess(tmp_path / f"state{disturbed}")
        client = engine.call("create_client", CONFIG)["id"]
        for number in range(2):
            do(engine, client, "forward_backward", forward(number))
        if disturbed:
            getattr(engine, end)()
            engine = EngineProcess(tmp_path / f"state{disturbed}")
        found.append([do(engine, client, "optim_step", {}), do(engine, client, "forward_backward", forward(2))])
        engine.close()
    assert found[0] == found[1]


def test_cancelled_at_the_moment_the_one_before_ends_nothing_behind_it_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel comes after the outcome before it was recorded and before its number counts as done; then a crash."""
    recorded, go_on, finish = threading.Event(), threading.Event(), Store.finish

    def pausing(store: Store, row: OperationRow, *args: Any, **options: Any) -> None:
        finish(store, row, *args, **options)
        if row.seq == 1:
            recorded.set()
            assert go_on.wait(60)

    monkeypatch.setattr(Store, "finish", pausing)
    with open_engine(tmp_path / "state") as engine:
        client = engine.create_client(TENANT, CONFIG)["id"]
        third, second, _ = (
            engine.submit(TENANT, client, "forward_backward", forward(seq), seq=seq) for seq in (3, 2, 1)
        )
        assert recorded.wait(60)
        assert engine.cancel(TENANT, second["id"])
        shutil.copytree(tmp_path / "state", tmp_path / "crashed")
        go_on.set()
    with open_engine(tmp_path / "crashed") as engine:
        assert engine.wait(TENANT, third["id"], 20)["status"] == "completed"
