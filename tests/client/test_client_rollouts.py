"""Training on rewards, on a real client: rewards rise, advantages arrive, and the batch is what was sampled."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from inft.client import ServiceClient, TrainingClient
from inft.client.losses.inputs import IGNORED
from inft.client.rollouts import Rollout, advantages_of, rewards_of, rollout_batch, rollouts, train_on, train_round
from params.errors import UserError

PROMPTS = ["Once upon", "a dog"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceClient]:
    with ServiceClient({"state_dir": str(tmp_path / "state"), "device": "cpu"}) as made:
        yield made


@pytest.fixture
def make_client(service: ServiceClient) -> Callable[..., TrainingClient]:
    def make(model: str = "embedded/text", *, rate: float = 1e-2, **config: Any) -> TrainingClient:
        return service.create_training_client(
            {
                "model_ref": model,
                "lora_config": {"rank": 8, "dropout": 0.0},
                "optimizer": {"learning_rate": rate, "weight_decay": 0.0},
                "batch_size": 16,
                "seed": 1,
                **config,
            }
        )

    return make


def latin(completions: Sequence[str]) -> list[float]:
    """The share of an answer that is ASCII: verifiable without a reference, and never all or nothing at first."""
    return [sum(sign.isascii() for sign in text) / max(len(text), 1) for text in completions]


def weights(service: ServiceClient, client: TrainingClient, directory: Path) -> dict[str, torch.Tensor]:
    saved = client.save_state()
    service.pull_artifact(saved.artifact_id, directory)
    (found,) = directory.rglob("adapter_model.safetensors")
    return load_file(found)


@pytest.mark.parametrize("loss", ["reinforce", "importance_sampling", "ppo", "cispo"])
def test_the_mean_reward_rises(make_client: Callable[..., TrainingClient], loss: str) -> None:
    client = make_client()
    found = [
        train_round(client, PROMPTS, latin, group_size=8, max_tokens=8, rows=16, loss=loss, seed=number)
        for number in range(8)
    ]
    assert found[0].mean_reward < 0.7
    assert found[-1].mean_reward > 0.9
    assert [each.step for each in found] == list(range(1, 9))


def test_the_mean_reward_rises_with_an_image(make_client: Callable[..., TrainingClient]) -> None:
    client = make_client("embedded/aya")
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 50, 40), fill="red")
    options = {"group_size": 8, "images": [image], "max_tokens": 6, "temperature": 1.5}
    found = [train_round(client, ["What is it?"], latin, **options, seed=number) for number in range(8)]
    assert found[-1].mean_reward > found[0].mean_reward + 0.1


def test_without_advantages_no_weight_moves_and_with_them_weights_do(
    service: ServiceClient, make_client: Callable[..., TrainingClient], tmp_path: Path
) -> None:
    client = make_client()
    given = rollouts(client, PROMPTS, group_size=2, max_tokens=4, seed=3)
    before = weights(service, client, tmp_path / "before")
    loss, step = train_on(client, given, [0.0] * 4)
    assert (loss, step.grad_norm, step.applied) == (0.0, 0.0, True)
    after = weights(service, client, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, step = train_on(client, given, [1.0, -1.0, 0.5, -0.5])
    assert step.grad_norm > 0
    moved = weights(service, client, tmp_path / "moved")
    assert any(not torch.equal(before[name], moved[name]) for name in before)


def test_advantages_with_the_other_sign_are_the_opposite_gradient(make_client: Callable[..., TrainingClient]) -> None:
    client = make_client()
    given = rollouts(client, PROMPTS, group_size=2, max_tokens=4, seed=3)
    batch = rollout_batch(given, [1.0, -2.0, 0.5, 0.0])
    up = client.forward_backward(batch, loss="importance_sampling").result()
    client.forward_backward(rollout_batch(given, [-1.0, 2.0, -0.5, 0.0]), loss="importance_sampling").result()
    assert up.grad_norm > 0.1
    assert client.optim_step().result().grad_norm == pytest.approx(0, abs=1e-5 * up.grad_norm)


@pytest.mark.parametrize("model", ["embedded/text", "embedded/llama32"])
def test_the_ratio_of_fresh_rollouts_is_1(make_client: Callable[..., TrainingClient], model: str) -> None:
    client = make_client(model)
    images = None if model == "embedded/text" else [Image.new("RGB", (64, 64), "red"), None]
    given = rollouts(client, PROMPTS, group_size=3, images=images, max_tokens=6, seed=5)
    found = client.forward_backward(rollout_batch(given, [1.0] * 6), loss="ppo").result()
    assert found.metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert found.metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert found.metrics["tokens"] == sum(len(each.tokens) for each in given)
    assert found.loss == pytest.approx(-found.metrics["tokens"], rel=1e-4)


def test_a_step_is_the_same_however_the_rollouts_are_cut(
    service: ServiceClient, make_client: Callable[..., TrainingClient], tmp_path: Path
) -> None:
    found = []
    for number, rows in enumerate((8, 3)):
        client = make_client(rate=1e-3)
        given = rollouts(client, PROMPTS, group_size=4, max_tokens=5, seed=3)
        advantages = advantages_of(rewards_of(given, latin), 4).tolist()
        loss, step = train_on(client, given, advantages, rows=rows)
        found.append((loss, step.grad_norm, weights(service, client, tmp_path / str(number))))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for name, weight in found[0][2].items():
        torch.testing.assert_close(weight, found[1][2][name], atol=1e-4, rtol=1e-3)


def rollout(tokens: Sequence[int], *, prompt: Sequence[int] = (1, 2), completion: str = "a") -> Rollout:
    return Rollout(
        prompt="p",
        completion=completion,
        finish_reason="stop",
        prompt_tokens=tuple(prompt),
        tokens=tuple(tokens),
        logprobs=tuple(-float(token) for token in tokens),
    )


def test_a_batch_labels_sampled_tokens_alone() -> None:
    batch = rollout_batch([rollout([7, 8, 9]), rollout([5], prompt=[1, 2, 3])], [0.5, -1])
    assert batch == {
        "input_ids": [[1, 2, 7, 8, 9], [1, 2, 3, 5, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "labels": [[IGNORED, IGNORED, 7, 8, 9], [IGNORED, IGNORED, IGNORED, 5, IGNORED]],
        "old_logprobs": [[0.0, 0.0, -7.0, -8.0, -9.0], [0.0, 0.0, 0.0, -5.0, 0.0]],
        "advantages": [0.5, -1.0],
    }


@pytest.mark.parametrize("advantages", [[], [1.0], [1.0] * 3])
def test_advantages_are_one_for_each_rollout(advantages: list[float]) -> None:
    with pytest.raises(UserError, match=f"{len(advantages)} advantages for 2 rollouts"):
        rollout_batch([rollout([7]), rollout([8])], advantages)


def test_rewards_go_by_name_and_by_function() -> None:
    given = [rollout([7], completion=text) for text in ("yes", "no", "no", "maybe")]
    assert rewards_of(given, "exact", references=["yes", "no"]) == [1.0, 0.0, 1.0, 0.0]

    def of_tokens(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [len(text) + ids[0] for text, ids in zip(completions, completion_ids, strict=True)]

    assert rewards_of(given, of_tokens) == [10, 9, 9, 12]
    assert rewards_of(given, lambda completions, **others: [others["prompts"] == ["p"] * 4] * 4) == [1.0] * 4


@pytest.mark.parametrize(
    ("reward", "references", "says"),
    [
        ("exact", None, "exact compares with references"),
        ("exact", ["a", "b", "c"], "3 references for 4 rollouts"),
        ("exact", "abcd", "references for 4 rollouts"),
        ("exakt", None, "did you mean exact"),
        (3, None, "not int"),
        (lambda answers: [1.0], None, "needs 'answers'"),
        (lambda completions: [1.0], None, "4"),
        (lambda completions: [1.0, None, 1.0, 1.0], None, "rollout 1 has no reward"),
        (lambda completions: [1.0, float("nan"), 1.0, 1.0], None, "nan"),
    ],
)
def test_a_wrong_reward_is_refused(reward: Any, references: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        rewards_of([rollout([7])] * 4, reward, references=references)
