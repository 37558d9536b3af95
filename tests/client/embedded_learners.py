"""Learners on the embedded models, removed after the test, and batches for them."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from embedded_bases import embedded_base
from PIL import Image

from inft.client.learner import Learner, prepare
from params.client_resolve import training_config

FAMILIES = ("text", "llama32", "aya")
SELF_ATTENTION = "*self_attn.*_proj"  # of the text model, and of a vision-language model's language model
LANGUAGE_MODEL = dict.fromkeys(("llama32", "aya"), "*language_model*.self_attn.*_proj")
DP = {"dataset_size": 200, "noise_multiplier": 1.0, "target_epsilon": 50.0, "seed": 5}


@contextmanager
def learners(family: str = "text") -> Iterator[Callable[..., Learner]]:
    """new(name, seed=…, **configuration) makes a learner; all are removed in the end."""
    base = embedded_base(family)
    made: list[Learner] = []

    def new(name: str = "", **config: Any) -> Learner:
        values = {"model_ref": f"embedded/{family}", "seed": 1, **config}
        made.append(Learner(base, name or f"tc-{len(made)}", training_config(values)))
        return made[-1]

    try:
        yield new
    finally:
        for learner in made:
            learner.close()


def run(learner: Learner, batch: Mapping[str, Any], *, loss: Any = None, **payload: Any) -> dict[str, Any]:
    """forward_backward of a batch; `loss` is a name or a function."""
    function = loss if callable(loss) else None
    named = {} if loss is None or callable(loss) else {"loss": loss}
    prepared = prepare(learner.base, learner.config, {"batch": batch, **named, **payload}, loss=function)
    return learner.forward_backward(prepared)


def token_batch(seed: int = 0, *, rows: int = 4, tokens: int = 12, padded: int = 2) -> dict[str, Any]:
    """Random rows of the text model's tokens; row 1 has padding, the first tokens are not supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1161, (rows, tokens), generator=draw)
    mask = torch.ones_like(ids)
    if rows > 1 and padded:
        mask[1, -padded:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}


def text_batch(family: str = "text", seed: int = 0) -> dict[str, Any]:
    """Two captions; of a vision-language model the first has an image."""
    batch: dict[str, Any] = {
        "prompt": ["Write a caption.", f"Say the number {seed}."],
        "completion": [f"A red disc, number {seed}.", "It is nothing."],
    }
    if family != "text":
        batch["images"] = [picture((200, 10 * seed, 0)), None]
    return batch


def picture(colour: tuple[int, int, int]) -> str:
    """A base64 text of a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (64, 40), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of the adapter's weights."""
    state = learner.state()
    return {name: tensor for name, tensor in state.tensors.items() if name.startswith("adapter.")}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether both have the same tensors, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
