"""Which samples are captions of one and the same thing: references of one row."""

from collections.abc import Hashable, Sequence

from inft.sample import Sample

SEVERAL = " caption "  # stands between a line and the number of one of its captions, in a sample's place


def place_of(sample: Sample) -> str:
    """The line that a sample is of; each of its captions is one."""
    return str(sample.meta.get("where") or sample.meta.get("title") or "").partition(SEVERAL)[0]


def grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples with the same image and prompt together: one caption is compared with all that they say."""
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        place = sample.image if sample.image is not None else place_of(sample) or id(sample)
        groups.setdefault((place, sample.language, sample.prompt.text, sample.meta.get("title")), []).append(sample)
    return list(groups.values())
