"""The control of every captioning figure: the same rows with the inputs of other rows."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from inft.sample import Sample


def shuffled_order(samples: Sequence[Sample], *, seed: int) -> list[int]:
    """For each row the number of another row of its language; its own where the language has no other."""
    by_language: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_language[sample.language].append(index)
    partners = list(range(len(samples)))
    for indices in by_language.values():
        order = indices.copy()
        random.Random(seed).shuffle(order)
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            partners[here] = there
    return partners


def with_input_of(sample: Sample, other: Sample) -> Sample:
    """A row with another row's input: its image, or the news text of a text row."""
    return replace(sample, image=other.image, prompt=other.prompt)


def with_shuffled_images(samples: Sequence[Sample], *, seed: int) -> list[Sample]:
    """The same rows, each with the input of another row of its language."""
    partners = shuffled_order(samples, seed=seed)
    return [with_input_of(sample, samples[there]) for sample, there in zip(samples, partners, strict=True)]
