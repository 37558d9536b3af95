"""inft logs: follow, sum up and plot the logs of runs, also while they are being written."""

from pathlib import Path
from typing import Annotated

import typer

from inft.cli.console import make_console
from inft.cli.fields import field_option
from params.basic import BasicParams

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
Task = Annotated[str | None, typer.Argument(metavar="TASK", help="Such as aya_basic (default: the newest log).")]
AnyTask = Annotated[str | None, typer.Argument(metavar="TASK", help="Such as aya_basic (default: every log).")]
LogsDir = Annotated[Path, field_option("basic.logs_dir", metavar="DIR")]
LOGS = Path(BasicParams.logs_dir)


@app.callback()
def logs() -> None:
    """Follow, sum up and plot the logs of runs.

    Also while they are being written.
    """


@app.command()
def tail(
    task: Task = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Events from the end.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until Ctrl-C.")] = False,
    logs_dir: LogsDir = LOGS,
) -> None:
    """Print the last events of a log, a line each."""
    from inft.cli.logtext import event_line
    from inft.training.logfiles import find_log, followed_events
    from inft.training.runlog import read_events

    path = find_log(logs_dir, task)
    console = make_console()
    stream = followed_events(path, last=lines) if follow else list(read_events(path))[-lines:]
    for event in stream:
        console.print(event_line(event), soft_wrap=True)


@app.command()
def show(task: AnyTask = None, logs_dir: LogsDir = LOGS) -> None:
    """Print a table of runs.

    When each began, on what, how far and how well it went, and how it ended.
    """
    from inft.cli.logtext import runs_table
    from inft.training.logfiles import all_logs, find_log, split_runs, task_of
    from inft.training.runlog import read_events

    paths = [find_log(logs_dir, task)] if task else all_logs(logs_dir)
    make_console().print(runs_table((task_of(path), run) for path in paths for run in split_runs(read_events(path))))


@app.command()
def plot(
    task: Task = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PNG", help="Default: beside the log.")
    ] = None,
    logs_dir: LogsDir = LOGS,
) -> None:
    """Draw the curves of the last run as a PNG.

    Loss, learning rate, gradient norm and evaluation loss, with CRAFT its two losses and the contrastive accuracy,
    with those of the runs that it went on from.
    """
    from inft.training.curves import plot_run
    from inft.training.logfiles import find_log, last_run, task_of
    from inft.training.runlog import read_events

    path = find_log(logs_dir, task)
    target = output or path.with_suffix(".png")
    plot_run(last_run(read_events(path)), title=task_of(path), target=target)
    typer.echo(f"wrote {target}")
