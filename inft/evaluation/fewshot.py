"""Few-shot prompting: examples of the train split in the row's own language, drawn at random or by their images."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from inft.data.images import ImageError
from inft.evaluation.captioner import Captioner
from inft.evaluation.generate import evaluating
from inft.evaluation.predict import Shots
from inft.evaluation.rows import EvalRow
from inft.models.collate import CaptionCollator
from inft.sample import ImageRef, Sample
from params.errors import UserError

CANDIDATES = 512  # rows of each language that examples are taken from, at most
IMAGES_AT_ONCE = 16
TRIED = 8  # rows that are tried before all of them are captioned


def random_shots(examples: Sequence[Sample], *, count: int, seed: int) -> Shots:
    """Return what gives each row ``count`` examples of its language, drawn by the seed and the row alone."""
    by_language = _by_language(examples)

    def shots(row: EvalRow) -> list[Sample]:
        candidates = [sample for sample in by_language.get(row.sample.language, []) if _other(sample, row)]
        _refuse_too_few(candidates, row, count)
        return Random(f"{seed} {row.key}").sample(candidates, count)

    return shots


def similar_shots(captioner: Captioner, examples: Sequence[Sample], *, count: int) -> Shots:
    """Return what gives each row the ``count`` examples whose images are nearest to its own, the nearest last.

    Nearest by the cosine of the model's own vision features. A row whose image cannot be read gets none.
    Errors: UserError for a family that takes no images.
    """
    if captioner.spec.image_features is None:
        raise UserError(
            f"similar examples are chosen by their images, and {captioner.spec.title} take none: use "
            "--shot-choice random."
        )
    by_language = _by_language(examples)
    known = _Features(captioner)
    stacked = {language: known.of([_image(s) for s in samples]) for language, samples in by_language.items()}

    def shots(row: EvalRow) -> list[Sample]:
        samples = by_language.get(row.sample.language, [])
        candidates = [i for i, sample in enumerate(samples) if _other(sample, row)]
        _refuse_too_few(candidates, row, count)
        if row.sample.image is None:
            return []
        try:
            own_D = known.of([row.sample.image])[0]
        except ImageError:
            return []
        near = (stacked[row.sample.language][candidates] @ own_D).argsort(descending=True)[:count]
        return [samples[candidates[i]] for i in reversed(near.tolist())]

    return shots


def refuse_no_room(collator: CaptionCollator, rows: Sequence[EvalRow], shots: Shots) -> None:
    """UserError when the prompts of the first readable rows have room for no example: that would be zero-shot."""
    for row in rows[:TRIED]:
        try:
            if any(collator.fitting_shots([row.sample], [shots(row)])[0]):
                return
        except ImageError:
            continue
    raise UserError(
        f"prompts have no room for a single example within basic.max_length={collator.max_length:,}: raise it (--set "
        "basic.max_length=N), for Aya lower basic.max_image_tiles, or leave --shots out."
    )


class _Features:
    """Vision features of unit length, each image's once."""

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner
        self.found: dict[ImageRef, Tensor] = {}

    def of(self, images: Sequence[ImageRef]) -> Tensor:
        """[images, features]; ImageError for one that cannot be read."""
        missing = [image for image in dict.fromkeys(images) if image not in self.found]
        model: Any = self.captioner.model
        compute = self.captioner.spec.image_features
        assert compute is not None
        with evaluating(model), torch.no_grad(), self.captioner.base() as base:
            plain = base.get_base_model() if self.captioner.adapted else base
            for start in range(0, len(missing), IMAGES_AT_ONCE):
                part = missing[start : start + IMAGES_AT_ONCE]
                features_ND = compute(plain, self.captioner.processor, [image.load() for image in part]).float().cpu()
                self.found.update(zip(part, torch.nn.functional.normalize(features_ND, dim=-1), strict=True))
        return torch.stack([self.found[image] for image in images])


def _by_language(examples: Sequence[Sample]) -> Mapping[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in examples:
        of_language = found.setdefault(sample.language, [])
        if len(of_language) < CANDIDATES:
            of_language.append(sample)
    return found


def _image(sample: Sample) -> ImageRef:
    assert sample.image is not None, "examples with images were asked for"
    return sample.image


def _other(sample: Sample, row: EvalRow) -> bool:
    """Whether an example is of another article and another picture than the row."""
    same_title = bool(sample.meta.get("title")) and sample.meta.get("title") == row.sample.meta.get("title")
    same_image = sample.image is not None and sample.image == row.sample.image
    return not (same_title or same_image or (sample.prompt.text == row.sample.prompt.text and sample.image is None))


def _refuse_too_few(candidates: Sequence[Any], row: EvalRow, count: int) -> None:
    if len(candidates) < count:
        raise UserError(
            f"the train split has {len(candidates)} rows in language {row.sample.language!r} to take {count} examples "
            "from: lower --shots, or leave the language out of --languages."
        )
