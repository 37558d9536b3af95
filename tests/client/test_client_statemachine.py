"""Any sequence of requests, deaths and restarts comes to what the same operations come to in order and undisturbed."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from client_engine_help import CONFIG, TENANT, forward, open_engine, run
from client_engine_process import EngineProcess, wait
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from inft.client.errors import Conflict, NotFound

PRIVATE = {"dataset_size": 50, "noise_multiplier": 1.0, "target_epsilon": 1e6, "accountant": "rdp", "seed": 3}
CONFIGS = {"plain": CONFIG, "private": {**CONFIG, "dp_config": PRIVATE}}
OVERFLOW = {"loss": "cross_entropy", "batch": {**forward()["batch"], "weights": [3e38, 3e38]}}
PAYLOADS: list[tuple[str, dict[str, Any]]] = [
    *[("forward_backward", forward(number)) for number in range(3)],
    ("forward_backward", OVERFLOW),  # poisons
    ("optim_step", {}),
    ("optim_step", {"learning_rate": 0.05}),
    ("save_state", {}),
    ("save_state", {"include_optimizer": False}),
    ("sample", {"prompts": ["A red"], "max_tokens": 3, "seed": 4}),
]
# Seldom what poisons or saves: most operations are to train.
drawn = st.sampled_from([*PAYLOADS[:3], *PAYLOADS[4:6]] * 3 + PAYLOADS)
moments = st.floats(0, 0.05)  # seconds in which a few operations run


@dataclass(kw_only=True)
class Sent:
    """An operation as it was sent, and what is known of it."""

    kind: str
    payload: dict[str, Any]
    of: int | None = None  # load_state: the number of the save_state
    future: str | None = None
    cancelled: bool = False
    outcome: Any = None  # once it was waited for


def told(ended: dict[str, Any]) -> Any:
    """What does not depend on ids: the result, or the error's code."""
    if ended["status"] != "completed":
        return ended["status"], (ended["error"] or {}).get("code")
    if ended["kind"] in ("save_state", "load_state"):
        return "completed", ended["result"]["step"]
    return "completed", ended["result"]


@dataclass(kw_only=True)
class Model:
    """What was accepted, by number."""

    sent: dict[int, Sent] = field(default_factory=dict)
    artifacts: dict[int, str] = field(default_factory=dict)  # by the number of the save_state

    @property
    def last(self) -> int:
        return max(self.sent, default=0)

    @property
    def missing(self) -> list[int]:
        return [number for number in range(1, self.last) if number not in self.sent]

    def can_end(self, number: int) -> bool:
        """Whether everything before has arrived."""
        return all(earlier in self.sent for earlier in range(1, number))


class EngineMachine(RuleBasedStateMachine):
    """One client of an engine in another process."""

    @initialize(config=st.sampled_from(sorted(CONFIGS)))
    def begin(self, config: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name) / "state"
        self.config = config
        self.model = Model()
        self.engine = EngineProcess(self.directory, snapshot_steps=2)
        self.client = self.engine.call("create_client", CONFIGS[config])["id"]

    def send(self, number: int, sent: Sent) -> None:
        info = self.engine.call("submit", self.client, sent.kind, sent.payload, seq=number)
        assert info["seq"] == number
        assert sent.future in (None, info["id"])
        sent.future = info["id"]
        self.model.sent[number] = sent

    @rule(operation=drawn)
    def send_next(self, operation: tuple[str, dict[str, Any]]) -> None:
        self.send(self.model.last + 1, Sent(kind=operation[0], payload=operation[1]))

    @rule(operation=drawn, gap=st.integers(1, 3))
    def send_ahead(self, operation: tuple[str, dict[str, Any]], gap: int) -> None:
        self.send(self.model.last + 1 + gap, Sent(kind=operation[0], payload=operation[1]))

    @precondition(lambda self: self.model.missing)
    @rule(operation=drawn)
    def fill(self, operation: tuple[str, dict[str, Any]]) -> None:
        self.send(self.model.missing[0], Sent(kind=operation[0], payload=operation[1]))

    @precondition(lambda self: self.model.artifacts)
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.artifacts)))
        payload = {"artifact_id": self.model.artifacts[number]}
        self.send(self.model.last + 1, Sent(kind="load_state", payload=payload, of=number))

    @precondition(lambda self: self.model.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.sent)))
        self.send(number, self.model.sent[number])

    @precondition(lambda self: self.model.sent)
    @rule(data=st.data())
    def contradict(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.sent)))
        with pytest.raises(Conflict):
            self.engine.call("submit", self.client, "forward_backward", forward(77), seq=number)

    @precondition(lambda self: self.model.last > 1)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        # Not the first: the undisturbed engine could not cancel it before it begins.
        number = data.draw(st.sampled_from([number for number in sorted(self.model.sent) if number > 1]))
        sent = self.model.sent[number]
        done = self.engine.call("cancel", sent.future)
        assert not (done and sent.outcome), "what has ended was cancelled"
        sent.cancelled = sent.cancelled or done

    @rule(data=st.data())
    def await_one(self, data: st.DataObject) -> None:
        numbers = [number for number in sorted(self.model.sent) if self.model.can_end(number)]
        if numbers:
            self.take_outcome(data.draw(st.sampled_from(numbers)))

    def take_outcome(self, number: int) -> None:
        sent = self.model.sent[number]
        ended = wait(self.engine, str(sent.future))
        assert (ended["status"] == "cancelled") == sent.cancelled
        assert sent.outcome in (None, told(ended)), "an outcome has changed"
        sent.outcome = told(ended)
        if ended["kind"] == "save_state" and ended["status"] == "completed":
            self.model.artifacts[number] = ended["result"]["artifact_id"]

    @rule(pause=moments)
    def die(self, pause: float) -> None:
        time.sleep(pause)
        self.engine.kill()
        self.engine = EngineProcess(self.directory, snapshot_steps=2)

    @rule(operation=drawn, pause=moments)
    def die_while_sending(self, operation: tuple[str, dict[str, Any]], pause: float) -> None:
        number, sent = self.model.last + 1, Sent(kind=operation[0], payload=operation[1])
        self.engine.send("submit", self.client, sent.kind, sent.payload, seq=number)
        time.sleep(pause / 10)
        self.engine.kill()
        self.engine = EngineProcess(self.directory, snapshot_steps=2)
        self.send(number, sent)  # whether it was accepted or not, sending it again is right

    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.engine = EngineProcess(self.directory, snapshot_steps=2)

    @invariant()
    def everything_accepted_is_there(self) -> None:
        if not hasattr(self, "model"):
            return
        for number, sent in self.model.sent.items():
            info = self.engine.call("future", sent.future)
            assert (info["seq"], info["kind"], info["client_id"]) == (number, sent.kind, self.client)
            if sent.outcome is not None:
                assert told(info) == sent.outcome
        assert self.engine.call("get_client", self.client)["next_seq"] == self.model.last + 1
        with pytest.raises(NotFound):
            self.engine.call("future", "fut-" + "0" * 24)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        try:
            while self.model.missing:
                self.send(self.model.missing[0], Sent(kind="optim_step", payload={}))
            for number in sorted(self.model.sent):
                self.take_outcome(number)
            self.engine.close()
            assert {number: sent.outcome for number, sent in self.model.sent.items()} == undisturbed(
                self.model, CONFIGS[self.config]
            )
        finally:
            self.engine.kill_soon()
            self.folder.cleanup()


def undisturbed(model: Model, config: dict[str, Any]) -> dict[int, Any]:
    """The outcomes of the same operations in another engine, sent in order and one after the other."""
    outcomes, artifacts = {}, {}
    with tempfile.TemporaryDirectory() as folder, open_engine(folder) as engine:
        client = engine.create_client(TENANT, config)["id"]
        for number in [number for number, sent in model.sent.items() if sent.cancelled]:
            waiting = engine.submit(TENANT, client, "optim_step", {}, seq=number)
            assert engine.cancel(TENANT, waiting["id"])
            outcomes[number] = ("cancelled", "cancelled")
        for number, sent in sorted(model.sent.items()):
            if sent.cancelled:
                continue
            payload = sent.payload if sent.of is None else {"artifact_id": artifacts[sent.of]}
            ended = run(engine, client, sent.kind, payload, seq=number)
            outcomes[number] = told(ended)
            if sent.kind == "save_state" and ended["status"] == "completed":
                artifacts[number] = ended["result"]["artifact_id"]
    return outcomes


def check(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # to shrink a history takes minutes, and its steps are printed as they are
        ),
    )


def test_an_engine_is_its_operations_in_order_whatever_happens_to_it() -> None:
    check(examples=4, steps=20)


@pytest.mark.slow
def test_an_engine_is_its_operations_in_order_in_many_histories() -> None:
    check(examples=60, steps=40)
