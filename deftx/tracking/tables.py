"""Scores on the terminal: one run, or the jobs of a sweep side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deftx.tracking.facts import SFTFacts
from deftx.tracking.results import CONDITIONS, Metric, finite, score_rows, title_of
from deftx.units import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["print_results", "print_steps", "print_sweep", "results_table"]


_NAMES = {"macro_f1": "macro-F1"}


def results_table(metrics: Sequence[Metric], *, metric: str | None = None, shared_source: bool = False) -> Table:
    """Lay out scores for the terminal: a row for each target and their mean, a column for each condition.

    Scores are multiplied by 100; the best of a row is bold. ``–`` is a score that was not asked for,
    ``failed`` one that could not be computed. A mean over fewer than all targets says so and is never bold:
    it does not compare.

    Args:
        metrics: scores of one run; targets stand in the order of their first score.
        metric: which metric to show when there are several; default: the first.
        shared_source: whether one φ_S stands under all task SFTs, which the titles then say.

    Raises:
        ValueError: two scores for one cell.
    """
    from rich.table import Table
    from rich.text import Text

    metric = metric or (metrics[0].metric if metrics else "")
    chosen = [score for score in metrics if score.metric == metric]
    rows, conditions = score_rows(chosen)
    counts = Counter((score.language, score.condition, score.split) for score in chosen)
    for (language, condition, _), count in counts.items():
        if count > 1:
            raise ValueError(f"two scores for {language}, {condition}: show one run at a time")

    table = Table()
    table.add_column("target")
    table.add_column("n", justify="right")
    for name in conditions:
        table.add_column(Text(title_of(name, shared_source=shared_source)), justify="right")
    for (_, split, language), row in rows.items():
        sizes = sorted({score.n for score in row.values()})
        size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        values = [finite(row[name].value) if name in row else None for name in conditions]
        texts = [
            f"{100 * value:.1f}" if value is not None else "failed" if name in row else "–"
            for name, value in zip(conditions, values, strict=True)
        ]
        table.add_row(Text(_of_split(language, split)), size, *_bold(texts, values))
    for split in dict.fromkeys(split for _, split, _ in rows):
        targets = [row for (_, of, _), row in rows.items() if of == split]
        if len(targets) == 1:
            continue
        table.add_section()
        means: list[float | None] = []
        texts = []
        for name in conditions:
            scored = [value for row in targets if name in row and (value := finite(row[name].value)) is not None]
            mean = sum(scored) / len(scored) if scored else None
            complete = len(scored) == len(targets)
            means.append(mean if complete else None)
            text = "–" if mean is None else f"{100 * mean:.1f}"
            texts.append(text if complete or mean is None else f"{text} ({len(scored)} of {len(targets)})")
        table.add_row(_of_split(f"mean of {len(targets)}", split), "", *_bold(texts, means))
    return table


def _of_split(label: str, split: str) -> str:
    return label if split == "test" else f"{label} ({split})"


def _bold(texts: Sequence[str], values: Sequence[float | None]) -> list[Any]:
    from rich.text import Text

    present = [value for value in values if value is not None]
    best = max(present) if len(present) > 1 else None
    pairs = zip(texts, values, strict=True)
    return [Text(text, style="bold" if value is not None and value == best else "") for text, value in pairs]


def print_results(
    metrics: Sequence[Metric],
    *,
    where: Mapping[str, object] | None = None,
    failed: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    title: str | None = None,
    shared_source: bool = False,
    console: Console | None = None,
) -> None:
    """Print a table for each metric, then notes, failed runs with their reasons, and where everything lies.

    Args:
        metrics: scores of one run; may be empty.
        where: what -> path, one line each.
        failed: name of a run -> the reason in one line.
        notes: remarks that belong to the numbers.
        title: what stands above the tables.
        shared_source: as for :func:`results_table`.
        console: default: standard output.
    """
    from rich.console import Console

    console = console or Console()
    for name in dict.fromkeys(score.metric for score in metrics):
        shown = f"{_NAMES.get(name, name)} × 100"
        _print_line(f"{title}: {shown}" if title else shown, console, style="bold")
        console.print(results_table(metrics, metric=name, shared_source=shared_source))
    if not metrics:
        console.print("no scores")
    lines = [f"note: {note}" for note in notes]
    lines += [f"failed: {name}: {reason}" for name, reason in (failed or {}).items()]
    width = max((len(name) for name in where or {}), default=0)
    lines += [f"{name:<{width}}  {path}" for name, path in (where or {}).items()]
    for line in lines:
        _print_line(line, console)


def print_coverage(coverage: Mapping[tuple[str, str], Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Print how the base's tokenizer cuts each language, before anything trains.

    Args:
        coverage: by language and ``text`` or ``rows``, ``fertility`` (pieces a word) and ``unknown`` (share of the
            pieces), None where there are no words.
        console: default: standard output.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table()
    table.add_column("language")
    for kind in ("text", "unknown", "rows", "unknown"):
        table.add_column(kind, justify="right")
    for code in dict.fromkeys(code for code, _ in coverage):
        cells: list[str] = []
        for kind in ("text", "rows"):
            facts = coverage.get((code, kind), {})
            fertility, unknown = facts.get("fertility"), facts.get("unknown")
            cells += [
                "–" if fertility is None else f"{fertility:.2f}",
                "–" if unknown is None else f"{100 * unknown:.1f}",
            ]
        table.add_row(code, *cells)
    _print_line("the tokenizer on each language: pieces a word, and unknown pieces in %", console, style="bold")
    console.print(table)


def print_steps(sfts: Sequence[SFTFacts], *, console: Console | None = None) -> None:
    """Print where a training step's time goes, for the phases that recorded it (``trainer.profile``).

    Args:
        sfts: of a run.
        console: default: standard output.
    """
    from rich.console import Console

    lines = []
    for sft in sfts:
        sparse = sft.metrics
        for phase, facts in (("full", sparse.get("full") or {}), ("sparse", sparse)):
            seconds = facts.get("profile") or {}
            step = sum(seconds.values())
            if step:
                shares = ", ".join(f"{part} {part_seconds / step:.0%}" for part, part_seconds in seconds.items())
                lines.append(
                    f"{sft.name}, {phase} phase: {1000 * step:.1f} ms ({shares}), "
                    f"{facts['tokens_per_second']:,.0f} tokens/s, padding {facts['padding']:.0%}, "
                    f"peak memory {size_text(facts['peak_memory'])}"
                )
    if lines:
        console = console or Console()
        _print_line("a training step's time (medians of a batch)", console, style="bold")
        for line in lines:
            _print_line(line, console)


def print_sweep(
    jobs: Sequence[tuple[str, Mapping[str, float], str | None]], *, title: str, shared_source: bool = False
) -> None:
    """Print a sweep's jobs side by side, scores multiplied by 100.

    Args:
        jobs: of each job, what was swept (``rank=8``), its mean scores by condition, and its error if it failed.
        title: what stands above.
        shared_source: as for :func:`results_table`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    present = {condition for _, scores, _ in jobs for condition in scores}
    conditions = [name for name in CONDITIONS if name in present]
    table = Table()
    table.add_column("job", overflow="fold")  # cut short, two jobs could read the same
    for name in conditions:
        table.add_column(Text(title_of(name, shared_source=shared_source)), justify="right")
    for swept, scores, error in jobs:
        cells = [f"{100 * scores[name]:.1f}" if name in scores else "failed" if error else "–" for name in conditions]
        table.add_row(Text(swept), *cells)
    console = Console()
    _print_line(title + (", mean over targets × 100" if conditions else ""), console, style="bold")
    console.print(table)


def _print_line(text: str, console: Console, *, style: str = "") -> None:
    # Unwrapped, so that a path can be copied. Titles are lines too: rich breaks a table's title at the table's width.
    from rich.text import Text

    console.print(Text(text, style=style), soft_wrap=True, highlight=False)
