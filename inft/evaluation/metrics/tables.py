"""Scores of one or several systems as a table for the terminal, as CSV and as LaTeX."""

import csv
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from inft.evaluation.metrics import ALL, METRICS, Metric, Score, Scores

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Systems = Mapping[str, Scores]  # name, such as "aya base, zero-shot" -> its scores

CSV_COLUMNS = ("system", "language", "metric", "value", "low", "high")
INTERVAL_NOTE = "± half the width of the 95 % bootstrap interval"
LATEX_CAPTION = "Scores per language, with 95 % bootstrap intervals."
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "{''}",
    "–": "--",
    "×": r"$\times$",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def scores_table(systems: Systems, *, language_names: Mapping[str, str] | None = None, signed: bool = False) -> "Table":
    """Return the scores as a table for the terminal.

    One system: a row per language and a column per metric. Several: a block per metric with a row per system and a
    column per language, the best of each column bold. ``signed`` is for differences: gains with a +, nothing bold.
    """
    if len(systems) == 1:
        return _table_of_one(next(iter(systems.values())), language_names or {}, signed=signed)
    return _table_of_several(systems, signed=signed)


def scores_csv(systems: Systems) -> str:
    """Return the scores as CSV text: a line for each system, language and metric, numbers in full."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for system, scores in systems.items():
        for language, of in scores.items():
            for name, score in of.items():
                writer.writerow((system, language, name, score.value, score.low, score.high))
    return lines.getvalue()


def scores_latex(systems: Systems, *, caption: str = LATEX_CAPTION, signed: bool = False) -> str:
    r"""Return the scores as a LaTeX table* for \input: a block per metric, a row per system, a column per language.

    Intervals stand as index and exponent, the best of each column is bold; ``signed`` as in scores_table. A table wider
    than the text is scaled down to it. The document must load the packages booktabs and graphicx.
    """
    languages = languages_of(systems)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}l*{{{len(languages)}}}{{r}}@{{}}}}",
        r"\toprule",
        rf"{' & '.join(['', *map(latex_text, languages)])} \\",
    ]
    for name in metrics_of(systems):
        section = rf"\emph{{{latex_text(METRICS[name].title)}}}"
        lines += [r"\midrule", rf"\multicolumn{{{len(languages) + 1}}}{{@{{}}l}}{{{section}}} \\"]
        for system in systems:
            cells = [_latex_cell(systems, system, language, name, signed=signed) for language in languages]
            # Braces: a name that begins with [ or * would be an argument of the command before it.
            lines.append(rf"{' & '.join([f'{{{latex_text(system)}}}', *cells])} \\")
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{latex_text(caption)}}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """A text in one line with LaTeX's special characters escaped."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


def languages_of(systems: Systems) -> list[str]:
    """The languages of all systems in order of first appearance, and ALL last."""
    found = dict.fromkeys(language for scores in systems.values() for language in scores)
    return sorted(found, key=lambda language: language == ALL)


def metrics_of(systems: Systems) -> list[str]:
    """The metrics that some system has, in the order of METRICS."""
    found = {name for scores in systems.values() for of in scores.values() for name in of}
    return [name for name in METRICS if name in found]


def best_systems(systems: Systems, language: str, name: str) -> set[str]:
    """The systems whose score of a metric, as it is printed, no other one beats; none when all are equal."""
    higher = METRICS[name].higher_is_better
    having = {system: scores[language][name] for system, scores in systems.items() if name in scores.get(language, {})}
    printed = {system: float(number(METRICS[name], score.value)) for system, score in having.items()}
    if higher is None or len(set(printed.values())) < 2:
        return set()
    best = max(printed.values()) if higher else min(printed.values())
    return {system for system, value in printed.items() if value == best}


def number(metric: Metric, value: float, *, signed: bool = False) -> str:
    """A value with the metric's decimals; never a negative zero."""
    rounded = round(value, metric.decimals) + 0.0
    return f"{rounded:{'+' if signed else ''}.{metric.decimals}f}"


def _table_of_one(scores: Scores, language_names: Mapping[str, str], *, signed: bool) -> "Table":
    from rich.text import Text

    metrics = metrics_of({"": scores})
    table = _empty_table()
    table.add_column("language", overflow="fold")
    for name in metrics:
        heading = METRICS[name].title.replace(" ", "\n")
        table.add_column(f"{heading} {METRICS[name].unit}".rstrip(), justify="right", vertical="bottom")
    for language in languages_of({"": scores}):
        cells = [_terminal_cell(scores[language].get(name), METRICS[name], " ", signed=signed) for name in metrics]
        label = Text(language_names.get(language, language))
        table.add_row(label, *cells, style="bold" if language == ALL else "")
    return table


def _table_of_several(systems: Systems, *, signed: bool) -> "Table":
    from rich.text import Text

    languages = languages_of(systems)
    table = _empty_table()
    table.add_column("", overflow="fold")
    for language in languages:
        table.add_column(Text(language), justify="right", overflow="fold")
    for name in metrics_of(systems):
        table.add_row(Text(f"{METRICS[name].title} {METRICS[name].unit}".rstrip(), style="bold cyan"))
        best = {language: set() if signed else best_systems(systems, language, name) for language in languages}
        for system, scores in systems.items():
            cells = []
            for language in languages:
                cell = _terminal_cell(scores.get(language, {}).get(name), METRICS[name], "\n", signed=signed)
                cell.stylize("bold" if system in best[language] else "")
                cells.append(cell)
            table.add_row(Text(system), *cells)
    return table


def _empty_table() -> "Table":
    from rich.table import Table

    # One column of padding: eleven columns of scores fit into 80.
    return Table(
        box=None,
        header_style="bold",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=INTERVAL_NOTE,
        caption_justify="left",
    )


def _terminal_cell(score: Score | None, metric: Metric, between: str, *, signed: bool) -> "Text":
    """A value with half the width of its interval behind or below it, where that is not 0 as printed."""
    from rich.text import Text

    if score is None:
        return Text("–")
    cell = Text(number(metric, score.value, signed=signed))
    half = (score.high - score.low) / 2
    shown = f"{half:.0f}" if half >= 9.95 else number(metric, half)  # two digits say enough of a width
    if float(shown):
        cell.append(f"{between}±{shown}", style="dim")
    return cell


def _latex_cell(systems: Systems, system: str, language: str, name: str, *, signed: bool) -> str:
    """A value in maths with low and high below and above it, where they differ as printed."""
    score = systems[system].get(language, {}).get(name)
    if score is None:
        return "--"
    value, low, high = (number(METRICS[name], part, signed=signed) for part in (score.value, score.low, score.high))
    shown = rf"\mathbf{{{value}}}" if not signed and system in best_systems(systems, language, name) else value
    return f"${shown}$" if low == high else rf"${shown}_{{\,{low}}}^{{\,{high}}}$"
