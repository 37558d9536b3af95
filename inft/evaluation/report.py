"""write_report(): runs and their evaluations as one self-contained HTML page, and its figures as PNG files.

gather → compare → draw → render → write
"""

import re
import shlex
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inft.evaluation import report_plots as plots
from inft.evaluation.fonts import FONTS_EXTRA, PageFonts, installed_fonts, missing_characters, page_fonts
from inft.evaluation.report_compare import Comparison, System, colours_of, comparisons
from inft.evaluation.report_forgetting import Forgotten, forgetting_tables, forgotten, loss_table
from inft.evaluation.report_gallery import Gallery, galleries
from inft.evaluation.report_parameters import parameters, settings
from inft.evaluation.report_runs import Gathered, Run, gather
from inft.evaluation.report_sheet import gallery_text
from inft.evaluation.report_tables import drift, scores, summary
from inft.training.storage import STAGING, disk_trouble
from params.errors import UserError

MARK = '<meta name="generator" content="inft report">'
TEMPLATES = Path(__file__).parent / "templates"
PNG_FILES = re.compile(r"(curves|languages|forgetting|drift|gallery)(_\d+)?\.png")
NAMED = 40  # characters without a glyph that are listed


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a report came to."""

    page: Path
    pictures: Sequence[Path]
    notes: Sequence[str]  # what a reader of the page may miss, and the remedy


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a page shows."""

    gathered: Gathered
    compared: Sequence[Comparison]
    forgotten: Sequence[Forgotten]
    galleries: Sequence[Gallery]

    @property
    def drifting(self) -> Sequence[System]:
        """The systems whose drift was measured."""
        systems = [system for comparison in self.compared for system in comparison.systems]
        return [system for system in systems if system.stored.drift is not None]


def write_report(
    directories: Sequence[Path],
    *,
    output: Path,
    metric_dir: Path | None = None,
    png: bool = True,
    overwrite: bool = False,
) -> Written:
    """Write the report of runs and evaluations to ``output`` and, with ``png``, its figures to a directory beside it.

    Errors: UserError for what is no run, for damaged files, and for a file at ``output`` that no report wrote, unless
    ``overwrite``. Nothing is half-written: each file appears whole.
    """
    pictures_dir = output.with_name(f"{output.stem}_png")
    _refuse_foreign(output, overwrite=overwrite)
    if png and pictures_dir.exists() and not pictures_dir.is_dir():
        raise UserError(
            f"{pictures_dir} is a file; the figures need a directory there. Choose another -o, or --no-png."
        )

    others = [path.name for path in pictures_dir.glob("*.png") if PNG_FILES.fullmatch(path.name)] if png else []
    if others and not overwrite and not output.exists():
        raise UserError(
            f"{pictures_dir} holds {others[0]}, and no report lies beside it: its files would be replaced. Choose "
            "another -o, add --no-png, or replace them by --overwrite."
        )
    gathered = gather(directories, metric_dir=metric_dir)
    compared = comparisons(gathered)
    content = Content(
        gathered=gathered, compared=compared, forgotten=forgotten(compared), galleries=galleries(compared)
    )
    drawn = draw(content)
    page = render(content, drawn)
    files = _write_pictures(pictures_dir, [*drawn.values(), *draw_sheets(content)]) if png else []
    _put(output, page.encode("utf-8", "replace"))
    return Written(page=output, pictures=files, notes=[*gathered.notes, *_about_fonts(content)])


def draw(content: Content) -> dict[str, plots.Picture]:
    """The figures of the page by their names, each only when there is something to draw."""
    drawn = {"curves": plots.curves(content.gathered.runs)}
    drawn |= {
        _numbered("languages", number): plots.languages(comparison)
        for number, comparison in enumerate(content.compared)
    }
    drawn |= {"forgetting": plots.forgetting(content.forgotten), "drift": plots.drift(content.drifting)}
    return {name: replace(picture, name=name) for name, picture in drawn.items() if picture is not None}


def draw_sheets(content: Content) -> list[plots.Picture]:
    """The galleries as figures, which the page has as tables."""
    drawn = {_numbered("gallery", number): plots.gallery(one) for number, one in enumerate(content.galleries)}
    return [replace(picture, name=name) for name, picture in drawn.items() if picture is not None]


def _numbered(name: str, number: int) -> str:
    """The name of a comparison's figure: languages, then languages_2 and so on."""
    return name if number == 0 else f"{name}_{number + 1}"


def render(content: Content, drawn: Mapping[str, plots.Picture]) -> str:
    """The page as HTML; everything that comes from data or logs is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    values = _values(content, drawn)
    bare = template.render(**values, fonts=PageFonts(fonts=(), families=(), by_language={}))
    return template.render(**values, fonts=page_fonts(_texts(content, bare)))


def _values(content: Content, drawn: Mapping[str, plots.Picture]) -> dict[str, Any]:
    """What the template reads."""
    runs = content.gathered.runs
    colours = colours_of(runs)
    trained = [run for run in runs if run.training is not None]
    short, whole = parameters(runs, colours) if trained else (None, None)
    return {
        "title": ", ".join([run.label for run in runs] or [stored.name for stored in content.gathered.bases]),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": runs,
        "notes": content.gathered.notes,
        "summary": summary(runs, content.compared, colours) if runs else None,
        "parameters": short,
        "all_parameters": whole,
        "curves": drawn.get("curves"),
        "without_log": [run for run in trained if run.training is not None and not run.training.events],
        "comparisons": [
            {
                "of": comparison,
                "bars": drawn.get(_numbered("languages", number)),
                "scores": scores(comparison),
                "settings": settings(comparison),
                "base_command": _base_command(comparison),
            }
            for number, comparison in enumerate(content.compared)
        ],
        "unevaluated": [(run, _evaluate_command(run)) for run in trained if not run.evaluations],
        "metric_dirs": [str(path) for path in content.gathered.metric_dirs],
        "forgetting": drawn.get("forgetting"),
        "forgotten": [(one, forgetting_tables(one), loss_table(one)) for one in content.forgotten],
        "drift": drawn.get("drift"),
        "drift_table": drift(content.drifting) if content.drifting else None,
        "galleries": content.galleries,
        "example": _evaluate_command(trained[0]) if trained else "inft evaluate MODEL --adapter DIR",
    }


def _evaluate_command(run: Run) -> str:
    """The command that evaluates a run's adapter."""
    assert run.training is not None
    return f"inft evaluate {run.training.params.model} --adapter {shlex.quote(str(run.training.best_dir))}"


def _base_command(comparison: Comparison) -> str:
    """The command that evaluates the base of a comparison that has none; empty when it has one."""
    if comparison.has_base:
        return ""
    of = comparison.systems[0].stored.evaluation
    same = f"--data {shlex.quote(of.data)} --split {shlex.quote(of.split)} --languages {','.join(of.languages)}"
    limit = f" --limit {of.limit}" if of.limit else ""
    return f"inft evaluate {of.model} --base --adapter {shlex.quote(of.adapter or '')} {same}{limit}"


def _texts(content: Content, bare: str) -> list[tuple[str | None, str]]:
    """Every text of the page with its language, where it has one."""
    found: list[tuple[str | None, str]] = []
    for gallery in content.galleries:
        for row in (row for rows in gallery.rows.values() for row in rows):
            written = [row.title, *row.references, *(caption.text for caption in row.captions)]
            found += [(row.language, text) for text in written]
    of_rows = {character for _, text in found for character in text}
    return [*found, (None, string.printable + "".join(set(bare) - of_rows))]


def _about_fonts(content: Content) -> list[str]:
    """What the figures cannot show for want of fonts."""
    if not installed_fonts():
        return [
            f"No fonts for all scripts are installed, so that some text may show as boxes: {FONTS_EXTRA} brings them."
        ]
    missing = missing_characters("".join(gallery_text(gallery) for gallery in content.galleries))
    return [f"No font here has these characters, boxes in the PNG files: {missing[:NAMED]}"] if missing else []


def _refuse_foreign(output: Path, *, overwrite: bool) -> None:
    """UserError when something stands at ``output`` that no report wrote."""
    if output.is_dir():
        raise UserError(f"{output} is a directory: name a file, such as -o {output / 'report.html'}.")
    if overwrite or not output.exists():
        return
    with output.open("rb") as file:
        head = file.read(4096)
    if MARK.encode() not in head:
        raise UserError(f"{output} exists and is no report of inft: choose another -o, or replace it by --overwrite.")


def _write_pictures(directory: Path, pictures: Sequence[plots.Picture]) -> list[Path]:
    """Write the figures and remove those that an earlier report wrote and this one has not; other files stay."""
    files = {directory / f"{picture.name}.png": picture.png for picture in pictures}
    for path, content in files.items():
        _put(path, content)
    for path in directory.iterdir() if directory.is_dir() else []:
        if PNG_FILES.fullmatch(path.name) and path not in files:
            path.unlink()
    return list(files)


def _put(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, whole; UserError when it cannot be."""
    draft = path.with_name(f"{STAGING}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        if draft.is_file():
            draft.unlink()
        raise UserError(f"{path} cannot be written: {disk_trouble(error) or error.strerror}.") from error
