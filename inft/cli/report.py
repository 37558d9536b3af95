"""inft report: one HTML page on runs: parameters, curves, scores per language, forgetting, drift, a gallery."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(no_args_is_help=True)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output directories of inft train, or directories of inft evaluate."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="HTML", help="The page; its figures go to HTML's name + _png.")
    ] = Path("report.html"),
    metric_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where evaluations are looked for (default: the runs' basic.metric_dir)."),
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Write the figures as PNG files too.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is no report of inft.")] = False,
) -> None:
    """Write one HTML page about runs.

    It opens without network and sets the runs side by side: parameters with their differences, curves, scores per
    language with intervals, what was forgotten, how far the hidden states moved, and held-out rows with reference and
    captions before and after.
    """
    from inft.cli.console import make_console
    from inft.evaluation.report import write_report

    written = write_report(runs, output=output, metric_dir=metric_dir, png=png, overwrite=overwrite)
    console = make_console()
    for note in written.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"wrote {written.page} ({written.page.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)
    if written.pictures:
        names = ", ".join(path.name for path in written.pictures)
        console.print(f"wrote {written.pictures[0].parent}: {names}", markup=False, soft_wrap=True)
