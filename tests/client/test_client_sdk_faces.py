"""The same calls in process and over HTTP: the same values are taken, and refused in the same words."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from client_services import served

from inft.client import ServiceClient, UserError

ROWS = {"prompt": ["star, blue: ", "tree, red: "], "completion": ["A blue star.", "A red tree."]}
CONFIG = {"model_ref": "embedded/text", "optimizer": {"learning_rate": 1e-2}, "seed": 5}


@pytest.fixture(scope="module", params=["in process", "over HTTP"])
def face(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    params: dict[str, Any] = {"state_dir": str(tmp_path_factory.mktemp("state")), "device": "cpu"}
    if request.param == "in process":
        with ServiceClient(params) as made:
            yield made
    else:
        with served(**params) as url, ServiceClient(url) as made:
            yield made


def test_numbers_of_numpy_and_torch_are_numbers(face: ServiceClient):
    config = {**CONFIG, "batch_size": np.int64(4), "lora_config": {"rank": torch.tensor(2), "alpha": np.float32(4)}}
    client = face.create_training_client(config)
    assert (client.config.batch_size, client.config.lora.rank, client.config.lora.alpha) == (4, 2, 4.0)
    plain = client.sample(["A "], max_tokens=4, temperature=0.5, seed=7, num_samples=2)
    theirs = client.sample(
        np.array(["A "]),
        max_tokens=np.int64(4),
        temperature=np.float32(0.5),
        seed=np.uint32(7),
        num_samples=torch.tensor(2),
        include_logprobs=np.bool_(False),
    )
    assert theirs == plain
    client.forward_backward(ROWS)
    assert client.optim_step(np.bool_(True), learning_rate=np.float32(0.5)).result(30).learning_rate == 0.5
    assert client.load_state(np.str_(client.save_state(np.bool_(True)).artifact_id)).step == 1
    assert face.get_audit_logs(after=np.int64(0), limit=np.int64(1))[0]["number"] == 1


def test_what_json_cannot_hold_is_refused_in_the_same_words(face: ServiceClient):
    client = face.create_training_client(CONFIG)
    holds_itself: list[Any] = []
    holds_itself.append(holds_itself)
    for call, words in (
        (lambda: client.sample(["a", "\ud800"]), "prompts: row 1 has half of a surrogate pair"),
        (lambda: client.forward_backward({"input_ids": holds_itself}), "input_ids.* holds itself"),
        (lambda: client.save_state(metadata={"a": {1, 2}}), "metadata.a holds set"),
        (lambda: client.sample(["a"], max_tokens=4.0), "max_tokens"),
        (lambda: face.create_training_client({**CONFIG, "max_steps": 1j}), "max_steps holds complex"),
        (lambda: face.get_audit_logs(limit=0), "limit is 0: give a whole number from 1 to 1000"),
        (lambda: face.get_audit_logs(limit=1001), "limit is 1001"),
        (lambda: face.get_audit_logs(after="x"), "after is 'x': give a whole number from 0"),
        (lambda: face.get_audit_logs(after=True), "after is True"),
    ):
        with pytest.raises(UserError, match=words):
            call()
