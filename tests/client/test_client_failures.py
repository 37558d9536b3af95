"""The failures of the project that the guide came from, each shown not to happen here, through what a user calls."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client_services import served
from safetensors.torch import load_file

from inft.client import (
    InvalidRequest,
    PrivacyBudgetExhausted,
    ServiceClient,
    TrainingClient,
    advantages_of,
    calibrate_noise,
)

pytest.importorskip("opacus")

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[5, 17, 300, 41, 9, 77], [8, 21, 30, 404, 555, 6], [9, 9, 31, 5, 2, 1], [70, 71, 72, 73, 74, 75]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    directory = tmp_path_factory.mktemp("failures") / "state"
    with ServiceClient({"state_dir": str(directory), "models": {"meta-llama/Llama-3-8B": "embedded/text"}}) as opened:
        yield opened


def new_client(
    service: ServiceClient, *, learning_rate: float = 1e-2, name: str = "adamw", **config: Any
) -> TrainingClient:
    optimizer = {"name": name, "learning_rate": learning_rate, "weight_decay": 0.0}
    return service.create_training_client(
        {"model_ref": "embedded/text", "lora_config": LORA, "optimizer": optimizer, "seed": 1, **config}
    )


def weights(service: ServiceClient, client: TrainingClient, directory: Path) -> dict[str, torch.Tensor]:
    """The client's adapter, as a checkpoint has it."""
    place = service.pull_artifact(client.save_state().artifact_id, directory)
    return load_file(place / "adapter_model.safetensors")


def step(client: TrainingClient, batch: dict[str, Any], **options: Any) -> float:
    loss = client.forward_backward(batch, **options).result().loss
    client.optim_step().result()
    return loss


def test_the_guides_first_block_runs(service: ServiceClient) -> None:
    """The original's raises twice."""
    made = service.create_training_client({
        "model_ref": "meta-llama/Llama-3-8B",
        "lora_config": {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.05,
            "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"]
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-4,
            "weight_decay": 0.01
        },
        "batch_size": 8
    })  # fmt: skip
    assert (made.status, made.step, made.config.lora.rank, made.config.batch_size) == ("active", 0, 16, 8)
    assert step(made, BATCH) == pytest.approx(math.log(1161), abs=3)


@pytest.mark.parametrize("loss", ["token_ce", "margin_ranking", "contrastive", "mse"])
def test_each_loss_trains_on_tensors(service: ServiceClient, loss: str) -> None:
    """Three of the original's four raise."""
    batch = {
        **BATCH,
        "pair_ids": torch.tensor([0, 0, 1, 1]),
        "chosen": torch.tensor([True, False, True, False]),
        "targets": np.array([1.0, 0.0, 1.0, 0.0]),
    }
    client = new_client(service)
    losses = [step(client, batch, loss=loss) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_load_state_restores_what_was_saved(service: ServiceClient, tmp_path: Path) -> None:
    """The original's restores nothing."""
    client = new_client(service)
    step(client, BATCH)
    saved = client.save_state(metadata={"notes": "epoch 1"})
    before = weights(service, client, tmp_path / "before")
    onward = [step(client, BATCH) for _ in range(3)]
    moved = weights(service, client, tmp_path / "moved")
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    assert client.load_state(saved.artifact_id).step == client.step == 1
    restored = weights(service, client, tmp_path / "restored")
    assert all(torch.equal(before[name], restored[name]) for name in before)
    assert [step(client, BATCH) for _ in range(3)] == onward  # the optimizer's state too


@pytest.mark.parametrize("loss", ["reinforce", "importance_sampling", "ppo", "cispo"])
def test_advantages_decide_which_answer_becomes_likelier(service: ServiceClient, loss: str) -> None:
    """The original drops them."""
    changes = {}
    for rewards in ((1.0, 0.0), (0.0, 1.0)):
        client = new_client(service, name="sgd", learning_rate=0.02)
        rows, old = rollouts(client)
        batch = {**rows, "advantages": advantages_of(list(rewards), 2)}
        if loss != "reinforce":
            batch["old_logprobs"] = old
        before = row_losses(service, rows)
        found = client.forward_backward(batch, loss=loss).result()
        if loss != "reinforce":
            assert found.metrics["ratio"] == pytest.approx(1, abs=1e-4)
        client.optim_step().result()
        after = [client.forward_backward({**rows, "labels": alone}).result().loss for alone in one_by_one(rows)]
        changes[rewards] = [old - new for old, new in zip(before, after, strict=True)]
    assert changes[1.0, 0.0][0] > 0 > changes[1.0, 0.0][1]
    assert changes[0.0, 1.0][1] > 0 > changes[0.0, 1.0][0]


def rollouts(client: TrainingClient) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two answers that the client sampled as one batch, and the log-probabilities they had."""
    sampled = client.sample(
        ["a red "], max_tokens=5, temperature=1.0, top_p=1.0, top_k=0, seed=3, num_samples=2, include_logprobs=True
    ).samples
    width = max(len(each.prompt_tokens) + len(each.tokens) for each in sampled)
    rows = {"input_ids": torch.zeros(2, width, dtype=torch.int64)}
    rows["attention_mask"], rows["labels"] = torch.zeros_like(rows["input_ids"]), rows["input_ids"] - 100
    old = torch.zeros(2, width)
    for row, each in enumerate(sampled):
        start, end = len(each.prompt_tokens), len(each.prompt_tokens) + len(each.tokens)
        rows["input_ids"][row, :end] = torch.tensor([*each.prompt_tokens, *each.tokens])
        rows["attention_mask"][row, :end] = 1
        rows["labels"][row, start:end] = torch.tensor(each.tokens)
        old[row, start:end] = torch.tensor(each.logprobs)
    return rows, old


def one_by_one(rows: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The labels with one row's alone."""
    for row in range(2):
        yield torch.where(torch.arange(2)[:, None] == row, rows["labels"], -100)


def row_losses(service: ServiceClient, rows: dict[str, torch.Tensor]) -> list[float]:
    """Each row's loss under a new client's weights, which those of every other new one equal."""
    client = new_client(service)
    return [client.forward_backward({**rows, "labels": alone}).result().loss for alone in one_by_one(rows)]


def private_client(service: ServiceClient, **dp: Any) -> TrainingClient:
    dp_config = {"dataset_size": 100, "target_epsilon": 1e6, "noise_multiplier": 1.0, "max_grad_norm": 1.0, **dp}
    return new_client(service, name="sgd", learning_rate=1.0, dp_config=dp_config)


@pytest.mark.parametrize(("accountant", "after_1000"), [("rdp", 8.67), ("prv", 7.44)])
def test_epsilon_is_positive_grows_and_is_that_of_the_spec(
    service: ServiceClient, accountant: str, after_1000: float
) -> None:
    """The original's accountant has the wrong sign: it reports .57 for 8.67."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    own = {"rdp": RDPAccountant, "prv": PRVAccountant}[accountant]()
    client = private_client(service, noise_multiplier=0.6, sample_rate=0.01, dataset_size=1000, accountant=accountant)
    spent = []
    for _ in range(3):
        step(client, BATCH)
        own.step(noise_multiplier=0.6, sample_rate=0.01)
        spent.append(client.dp_metrics["epsilon"])
        assert spent[-1] == pytest.approx(own.get_epsilon(1e-5), abs=0.01)
    assert 0 < spent[0] < spent[1] < spent[2] < after_1000
    noise = calibrate_noise(target_epsilon=after_1000, delta=1e-5, sample_rate=0.01, steps=1000, accountant=accountant)
    assert noise == pytest.approx(0.6, rel=0.01)


def test_each_rows_gradient_is_clipped_on_its_own(service: ServiceClient) -> None:
    """The original clips one scalar of the whole batch."""
    clip, expected_rows = 0.05, 8.0
    found = [
        private_client(service, max_grad_norm=clip).forward_backward({"input_ids": IDS[rows]}).result()
        for rows in (slice(0, 1), slice(1, 2), slice(0, 2))
    ]
    one, other, both = [(each.grad_norm, each.dp_metrics["mean_norm"]) for each in found]
    assert all(each.dp_metrics["clipped_fraction"] == 1.0 for each in found)
    most = clip / expected_rows
    assert one[0] == pytest.approx(most, rel=1e-4)
    assert other[0] == pytest.approx(most, rel=1e-4)
    assert 1.05 * most < both[0] <= 2 * most  # clipped together, two rows would have the norm of one
    assert both[1] == pytest.approx((one[1] + other[1]) / 2, rel=1e-4)
    mixed = private_client(service).forward_backward({**BATCH, "pair_ids": [0, 0, 1, 1]}, loss="contrastive")
    with pytest.raises(InvalidRequest, match="no loss of each row on its own"):
        mixed.result()


def test_noise_of_the_promised_size_is_in_every_step(service: ServiceClient, tmp_path: Path) -> None:
    """The original never adds any."""
    noise, clip, expected_rows = 1.5, 0.2, 8.0
    moved = []
    for number in range(2):
        client = private_client(service, noise_multiplier=noise, max_grad_norm=clip)
        before = weights(service, client, tmp_path / f"before{number}")
        client.optim_step().result()  # no row was drawn: noise alone
        after = weights(service, client, tmp_path / f"after{number}")
        moved.append(torch.cat([(after[name] - before[name]).double().flatten() for name in before]))
    for move in moved:
        assert float(move.std()) == pytest.approx(noise * clip / expected_rows, rel=0.05)
        assert abs(float(move.mean())) < 5 * float(move.std()) / math.sqrt(len(move))
    assert abs(float(torch.corrcoef(torch.stack(moved))[0, 1])) < 0.1  # of no seed: each client's is its own


@pytest.mark.parametrize("rows", [[[1, 2, 3], [4, 5]], [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]])
def test_ragged_rows_are_refused_and_the_row_is_named(service: ServiceClient, rows: list[Any]) -> None:
    """The original accepts them."""
    client = new_client(service)
    with pytest.raises(InvalidRequest, match="input_ids: row 1 has 2 values and row 0 3"):
        client.forward_backward({"input_ids": rows})
    for name in ("labels", "attention_mask"):
        with pytest.raises(InvalidRequest, match=f"{name}: row 1 has 5 values"):
            client.forward_backward({"input_ids": IDS, name: [[1] * 6, [1] * 5, [1] * 6, [1] * 6]})
    assert client.forward_backward(BATCH).seq == 1  # what was refused used up no number


@pytest.mark.parametrize("wire", ["in process", "http"])
def test_a_result_comes_when_it_is_there_and_not_at_the_next_second(
    service: ServiceClient, tmp_path: Path, wire: str
) -> None:
    """The original polls a future once a second."""
    count = 10

    def time_of(service: ServiceClient) -> float:
        client = new_client(service)
        client.forward_backward(BATCH).result()
        started = time.perf_counter()
        for _ in range(count):
            client.forward_backward(BATCH).result()
        return time.perf_counter() - started

    if wire == "in process":
        assert time_of(service) < count / 4
        return
    with served(state_dir=str(tmp_path / "state")) as url, ServiceClient(url) as remote:
        assert time_of(remote) < count / 4


def test_a_step_beyond_the_budget_is_not_taken(service: ServiceClient, tmp_path: Path) -> None:
    """The original never refuses one."""
    from opacus.accountants import RDPAccountant

    own = RDPAccountant()
    for _ in range(2):
        own.step(noise_multiplier=1.0, sample_rate=0.08)
    target = own.get_epsilon(1e-5) + 1e-3
    client = private_client(service, target_epsilon=target, accountant="rdp")
    with pytest.raises(PrivacyBudgetExhausted):
        client.optim_step(apply_dp_noise=False).result()
    for _ in range(2):
        step(client, BATCH)
    before, spent = weights(service, client, tmp_path / "before"), client.dp_metrics["epsilon"]
    client.forward_backward(BATCH).result()
    with pytest.raises(PrivacyBudgetExhausted, match="The step was not taken") as refused:
        client.optim_step().result()
    assert refused.value.details["after"] > target >= refused.value.details["spent"] == spent
    after = weights(service, client, tmp_path / "after")
    assert client.refresh().step == 2
    assert all(torch.equal(before[name], after[name]) for name in before)
