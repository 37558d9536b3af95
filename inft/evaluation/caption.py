"""Captions of a few images, as `inft caption` prints them."""

from collections.abc import Sequence
from pathlib import Path

from inft.data.images import FileImage
from inft.data.languages import any_language_will_do
from inft.data.prompts import build_prompt
from inft.evaluation.captioner import load_captioner, search_of
from inft.evaluation.predict import Captioning, predict_rows
from inft.evaluation.records import Prediction
from inft.evaluation.rows import EvalRow
from inft.models import load_spec
from inft.sample import Sample
from inft.training.stored import read_adapter
from params.errors import UserError
from params.evaluation import EvalParams


def caption_rows(params: EvalParams, images: Sequence[Path], *, language: str | None, news: str) -> list[EvalRow]:
    """Return a row for each image, prompted as the adapter was trained; for a text model one row of the news text.

    Errors: UserError when there is nothing to caption, and for a language without a name for the prompt.
    """
    spec = load_spec(params.model)
    if spec.takes_images and not images:
        raise UserError(f"no image is given, and {spec.title} captions images: name at least one file.")
    if not spec.takes_images and images:
        raise UserError(f"{spec.title} take no images: leave the files out and give --news TEXT.")
    if not spec.takes_images and not news:
        raise UserError(f"{spec.title} caption what --news says: give it a text or a file.")
    if news and params.data.context == "none":
        raise UserError(
            "--news would have no effect: the prompts are without articles (data.context=none). Leave it out, or add "
            "--set data.context=content."
        )
    code = language or default_language(params)
    prompt = build_prompt(params.data, language=code, title=news, content=news)
    places: list[Path | None] = list(images) or [None]
    return [
        EvalRow(
            key=f"{number} {place}",
            sample=Sample(
                image=None if place is None else FileImage(place.expanduser()),
                prompt=prompt,
                answer="",
                language=code,
                meta={"where": str(place or "news"), "title": ""},
            ),
            references=("",),
        )
        for number, place in enumerate(places)
    ]


def default_language(params: EvalParams) -> str:
    """The first language that the adapter was trained in, where its run names some; else English, if there is any."""
    languages = params.data.languages
    if params.trained is not None and not any_language_will_do(params.trained):
        return params.trained.languages[0]
    return params.data.default_language if params.data.default_language in languages else languages[0]


def caption_images(params: EvalParams, rows: Sequence[EvalRow]) -> list[Prediction]:
    """Return the captions of the rows, in order; a row that could not be captioned has the reason instead."""
    stored = read_adapter(Path(params.adapter)) if params.adapter is not None else None
    captioner = load_captioner(params, stored)
    captioning = Captioning(
        model=captioner.model,
        collator=captioner.collator,
        max_new_tokens=params.basic.gen_max_new_tokens,
        batch_size=params.batch_size,
        search=search_of(params.basic),
    )
    by_key = {prediction.row: prediction for batch in predict_rows(captioning, rows) for prediction in batch}
    return [by_key[row.key] for row in rows]
