"""Collator: images per second of one processor call a batch, against calling the processor twice for the label mask.

    python scripts/bench/collator.py [--model llama32|aya] [--batch 8] [--size 640x480]

The peer is the usual script: one call for the whole conversation, a second one for the prompt alone, and the prompt's
length masked out of the labels. Both must give the same supervised tokens before they are timed.
"""

from dataclasses import dataclass

import torch
from harness import interleave, parser, report
from PIL import Image

from inft.models import load_spec
from inft.models.loading import load_processor
from inft.sample import Prompt, Sample

IGNORED = -100


@dataclass(frozen=True)
class Drawn:
    """An image in memory, so that decoding is not part of the figure."""

    image: Image.Image

    def load(self) -> Image.Image:
        """The image itself."""
        return self.image


def rows(count: int, size: tuple[int, int]) -> list[Sample]:
    """Noise photographs with an English caption."""
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size[1], size[0], 3), generator=noise, dtype=torch.uint8).numpy()
    return [
        Sample(
            image=Drawn(Image.fromarray(pixels[i])),
            prompt=Prompt(instruction="Write a caption for this image in English."),
            answer=f"photograph number {i} of a street with people",
            language="en",
        )
        for i in range(count)
    ]


def conversation(sample: Sample, *, answered: bool) -> list[dict[str, object]]:
    """The row as chat messages, with or without the answer."""
    image = sample.image
    assert image is not None
    content = [{"type": "image", "image": image.load()}, {"type": "text", "text": sample.prompt.text}]
    turns: list[dict[str, object]] = [{"role": "user", "content": content}]
    if answered:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    return turns


def called_twice(processor: object, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Collate with two processor calls; labels are the tokens after the prompt's length."""

    def call(*, answered: bool) -> dict[str, torch.Tensor]:
        return processor.apply_chat_template(  # type: ignore[attr-defined,no-any-return]
            [conversation(sample, answered=answered) for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not answered,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )

    batch, prompts = call(answered=True), call(answered=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    for row, length in enumerate(prompts["attention_mask"].sum(-1).tolist()):
        labels[row, :length] = IGNORED
    return {**batch, "labels": labels}


def main() -> None:
    """Check equality, then time both ways."""
    options = parser(__doc__, repetitions=11)
    options.add_argument("--model", default="aya", choices=["llama32", "aya"])
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--size", default="640x480", help="pixels, width x height")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    spec = load_spec(chosen.model)
    processor = load_processor(spec, "")
    collator = spec.collator(processor)
    width, height = map(int, chosen.size.split("x"))
    samples = rows(chosen.batch, (width, height))

    ours, peers = collator(samples), called_twice(processor, samples)
    for row in range(chosen.batch):
        mine, theirs = ours["labels"][row], peers["labels"][row]
        assert torch.equal(mine[mine != IGNORED], theirs[theirs != IGNORED]), f"row {row}: other supervised tokens"

    seconds = interleave(
        {"one call": lambda: collator(samples), "two calls": lambda: called_twice(processor, samples)},
        repetitions=chosen.repetitions,
    )
    title = f"collator, {chosen.model}, batch of {chosen.batch} at {chosen.size}"
    report(title, seconds, ours="one call", peer="two calls", limit=0.7, out=chosen.out, images=chosen.batch)


if __name__ == "__main__":
    main()
