"""Tables as values, written as Markdown, LaTeX (booktabs) and for the terminal; and tidy CSV files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from deftx.report.bootstrap import METRICS, confusion, labels_held
from deftx.report.sections import MEAN, Column
from deftx.report.summary import MARKED_SEEDS, Difference, Score, Summary

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDEST = 6  # columns of methods; more methods than this become rows


@dataclass(frozen=True)
class Text:
    """The text of a cell."""

    text: str
    bold: bool = False


@dataclass
class Table:
    """A table of texts.

    Attributes:
        name: Name of its files.
        title: The line above it.
        header: Titles of the columns; the first column is text, the others are numbers.
        rows: Its cells, row by row.
        ruled: Numbers of the rows that have a line above them.
        caption: What a reader needs beside the numbers.
        behind: Whether the terminal shows it on request alone.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[Text]]
    ruled: list[int] = field(default_factory=list)
    caption: str = ""
    behind: bool = False

    @property
    def width(self) -> int:
        """Its width on the terminal in characters."""
        rows = [self.header, *([cell.text for cell in row] for row in self.rows)]
        return sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)) + 1

    def markdown(self) -> str:
        """Return it as GitHub's Markdown."""
        rows = [
            [_markdown(cell.text) if not cell.bold else f"**{_markdown(cell.text)}**" for cell in row]
            for row in self.rows
        ]
        lines = [f"**{_markdown(self.title)}**", ""]
        lines.append("| " + " | ".join(map(_markdown, self.header)) + " |")
        lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(self.header) - 1)]) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([*lines, "", _markdown(self.caption), ""])

    def latex(self) -> str:
        r"""Return it as a ``table`` with booktabs rules; the document needs ``\usepackage{booktabs}``."""
        import pandas as pd

        rows = [[f"\\textbf{{{latex(c.text)}}}" if c.bold else latex(c.text) for c in row] for row in self.rows]
        for number in self.ruled:
            rows[number][0] = f"\\midrule\n{rows[number][0]}"  # Styler draws rules around the header alone
        frame = pd.DataFrame(rows, columns=[latex(text) for text in self.header])
        text = frame.style.hide(axis="index").to_latex(
            column_format="l" + "r" * (len(self.header) - 1),
            position_float="centering",
            hrules=True,
            caption=f"{latex(self.title)}. {latex(self.caption)}",
            label=f"tab:{_label(self.name)}",
        )
        return "% needs \\usepackage{booktabs}\n" + text.replace("\\centering", "\\centering\n\\small", 1)

    def rich(self) -> RichTable:
        """Return it as a table for the terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text as RichText

        table = RichTable()
        for number, text in enumerate(self.header):
            table.add_column(RichText(text), justify="right" if number else "left", no_wrap=True)
        for number, row in enumerate(self.rows):
            if number in self.ruled:
                table.add_section()
            table.add_row(*(RichText(cell.text, style="bold" if cell.bold else "") for cell in row))
        return table


def score_table(summary: Summary, columns: Sequence[Column] = (), name: str = "scores", title: str = "Scores") -> Table:
    """Lay out languages × methods, mean ± standard deviation over seeds, × 100.

    Args:
        summary: A section's summary.
        columns: What to show; default: every column.
        name: What the names of its files end with.
        title: What its title begins with.
    """
    section = summary.section
    columns = columns or section.columns
    cell, caption = _score_cells(summary, columns)
    caption = f"{caption}; n: examples; bold: the highest of its language."
    return laid_out(summary, columns, cell, f"{section.slug}-{name}", f"{title}: {section.title}", caption)


def lead_table(summary: Summary) -> Table | None:
    """Lay out methods × languages and their mean under names fit for a paper; below them what no model is needed for.

    Two rows stand for guesses: always the label that is most frequent among the gold rows, and each label with equal
    probability (its expected score; of macro-F1, F1 of the expected counts).

    Returns:
        None where no method was evaluated.
    """
    section = summary.section
    columns = sorted(section.named(section.methods), key=lambda column: _LEAD.get(column.condition, len(_LEAD)))
    if not columns:
        return None
    cell, caption = _score_cells(summary, columns)
    header = ["method", *(f"mean of {len(section.languages)}" if row == MEAN else row for row in summary.rows)]
    rows = [[Text(column.paper_name), *(cell(column, row) for row in summary.rows)] for column in columns]
    guesses = {name: _guess(summary, score) for name, score in _GUESSES.items()}
    rows += [
        [Text(name), *(Text(f"{100 * values[row]:.1f}" if row in values else "–") for row in summary.rows)]
        for name, values in guesses.items()
        if values
    ]
    caption = f"{caption}; bold: the highest of its language."
    if any(guesses.values()):
        caption += " Majority: always the most frequent label of the gold rows; chance: every label as likely."
    ruled = [len(columns)] if len(rows) > len(columns) else []
    return Table(f"{section.slug}-main", f"Scores: {section.title}", header, rows, ruled, caption)


_LEAD = {"deftx": 0, "ltsft": 1}
Counts = npt.NDArray[np.int64]


def _majority(gold: Counts, classes: int, metric: str) -> float:
    predicted = np.full((1, len(gold)), np.bincount(gold, minlength=classes).argmax())
    weights = np.ones((1, len(gold)), dtype=np.float32)
    return float(METRICS[metric](confusion(weights, gold, predicted, classes), labels_held(gold, classes)).mean())


def _chance(gold: Counts, classes: int, metric: str) -> float:
    share = np.bincount(gold, minlength=classes) / len(gold)
    if metric == "accuracy":
        return 1 / classes
    held = share[share > 0]
    return float((2 * held / classes / (held + 1 / classes)).mean())


_GUESSES: dict[str, Callable[[Counts, int, str], float]] = {"majority": _majority, "chance": _chance}


def _guess(summary: Summary, score: Callable[[Counts, int, str], float]) -> dict[str, float]:
    """Return a guess's score by row; empty where the gold rows of a language are not at hand."""
    section = summary.section
    golds = {
        language: cell.items.gold
        for (_, language, _), cell in reversed(section.cells.items())
        if cell.items is not None and len(cell.items.gold)
    }
    if section.metric not in METRICS or len(section.classes) < 2 or set(golds) != set(section.languages):
        return {}
    values = {language: score(gold, len(section.classes), section.metric) for language, gold in golds.items()}
    return values | {MEAN: sum(values.values()) / len(values)}


def _score_cells(summary: Summary, columns: Sequence[Column]) -> tuple[Callable[[Column, str], Text], str]:
    """Return what makes the cells of a table of scores, and the beginning of its caption."""
    section = summary.section
    most = len(summary.seeds)
    best = {
        row: max(score.mean for column in columns if (score := summary.scores.get((column, row))) is not None)
        for row in summary.rows
        if any((column, row) in summary.scores for column in columns)
    }

    def cell(column: Column, row: str) -> Text:
        score = summary.scores.get((column, row))
        if score is None:
            return Text("–")
        present = len(section.languages) - len(score.missing)
        marks = [f"{present} of {len(section.languages)}"] if score.missing else []
        marks += [_seeds(len(score.values))] if len(score.values) < most else []
        text = score_text(score) + (f" ({', '.join(marks)})" if marks else "")
        return Text(text, bold=len(columns) > 1 and not marks and score.mean == best[row])

    spread = f"mean ± standard deviation over {_seeds(most)}" if most > 1 else f"one seed ({summary.seeds[0]})"
    return cell, f"{section.metric_name} × 100, {spread}"


def difference_table(summary: Summary) -> Table | None:
    """Lay out differences to the baseline with their intervals; None where nothing can be compared."""
    columns = [column for column in summary.section.columns if column in summary.baselines]
    if not columns or summary.baseline is None:
        return None
    most = len(summary.seeds)

    def cell(column: Column, row: str) -> Text:
        difference = summary.differences.get((column, row))
        if difference is None:
            return Text("–")
        marks = f" ({_seeds(len(difference.seeds))})" if len(difference.seeds) < most else ""
        return Text(difference_text(difference) + marks, bold=summary.marked(column, row))

    named = {
        baseline.title if baseline.condition == summary.baseline else baseline.label
        for baseline in summary.baselines.values()
    }
    against = " / ".join(sorted(named))
    alone = "the mean" if len(summary.rows) > 1 else "the language"
    marks = f"bold: zero is outside, for {alone} alone and from {MARKED_SEEDS} seeds on"
    caption = f"{summary.section.metric_name} × 100 minus {against}'s; {summary.method()}; {marks}."
    title = f"Difference to {against}: {summary.section.title}"
    return laid_out(summary, columns, cell, f"{summary.section.slug}-differences", title, caption)


class Labelled(Protocol):
    """What a table has a column for, or a row."""

    @property
    def label(self) -> str:
        """Its title."""

    @property
    def condition(self) -> str:
        """What tells groups of rows apart."""


def laid_out(
    summary: Summary,
    columns: Sequence[Labelled],
    cell: Callable[[Any, str], Text],
    name: str,
    title: str,
    caption: str,
    *,
    sizes: bool = True,
) -> Table:
    """Build a table whose rows are languages, or methods where there are many.

    Args:
        summary: Has the languages.
        columns: What is shown of each language.
        cell: The text of one of them in a row.
        name: Name of the table's files.
        title: The line above it.
        caption: What stands below.
        sizes: Whether the numbers of examples are shown.
    """
    rows = summary.rows
    examples = [Text(_size(summary, row)) for row in rows]
    shown = {row: f"mean of {len(summary.section.languages)}" if row == MEAN else row for row in rows}
    last = [len(rows) - 1] if MEAN in rows else []
    if len(columns) <= max(WIDEST, len(rows)) and len(columns) <= 2 * WIDEST:
        header = ["target", *(["n"] if sizes else []), *(column.label for column in columns)]
        cells = [
            [Text(shown[row]), *([size] if sizes else []), *(cell(column, row) for column in columns)]
            for row, size in zip(rows, examples, strict=True)
        ]
        return Table(name, title, header, cells, last, caption)
    header = ["method", *(shown[row] for row in rows)]
    first = [[Text("n"), *examples]] if sizes else []
    cells = first + [[Text(column.label), *(cell(column, row) for row in rows)] for column in columns]
    ruled = [
        number + len(first)
        for number, column in enumerate(columns)
        if number == 0 or column.condition != columns[number - 1].condition
    ]
    return Table(name, title, header, cells, ruled, caption)


def _size(summary: Summary, row: str) -> str:
    if row == MEAN:
        return ""
    sizes = sorted({cell.n for (_, language, _), cell in summary.section.cells.items() if language == row})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def score_text(score: Score) -> str:
    """Return a score as ``61.3 ± 0.8``."""
    return f"{100 * score.mean:.1f}" + (f" ± {100 * score.std:.1f}" if score.std is not None else "")


def difference_text(difference: Difference) -> str:
    """Return a difference as ``+1.2 [−0.3, 2.7]``."""
    text = _signed(difference.value, plus=True)
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float, *, plus: bool = False) -> str:
    text = f"{abs(100 * value):.1f}"
    if text == "0.0":
        return text
    return f"−{text}" if value < 0 else f"+{text}" if plus else text


# ------------------------------------------------------------------------------------------------------ tidy CSV


NAMED = ("study", "task", "split", "model", "base", "metric", "condition", "setting", "language")
"""Columns of both files that name a score."""


def scores_csv(summaries: Sequence[Summary]) -> str:
    """Return CSV with one row for each score of each seed, as fractions: :data:`NAMED`, seed, value, n, run."""
    rows = [
        [*_named(summary, column, language), seed, cell.value, cell.n, cell.run.name]
        for summary in summaries
        for (column, language, seed), cell in summary.section.cells.items()
    ]
    return _csv([*NAMED, "seed", "value", "n", "run"], rows)


def summary_csv(summaries: Sequence[Summary]) -> str:
    """Return CSV with one row for each cell of the tables: mean, spread, difference, interval."""
    header = [*NAMED, "mean", "std", "seeds", "n", "languages"]
    header += ["baseline", "difference", "low", "high", "confidence", "resamples"]
    rows = []
    for summary in summaries:
        for column, row in product(summary.section.columns, summary.rows):
            score = summary.scores.get((column, row))
            if score is None:
                continue
            languages = len(summary.section.languages) - len(score.missing) if row == MEAN else 1
            values = [*_named(summary, column, row), score.mean, score.std, len(score.values), score.n, languages]
            difference = summary.differences.get((column, row))
            if difference is not None:
                values += [summary.baselines[column].label, difference.value, difference.low, difference.high]
                if difference.low is not None:
                    values += [summary.options.confidence, summary.options.samples]
            rows.append(values + [None] * (len(header) - len(values)))
    return _csv(header, rows)


def _named(summary: Summary, column: Column, language: str) -> list[Any]:
    return [*summary.section.key, column.condition, column.setting, language]


def _csv(header: list[str], rows: list[list[Any]]) -> str:
    import pandas as pd

    # Objects: a whole number stays one beside a missing value.
    frame = pd.DataFrame([[_safe(value) for value in row] for row in rows], columns=header, dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def _safe(value: Any) -> Any:
    """Quote a text that a spreadsheet would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "@", "+", "\t") else value


# ------------------------------------------------------------------------------------------------------ escaping

_LATEX = {
    "\\": "\\textbackslash{}",
    "&": "\\&",
    "%": "\\%",
    "$": "\\$",
    "#": "\\#",
    "_": "\\_",
    "{": "\\{",
    "}": "\\}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "±": "$\\pm$",
    "−": "$-$",
    "×": "$\\times$",
    "–": "--",
    "·": "$\\cdot$",
    "θ": "$\\theta$",
    "φ": "$\\varphi$",
}


def latex(text: str) -> str:
    """Escape a text for LaTeX."""
    return "".join(_LATEX.get(char, char) for char in " ".join(text.split()))


def _label(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9:.-]+", "-", name)


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;")
