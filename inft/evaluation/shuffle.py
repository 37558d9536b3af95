"""The control of every captioning figure: the same rows with the inputs of other rows."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from inft.sample import Sample


def with_shuffled_images(samples: Sequence[Sample], *, seed: int) -> list[Sample]:
    """The same rows, each with the input of another row of its language: the image, or the news text of a text row."""
    by_language: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_language[sample.language].append(index)
    shuffled = list(samples)
    for indices in by_language.values():
        order = indices.copy()
        random.Random(seed).shuffle(order)
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            shuffled[here] = replace(samples[here], image=samples[there].image, prompt=samples[there].prompt)
    return shuffled
