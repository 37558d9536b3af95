"""The SDK in process: futures, order, seeds, values, and engines that are shared and let go."""

import asyncio
import base64
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inft.client import (
    Closed,
    Future,
    InvalidRequest,
    LoRAConfig,
    NotFound,
    OperationCancelled,
    OptimizerConfig,
    RateLimited,
    ServiceClient,
    TimedOut,
    TrainingClient,
    TrainingConfig,
)
from inft.client.losses.inputs import LossInputs, LossOutput
from inft.client.losses.token_ce import token_ce
from inft.client.sdk import local
from inft.client.sdk.values import plain_batch
from params.errors import UserError

ROWS = {"prompt": ["star, blue: ", "tree, red: "], "completion": ["A blue star.", "A red tree."]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient({"state_dir": tmp_path_factory.mktemp("state"), "device": "cpu"}) as made:
        yield made


@pytest.fixture
def client(service: ServiceClient) -> TrainingClient:
    return service.create_training_client({"model_ref": "embedded/text", "optimizer": {"learning_rate": 1e-2}})


class Gate:
    """A loss that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, inputs: LossInputs) -> LossOutput:
        self.begun.set()
        assert self.open.wait(10)
        return token_ce(inputs)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def test_training_lowers_the_loss_and_moves_the_step(client: TrainingClient):
    losses = []
    for _ in range(3):
        future = client.forward_backward(ROWS)
        assert client.optim_step().result().applied
        losses.append(future.result().loss)
    assert losses[0] > losses[1] > losses[2]
    assert client.step == 3
    assert client.sample(["star, blue: "], max_tokens=3).model_step == 3


def test_a_configuration_may_be_of_dataclasses(service: ServiceClient):
    config = TrainingConfig(
        model_ref="embedded/text", lora_config=LoRAConfig(rank=4), optimizer=OptimizerConfig(name="sgd"), seed=3
    )
    assert service.create_training_client(config).config == config
    mixed = service.create_training_client({"model_ref": "embedded/text", "lora_config": LoRAConfig(rank=4)})
    assert mixed.config.lora.rank == 4


def test_a_seed_that_is_not_given_is_drawn_from_pythons_random(service: ServiceClient):
    def drawn() -> tuple[int | None, str]:
        random.seed(42)
        made = service.create_training_client({"model_ref": "embedded/text"})
        return made.config.seed, made.sample(["A "], temperature=1.0, max_tokens=8).samples[0].completion

    before = random.getstate()
    try:
        assert drawn() == drawn()
    finally:
        random.setstate(before)


def test_tensors_arrays_and_lists_are_one_batch(client: TrainingClient):
    ids = [[5, 6, 7], [8, 9, 10]]
    mask = [[1, 1, 1], [1, 1, 0]]
    labels = [[-100, 6, 7], [-100, 9, -100]]
    plain = {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": [1.0, 0.5]}
    tensors = {name: torch.tensor(value) for name, value in plain.items()}
    arrays = {name: [np.array(row) for row in value] for name, value in plain.items()}
    assert plain_batch(tensors) == plain
    assert plain_batch(arrays) == plain
    assert plain_batch({"mask": np.ones((1, 2), dtype=bool)}) == {"mask": [[True, True]]}
    losses = [client.forward_backward(batch, loss="cross_entropy").result().loss for batch in (plain, tensors)]
    assert losses[0] == losses[1]


def test_an_image_may_be_in_memory_or_a_file(tmp_path: Path):
    image = Image.new("RGB", (4, 3), "red")
    image.save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    text = base64.b64encode(content).decode()
    given = [image, tmp_path / "red.png", str(tmp_path / "red.png"), content, text, None]
    assert plain_batch({"images": given})["images"] == [text] * 5 + [None]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": object()}, "input_ids holds object"),
        ({"labels": [{1, 2}]}, "labels: row 0 holds set"),
        ({"images": "photo.png"}, "images: give a list"),
        ({"images": [None, 7]}, "images: row 1"),
        ({"images": [Path("no such file.png")]}, "images: row 0"),
        ([1, 2], "a batch is a mapping"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(batch: object, words: str):
    with pytest.raises(UserError, match=words):
        plain_batch(batch)


def test_a_refused_batch_uses_up_no_number(client: TrainingClient):
    first = client.forward_backward(ROWS)
    with pytest.raises(UserError, match="row 1"):
        client.forward_backward({"input_ids": [[5, 6], [7]]})
    with pytest.raises(UserError, match="outside the vocabulary"):
        client.forward_backward({"input_ids": [[5, 99_999]]})
    assert client.optim_step().seq == first.seq + 1


def test_a_loss_may_be_a_function_and_gives_what_its_name_gives(service: ServiceClient):
    def loss(function: object) -> float:
        made = service.create_training_client({"model_ref": "embedded/text", "seed": 1})
        return made.forward_backward(ROWS, loss=function).result().loss

    assert loss(lambda inputs: token_ce(inputs)) == loss("token_ce") == loss(None)


def test_rows_for_privacy_are_drawn_at_the_rate_that_is_counted(service: ServiceClient):
    private = {"model_ref": "embedded/text", "lora_config": {"dropout": 0.0}, "batch_size": 4}
    dp = {"dataset_size": 40, "noise_multiplier": 1.0, "target_epsilon": 100.0, "target_delta": 1e-3}
    client = service.create_training_client({**private, "dp_config": dp})
    sizes = [len(rows) for rows in islice(client.poisson_batches(40), 2000)]
    assert abs(sum(sizes) / 2000 - 4) < 0.3  # seven standard deviations
    assert len(set(sizes)) > 5
    assert client.dp_metrics["sample_rate"] == 0.1

    seeded = {**private, "dp_config": {**dp, "seed": 1, "sample_rate": 0.5}}
    one, two = (service.create_training_client(seeded).poisson_batches(40) for _ in range(2))
    assert list(islice(one, 5)) == list(islice(two, 5))
    with pytest.raises(UserError, match="dataset_size is 40"):
        client.poisson_batches(41)
    with pytest.raises(UserError, match="for private clients"):
        service.create_training_client({"model_ref": "embedded/text"}).poisson_batches(40)


def test_a_loss_that_is_neither_is_refused(client: TrainingClient):
    with pytest.raises(UserError, match="loss is of type int"):
        client.forward_backward(ROWS, loss=7)
    with pytest.raises(UserError, match="did you mean 'token_ce'"):
        client.forward_backward(ROWS, loss="token_cee")


def test_a_result_that_takes_longer_is_a_timeout_and_the_operation_goes_on(client: TrainingClient, gate: Gate):
    future = client.forward_backward(ROWS, loss=gate)
    assert gate.begun.wait(10)
    assert future.status == "running"
    assert not future.done()
    with pytest.raises(TimedOut, match="goes on"):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):  # the standard library's
        future.exception(timeout=0)
    gate.open.set()
    assert future.result(timeout=10).loss > 0
    assert future.status == "completed"
    assert future.exception() is None


def test_a_result_comes_as_soon_as_it_is_there(client: TrainingClient, gate: Gate):
    """The project of the guide slept for a second in each poll."""
    future = client.forward_backward(ROWS, loss=gate)
    assert gate.begun.wait(10)
    woken = threading.Event()
    waiter = threading.Thread(target=lambda: (future.result(), woken.set()))
    waiter.start()
    gate.open.set()
    assert woken.wait(0.9)
    waiter.join()


def test_an_operation_that_has_not_begun_can_be_cancelled(client: TrainingClient, gate: Gate):
    running = client.forward_backward(ROWS, loss=gate)
    waiting = client.optim_step()
    after = client.forward_backward(ROWS)
    assert gate.begun.wait(10)
    assert waiting.status == "queued"
    assert waiting.cancel()
    assert waiting.cancel(), "a cancelled operation stays cancelled"
    assert not running.cancel()
    gate.open.set()
    assert waiting.cancelled()
    with pytest.raises(OperationCancelled):
        waiting.result()
    assert not after.cancelled()
    assert after.result().accumulated == 2, "the step between them was not taken"
    assert not after.cancel()


def test_callbacks_are_called_once_whenever_they_are_added(client: TrainingClient, gate: Gate):
    future = client.forward_backward(ROWS, loss=gate)
    called: list[tuple[int, Future]] = []
    done = threading.Event()
    future.add_done_callback(lambda found: called.append((1, found)))
    future.add_done_callback(lambda found: 1 / 0)  # what one raises keeps no other from being called
    future.add_done_callback(lambda found: (called.append((2, found)), done.set()))
    gate.open.set()
    assert done.wait(10)
    future.add_done_callback(lambda found: called.append((3, found)))
    assert called == [(1, future), (2, future), (3, future)]


def test_a_future_can_be_awaited(client: TrainingClient):
    async def both() -> tuple[float, int]:
        loss, step = client.forward_backward(ROWS), client.optim_step()
        return (await loss).loss, (await step).step

    loss, step = asyncio.run(both())
    assert loss > 0
    assert step == 1


def test_a_future_is_found_again_by_its_id(service: ServiceClient, client: TrainingClient):
    future = client.forward_backward(ROWS)
    again = service.get_future(future.id)
    assert (again.id, again.kind, again.seq) == (future.id, "forward_backward", future.seq)
    assert again.result() == future.result()
    with pytest.raises(NotFound):
        service.get_future("fut-0")


def test_a_failed_operation_raises_its_own_error_each_time(client: TrainingClient):
    def nan(inputs: LossInputs) -> LossOutput:
        return LossOutput(loss=inputs.logits_BTV.sum() * float("nan"))

    future = client.forward_backward(ROWS, loss=nan)
    for _ in range(2):
        with pytest.raises(UserError, match=r"(?i)nan|finite"):
            future.result()
    assert future.status == "failed"
    assert client.status == "poisoned"


def test_two_handles_in_many_threads_keep_one_order(service: ServiceClient, client: TrainingClient):
    handles = [client, service.get_training_client(client.id)]
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda number: handles[number % 2].forward_backward(ROWS), range(24)))
    assert sorted(future.seq for future in futures) == list(range(1, 25))
    assert sorted(future.result().accumulated for future in futures) == list(range(1, 25))


def test_clients_are_listed_and_found(service: ServiceClient, client: TrainingClient):
    assert client.id in [each.id for each in service.list_training_clients()]
    again = service.get_training_client(client.id)
    assert again.config == client.config
    client.forward_backward(ROWS)
    client.optim_step().result()
    assert again.step == 0, "as of when it was asked for"
    assert again.refresh().step == client.step == 1
    with pytest.raises(NotFound):
        service.get_training_client("tc-0")


def test_a_checkpoint_is_pulled_whole_and_overwrites_nothing(
    service: ServiceClient, client: TrainingClient, tmp_path: Path
):
    saved = client.save_state(metadata={"notes": "first"})
    place = service.pull_artifact(saved.artifact_id, tmp_path)
    assert place == tmp_path / saved.artifact_id
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in place.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        service.pull_artifact(saved.artifact_id, tmp_path)
    for name in ("art-0", "../art-0", "/etc", "", "."):
        with pytest.raises(NotFound):
            service.pull_artifact(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [saved.artifact_id]


def test_what_was_done_is_in_the_audit_log(service: ServiceClient, client: TrainingClient):
    client.forward_backward(ROWS).result()
    entries, after = [], 0
    while page := service.get_audit_logs(after=after, limit=50):
        entries += page
        after = page[-1]["number"]
    assert [entry["action"] for entry in entries if entry["target"] == client.id][:2] == [
        "create_client",
        "forward_backward",
    ]


def test_two_services_of_one_directory_share_an_engine_until_both_are_closed(tmp_path: Path):
    one, two = (
        ServiceClient({"state_dir": tmp_path}),
        ServiceClient({"state_dir": str(tmp_path / ".." / tmp_path.name)}),
    )
    made = one.create_training_client({"model_ref": "embedded/text"})
    assert two.get_training_client(made.id).id == made.id
    with pytest.raises(UserError, match="other settings"):
        ServiceClient({"state_dir": tmp_path, "max_pending": 3}).list_training_clients()
    one.close()
    one.close()
    with pytest.raises(Closed):
        one.list_training_clients()
    assert two.get_training_client(made.id).forward_backward(ROWS).result().loss > 0
    two.close()
    assert str(tmp_path.resolve()) not in local._shared


def test_a_full_queue_is_waited_for(tmp_path: Path):
    config = {"state_dir": tmp_path, "max_pending_per_tenant": 2}
    with ServiceClient(config) as service:
        client = service.create_training_client({"model_ref": "embedded/text"})
        assert [client.forward_backward(ROWS) for _ in range(8)][-1].result().accumulated == 8
    gate = Gate()
    with ServiceClient({**config, "timeout": 0.1}) as service:
        client = service.create_training_client({"model_ref": "embedded/text"})
        client.forward_backward(ROWS, loss=gate)
        client.optim_step()
        with pytest.raises(RateLimited):
            client.optim_step()
        gate.open.set()


def test_tenants_in_process_do_not_see_each_other(service: ServiceClient, client: TrainingClient, tmp_path: Path):
    place = service._transport.engine.params
    config = {"state_dir": place.state_dir, "device": "cpu", "tenant_id": "other"}
    with ServiceClient(config) as other:
        assert other.list_training_clients() == []
        with pytest.raises(NotFound):
            other.get_training_client(client.id)


def test_waiting_when_the_engine_is_closed_ends_and_the_operation_is_done_later(tmp_path: Path):
    gate = Gate()
    service = ServiceClient({"state_dir": tmp_path})
    client = service.create_training_client({"model_ref": "embedded/text"})
    running, waiting = client.forward_backward(ROWS, loss=gate), client.optim_step()
    assert gate.begun.wait(10)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(waiting.exception)
        closing = pool.submit(service.close)
        gate.open.set()
        closing.result(10)
        with pytest.raises(Closed):
            answer.result(10)
    with ServiceClient({"state_dir": tmp_path}) as again:
        assert again.get_future(waiting.id).result().step == 1
        assert again.get_future(running.id).status == "completed"


def test_the_end_of_the_interpreter_closes_the_engine_and_loses_nothing(tmp_path: Path):
    code = (
        "import random, sys, torch, tg_tinker\n"
        "torch.set_num_threads(1)\n"
        "before = random.getstate()\n"
        "client = tg_tinker.ServiceClient({'state_dir': sys.argv[1]}).create_training_client("
        "{'model_ref': 'embedded/text', 'seed': 1})\n"
        "for _ in range(3):\n"
        "    client.forward_backward({'prompt': ['A'], 'completion': ['b']}); future = client.optim_step()\n"
        "assert random.getstate() == before, 'a seed that is given leaves the program its numbers'\n"
        "print(client.id, future.id)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert "Traceback" not in done.stderr
    assert any((tmp_path / "snapshots").iterdir()), "an engine that is closed snapshots its clients"
    client_id, future_id = done.stdout.split()
    with ServiceClient({"state_dir": tmp_path}) as service:
        assert service.get_future(future_id).result(30).step == 3
        assert service.get_training_client(client_id).step == 3


def test_a_wrong_call_names_its_field(client: TrainingClient):
    with pytest.raises(UserError, match="temperature"):
        client.sample(["A"], temperature=-1)
    with pytest.raises(UserError, match="prompts"):
        client.sample([])
    with pytest.raises(UserError, match="learning_rate"):
        client.optim_step(learning_rate="fast")
    with pytest.raises((InvalidRequest, NotFound)):
        client.load_state("../../etc/passwd")
