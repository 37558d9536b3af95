"""inft caption: print captions of images."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inft.cli.adapted import Adapter, Demo, Model, ModelName, NoQuantize, Set, refuse_early, resolve
from inft.cli.fields import field_option
from params.errors import UserError

if TYPE_CHECKING:
    from inft.evaluation.records import Prediction

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

LONGEST_NAME = 255  # bytes of a file's name
TEXT_FILES = (".txt", ".md", ".text", ".html", ".json")
SOME_FAILED = 1  # exit status when an image could not be captioned


@app.command()
def caption(
    model: Model,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE…", help="Files; none for a text model, which reads --news.")
    ] = None,
    adapter: Adapter = None,
    demo: Demo = False,
    model_name: ModelName = None,
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Of the captions (default: the first that the adapter knows).")
    ] = None,
    news: Annotated[
        str | None, typer.Option(metavar="TEXT|FILE", help="The article that the images belong to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: image, language, caption.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy search.")] = False,
    temperature: Annotated[str | None, field_option("basic.gen_temperature", metavar="T")] = None,
    top_p: Annotated[str | None, field_option("basic.gen_top_p", metavar="P")] = None,
    num_beams: Annotated[str | None, field_option("basic.gen_num_beams", metavar="N")] = None,
    max_new_tokens: Annotated[str | None, field_option("basic.gen_max_new_tokens", metavar="N")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Of --sample (default 42).")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, help="Images at a time (8).")] = None,
    no_quantize: NoQuantize = False,
    overrides: Set = None,
) -> None:
    """Print captions of images.

    With a stored adapter, or without one what the base model says. Images that cannot be read are named on stderr, the
    others are captioned, and the exit status is 1.
    """
    from inft.cli.extras import require_extras

    if not sample and (temperature or top_p or seed):
        raise UserError("--temperature, --top-p and --seed are for sampling: add --sample.")
    require_extras("peft", "accelerate")
    flags: dict[str, Any] = {
        "sample": sample,
        "temperature": temperature,
        "top_p": top_p,
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "quantize": False if no_quantize else None,
    }
    params = resolve(
        model, adapter, flags, demo=demo, model_name=model_name, overrides=overrides or (), batch_size=batch_size
    )
    refuse_early(params)
    from inft.evaluation.caption import caption_images, caption_rows

    rows = caption_rows(params, images or [], language=language, news=read_news(news))
    failed = 0
    for prediction in caption_images(params, rows):
        failed += prediction.error is not None
        print_caption(prediction, as_json=as_json, several=len(rows) > 1)
    if failed:
        raise typer.Exit(SOME_FAILED)


def read_news(news: str | None) -> str:
    """The news text itself, or what the file of that name holds."""
    if news is None:
        return ""
    path = Path(news).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--news {news}: not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        if len(news) > LONGEST_NAME:  # a text, too long for the name of a file
            return news
        raise UserError(f"--news {news}: cannot be read: {error.strerror}.") from error
    if not any(character.isspace() for character in news) and path.suffix in TEXT_FILES:
        raise UserError(f"--news {news}: there is no such file; a text of one word needs no ending.")
    return news


def print_caption(prediction: "Prediction", *, as_json: bool, several: bool) -> None:
    """One line; of several images with the file's name before it. What went wrong goes to stderr."""
    if prediction.error is not None and not as_json:
        print(f"error: {prediction.error}", file=sys.stderr)
        return
    if as_json:
        values = {"image": prediction.where, "language": prediction.lang, "caption": prediction.generated_caption}
        typer.echo(json.dumps(values | ({"error": prediction.error} if prediction.error else {}), ensure_ascii=False))
    else:
        typer.echo(f"{prediction.where}\t{prediction.generated_caption}" if several else prediction.generated_caption)
