"""Training on rewards through the training client, in one flat file: no answers are given, only how good one is.

    python scripts/examples/client_rl.py

Asked for a caption without a language, the embedded tiny vision-language model takes any of its seven. The reward is
the share of what a scene shows that the text names in English. Of several answers to one image those that are better
than the others become likelier (the advantage of a group, PPO's ratio for the second step on the same answers), until
all captions are English. A minute on one core; over HTTP with --url.
"""

import argparse
import random

from inft.client import ServiceClient, UserError, advantages_of, set_seed
from inft.client.rollouts import rollout_batch, rollouts
from inft.data.sample import keywords, scenes

options = argparse.ArgumentParser(description="Train a vision-language model on a reward.")
options.add_argument("--model", default="embedded/aya", help="hub id, directory, or a name that the service gives")
options.add_argument("--url", help="of `inft serve`; none: the engine runs in this process")
options.add_argument("--state-dir", default="outputs/client", help="of an engine in this process")
options.add_argument("--rounds", type=int, default=40, help="of sampling, each with two steps")
options.add_argument("--prompts", type=int, default=8, help="of a round")
options.add_argument("--group-size", type=int, default=8, help="answers to one prompt")
options.add_argument("--learning-rate", type=float, default=2e-3, help="of each step")
options.add_argument("--seed", type=int, default=42, help="of everything")
OPTIONS = options.parse_args()

PROMPT = "Write a caption for this image."
train = [(scene.image.load(), keywords(scene.attributes)) for scene in scenes("train", rounds=1)]
held_out = [(scene.image.load(), keywords(scene.attributes)) for scene in scenes("validation", rounds=1)]
set_seed(OPTIONS.seed)  # Python's random draws the images below, and the seed of each sampling


def reward(text: str, words: str) -> float:
    """The share of a scene's words, such as "star, blue, small, top", that a text has."""
    found = text.lower().replace(".", " ").split()
    return sum(word in found for word in words.split(", ")) / 4


try:
    service = ServiceClient(OPTIONS.url or {"state_dir": OPTIONS.state_dir})
    client = service.create_training_client(
        {
            "model_ref": OPTIONS.model,
            "lora_config": {
                "rank": 16,
                "alpha": 32.0,
                "dropout": 0.0,
            },  # dropout would make a ratio of two passes noise
            "optimizer": {"learning_rate": OPTIONS.learning_rate, "weight_decay": 0.0, "max_grad_norm": 1.0},
            "batch_size": OPTIONS.prompts * OPTIONS.group_size,
            "loss": "ppo",
            "loss_options": {"clip_low": 0.8, "clip_high": 1.2},
        }
    )

    for number in range(OPTIONS.rounds):
        # Answers of the weights as they are now, with the log-probability of each token when it was drawn.
        asked = random.sample(train, OPTIONS.prompts)
        images = [image for image, _ in asked]
        found = rollouts(client, [PROMPT] * len(asked), images=images, group_size=OPTIONS.group_size, max_tokens=24)

        # How much better than the other answers to its image each one is: equal answers teach nothing.
        rewards = [reward(each.completion, asked[i // OPTIONS.group_size][1]) for i, each in enumerate(found)]
        advantages = advantages_of(rewards, group_size=OPTIONS.group_size).tolist()

        # Two steps on the same answers. In the second the weights are not those that drew them, which the ratio mends.
        batch = rollout_batch(found, advantages)
        for _ in range(2):
            loss = client.forward_backward(batch)
            client.optim_step()
        measured = loss.result().metrics
        mean = sum(rewards) / len(rewards)
        if number % 4 == 0 or number == OPTIONS.rounds - 1:
            print(f"round {number:3d}: mean reward {mean:.3f}, ratio {measured['ratio']:.3f}, kl {measured['kl']:.4f}")

    # Scenes that no round asked for, and the likeliest answer to each.
    images = [image for image, _ in held_out]
    answers = client.sample([PROMPT] * len(images), images=images, max_tokens=24, temperature=0).samples
    scores = [reward(each.completion, words) for each, (_, words) in zip(answers, held_out, strict=True)]
    print(f"held out: mean reward {sum(scores) / len(scores):.3f}, such as {answers[0].completion!r}")

    saved = client.save_state(metadata={"rounds": OPTIONS.rounds})
    print(f"saved {saved.artifact_id}")
    service.close()
except UserError as error:  # a model, a key or a service that is not there: one line says it
    raise SystemExit(f"error: {error}") from error
