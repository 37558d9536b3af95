"""The gallery of a report: held-out rows with the reference and what each system wrote."""

import base64
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inft.data.images import ImageError, file_image
from inft.evaluation.records import Prediction
from inft.evaluation.report_compare import Comparison, System

SHOWN = 6  # rows of each language at most
PIXELS = 240  # longer side of an image


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What one system wrote of a row."""

    text: str
    exact: bool = False  # equal to one of the references
    error: str = ""  # why the row could not be captioned
    absent: bool = False  # the evaluation has not come to the row

    @property
    def empty(self) -> bool:
        """Whether the system was asked and wrote nothing."""
        return not self.text.strip() and not self.error and not self.absent


@dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """One row: its image, its references, and a caption of each system."""

    row: str
    language: str
    title: str
    image: bytes | None  # a JPEG
    image_note: str  # why there is no image
    references: Sequence[str]
    captions: Sequence[Caption]

    @property
    def image_uri(self) -> str:
        """The image as a data: address; empty without one."""
        return data_uri(self.image, "image/jpeg") if self.image is not None else ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The rows that are shown of one comparison, by language."""

    title: str
    systems: Sequence[System]
    names: Mapping[str, str]
    rows: Mapping[str, Sequence[GalleryRow]]  # language -> rows
    with_images: bool


def data_uri(content: bytes, media_type: str) -> str:
    """Content as an address that needs no network."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def galleries(compared: Sequence[Comparison]) -> list[Gallery]:
    """The gallery of each comparison that has predictions."""
    found = [_gallery(comparison) for comparison in compared]
    return [gallery for gallery in found if gallery.rows]


def _gallery(comparison: Comparison) -> Gallery:
    """The rows of which some system kept an image, or the first of each language where none has images."""
    predictions = [system.predictions for system in comparison.systems]
    keys = list(dict.fromkeys(key for of in predictions for key in of))
    pictured = [key for key in keys if any(key in of and of[key].image for of in predictions)]
    rows: dict[str, list[GalleryRow]] = {language: [] for language in comparison.languages}
    said = {key: (of[key].title, key) for of in reversed(predictions) for key in of}
    pictured.sort(key=said.__getitem__)  # the same pictures in the same order in each language
    for key in pictured or sorted(keys):  # by their hash: a fair choice, and the same in every report
        language = next(of[key].lang for of in predictions if key in of)
        if len(rows.setdefault(language, [])) < SHOWN:
            rows[language].append(_row(key, comparison.systems, predictions))
    return Gallery(
        title=comparison.title,
        systems=comparison.systems,
        names=comparison.names,
        rows={language: of for language, of in rows.items() if of},
        with_images=bool(pictured),
    )


def _row(key: str, systems: Sequence[System], predictions: Sequence[Mapping[str, Prediction]]) -> GalleryRow:
    first = next(of[key] for of in predictions if key in of)
    image, note = None, "no image"
    for system, of in zip(systems, predictions, strict=True):
        kept = of[key].image if key in of else None
        if image is None and kept:
            image, note = read_image(system.stored.directory, kept)
    return GalleryRow(
        row=key,
        language=first.lang,
        title=_clean(first.title),
        image=image,
        image_note=note,
        references=[_clean(reference) for reference in first.all_references],
        captions=[_caption(of.get(key)) for of in predictions],
    )


def _caption(prediction: Prediction | None) -> Caption:
    if prediction is None:
        return Caption(text="", absent=True)
    text = prediction.generated_caption
    exact = text.strip() in {reference.strip() for reference in prediction.all_references}
    return Caption(text=_clean(text), exact=exact and not prediction.error, error=_clean(prediction.error or ""))


def _clean(text: str) -> str:
    """A text without what no page and no font can show: control characters and halves of surrogate pairs."""
    return "".join("\ufffd" if unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t" else one for one in text)


def read_image(directory: Path, name: str) -> tuple[bytes | None, str]:
    """A small JPEG of an evaluation's image, and a note that says why when it cannot be shown."""
    found = file_image(directory, name)
    try:
        image = found.load()
    except ImageError as error:
        return None, str(error)
    image.thumbnail((PIXELS, PIXELS))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=88)
    return packed.getvalue(), ""
