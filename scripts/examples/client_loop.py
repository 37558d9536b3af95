"""A whole training through the training client, in one flat file: captions of images in a language the model never saw.

    python scripts/examples/client_loop.py

The embedded tiny vision-language model captions drawn scenes in seven languages, and Sinhala is none of them. Two
passes over 288 captioned images, and it captions scenes that it has not seen in Sinhala: 15 seconds on one core. The
checkpoint is a LoRA adapter that PEFT loads. With a released model, on a GPU, or on a machine where `inft serve` runs:

    python scripts/examples/client_loop.py --model CohereLabs/aya-vision-8b --learning-rate 2e-4
    python scripts/examples/client_loop.py --url http://127.0.0.1:8787

The training itself is the loop over batches below; everything around it is data and telling.
"""

import argparse
import random
import time

from inft.client import ServiceClient, UserError, set_seed
from inft.data.sample import scenes
from inft.data.scene_captions import GRAMMARS, caption

options = argparse.ArgumentParser(description="Teach a vision-language model to caption images in another language.")
options.add_argument("--model", default="embedded/aya", help="hub id, directory, or a name that the service gives")
options.add_argument("--url", help="of `inft serve`; none: the engine runs in this process")
options.add_argument("--state-dir", default="outputs/client", help="of an engine in this process")
options.add_argument(
    "--language", default="si", choices=sorted(GRAMMARS), help="of the captions: si, ur, yue, or one that it knows"
)
options.add_argument("--learning-rate", type=float, default=5e-3, help="of the first step; it falls to 0 in a line")
options.add_argument("--batch-size", type=int, default=8, help="rows of a step")
options.add_argument("--steps", type=int, default=72, help="optimizer steps")
options.add_argument("--seed", type=int, default=42, help="of the order of rows, the adapter and its dropout")
OPTIONS = options.parse_args()

# ---- Data. A row is an image, what is asked, and the answer to learn. These images are drawn, so there is nothing to
# download; yours may be PIL images or paths. The held-out scenes show combinations that no training scene shows.

PROMPT = "Write a caption for this image."
train = [(scene.image.load(), caption(scene.attributes, OPTIONS.language)) for scene in scenes("train", rounds=1)]
held_out = [
    (scene.image.load(), caption(scene.attributes, OPTIONS.language)) for scene in scenes("validation", rounds=1)
]
set_seed(OPTIONS.seed)  # Python's random decides the order of rows below, and every seed that is not given
order: list[int] = []
while len(order) < OPTIONS.steps * OPTIONS.batch_size:
    order += random.sample(range(len(train)), len(train))  # a pass over all rows, in a new order

# ---- A training client: an adapter of its own on the frozen model. Nothing is trained before a step is taken.

try:
    service = ServiceClient(OPTIONS.url or {"state_dir": OPTIONS.state_dir})
    client = service.create_training_client(
        {
            "model_ref": OPTIONS.model,
            "lora_config": {
                "rank": 16,
                "alpha": 32.0,
                "dropout": 0.05,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            },
            "optimizer": {"name": "adamw", "learning_rate": OPTIONS.learning_rate, "weight_decay": 0.01},
            "batch_size": OPTIONS.batch_size,
        }
    )
    print(f"{client.id} trains {OPTIONS.model} on {len(train)} captions; {len(held_out)} are held out")

    # ---- Before: what does the model say? Temperature 0 takes the likeliest token each time.

    images, wanted = [image for image, _ in held_out], [text for _, text in held_out]
    before = client.sample([PROMPT] * len(images), images=images, max_tokens=48, temperature=0)

    # ---- Training. Both calls return at once with a future, so that the next batch is made ready while the last one
    # runs: the result of a step is asked for one step later.

    began = time.monotonic()
    running = None
    for step in range(OPTIONS.steps):
        rows = [train[index] for index in order[step * OPTIONS.batch_size : (step + 1) * OPTIONS.batch_size]]
        batch = {
            "prompt": [PROMPT] * len(rows),
            "completion": [text for _, text in rows],
            "images": [image for image, _ in rows],
        }
        loss = client.forward_backward(batch)
        taken = client.optim_step(learning_rate=OPTIONS.learning_rate * (1 - step / OPTIONS.steps))
        if running is not None and step % 8 == 0:
            print(f"step {running[1].result().step:3d}: loss {running[0].result().loss:.4f}")
        running = loss, taken
    if running is not None:
        print(f"step {running[1].result().step:3d}: loss {running[0].result().loss:.4f}")
    print(f"{OPTIONS.steps} steps took {time.monotonic() - began:.1f} s")

    # ---- After: the same question, and how many captions of held-out scenes are right to the letter.

    after = client.sample([PROMPT] * len(images), images=images, max_tokens=48, temperature=0)
    for name, found in (("before", before), ("after", after)):
        right = sum(each.completion.strip() == text for each, text in zip(found.samples, wanted, strict=True))
        print(f"{name:6}: {right} of {len(wanted)} captions are right, such as {found.samples[0].completion!r}")
    print(f"wanted: {wanted[0]!r}")

    # ---- A checkpoint never changes, and load_state brings all back: weights, optimizer, and what dropout draws next.

    saved = client.save_state(metadata={"language": OPTIONS.language, "steps": OPTIONS.steps})
    client.load_state(saved.artifact_id)
    again = client.sample([PROMPT] * len(images), images=images, max_tokens=48, temperature=0)
    assert again.samples == after.samples, "a checkpoint brings back what it was made of"
    print(f"saved {saved.artifact_id}, {saved.size_bytes} bytes; service.pull_artifact puts it where you want it")

    service.close()
except UserError as error:  # a model, a key or a service that is not there: one line says it
    raise SystemExit(f"error: {error}") from error
