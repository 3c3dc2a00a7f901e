"""Computes means over seeds, and differences to a baseline with intervals, for every cell of a section's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deftx.report.bootstrap import METRICS, Doubles, Resampler, confusion, interval, labels_held, shared_items
from deftx.report.sections import MEAN, Column, ScoreCell, Section

if TYPE_CHECKING:
    import pandas as pd

MARKED_SEEDS = 3  # fewer tell nothing of the spread over seeds
CELLS_AT_ONCE = 64  # cells in one matrix product; bounds its memory


@dataclass(frozen=True)
class Options:
    """How intervals are computed.

    Attributes:
        samples: Number of resamples.
        confidence: Level of the intervals, such as 0.95.
        seed: Seed of the draws.
    """

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A cell of the table of scores.

    Attributes:
        values: Scores by seed.
        n: Number of examples of one seed's score.
        missing: Languages that a mean lacks.
    """

    values: dict[int, float]
    n: int
    missing: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(list(self.values.values())))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A score minus its baseline's, over the seeds both have.

    Attributes:
        value: Mean over the seeds.
        seeds: The common seeds.
        low, high: Ends of the interval; None without one.
        why: Why there is no interval.
    """

    value: float
    seeds: tuple[int, ...]
    low: float | None = None
    high: float | None = None
    why: str = ""

    @property
    def clear(self) -> bool:
        """Whether the interval, as tables show it (× 100, one digit), leaves zero out."""
        if self.low is None or self.high is None:
            return False
        return float(f"{100 * self.low:.1f}") > 0 or float(f"{100 * self.high:.1f}") < 0


@dataclass(eq=False)
class Summary:
    """What the tables and plots of a section show.

    Attributes:
        baseline: Name of the baseline; None without one.
        baselines: The baseline's column of each column that has one.
        scores: By column and language, :data:`MEAN` included where there are several languages.
        differences: Differences to the baseline, also by column and language.
        resampled: Resampled scores, float64 [B], by column, language and seed.
        parallel: Languages in groups that share items.
        notes: Remarks on the numbers, for the reader.
        diagnostics: Diagnostics of the runs and what could not be read; None until a plot reads them.
    """

    section: Section
    options: Options
    baseline: str | None
    baselines: dict[Column, Column] = field(default_factory=dict)
    scores: dict[tuple[Column, str], Score] = field(default_factory=dict)
    differences: dict[tuple[Column, str], Difference] = field(default_factory=dict)
    resampled: dict[tuple[Column, str, int], Doubles] = field(default_factory=dict)
    parallel: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    diagnostics: tuple[pd.DataFrame | None, list[str]] | None = None

    @property
    def rows(self) -> list[str]:
        """Languages, and the mean where there are several."""
        return [*self.section.languages, *([MEAN] if len(self.section.languages) > 1 else [])]

    @property
    def seeds(self) -> list[int]:
        """Every seed of the section."""
        return sorted({seed for _, _, seed in self.section.cells})

    def method(self) -> str:
        """Say in one sentence how the intervals were computed."""
        options, seeds = self.options, len(self.seeds)
        several = [group for group in self.parallel if len(group) > 1]
        over = "of items" if seeds > 1 else "of items (one seed: the spread over seeds is not in them)"
        joint = ", items jointly across languages" if several else ""
        if several and len(self.parallel) > 1:
            joint = f", items jointly across {' and across '.join(', '.join(group) for group in several)}"
        spread = ", and Student's t over seeds" if seeds > 1 else ""
        level = f"{100 * options.confidence:g} % intervals"
        return f"paired bootstrap, {options.samples} resamples {over}{joint}{spread}; {level}"

    def marked(self, column: Column, row: str) -> bool:
        """Return whether a difference is marked: zero is outside its interval, and it was not picked from many.

        Only the mean over languages is marked (of one language that language), and from three seeds on: an interval
        for each language and setting would find some by chance, and two seeds tell nothing of the spread over seeds.
        """
        difference = self.differences.get((column, row))
        alone = row == self.rows[-1]
        return difference is not None and difference.clear and alone and len(difference.seeds) >= MARKED_SEEDS


def summarise(section: Section, baseline: str | None, options: Options) -> Summary:
    """Compute scores, differences and notes of a section.

    Args:
        section: The section.
        baseline: A condition's name or a column's label; None: no differences.
        options: How intervals are computed.
    """
    summary = Summary(section, options, baseline)
    for column in section.columns:
        for language in section.languages:
            values = {
                seed: float(section.cells[column, language, seed].value or 0)
                for seed in section.seeds(column, language)
            }
            if values:
                sizes = [section.cells[column, language, seed].n for seed in values]
                summary.scores[column, language] = Score(values, max(sizes))
    if len(section.languages) > 1:
        for column in section.columns:
            _mean(summary, column)
    resampler = Resampler(options.samples, options.seed)
    if baseline is not None:
        for column in section.columns:
            base = section.baseline_of(column, baseline)
            if base is not None:
                summary.baselines[column] = base
        _resample(summary, resampler)
        for column in summary.baselines:
            for row in summary.rows:
                _difference(summary, column, row)
    _remark(summary)
    return summary


def _mean(summary: Summary, column: Column) -> None:
    """Add a column's mean over languages, for the seeds that have all of its languages."""
    section = summary.section
    languages = [language for language in section.languages if (column, language) in summary.scores]
    if not languages:
        return
    values = [summary.scores[column, language].values for language in languages]
    common = sorted(set(values[0]).intersection(*values[1:]))
    if common:
        means = {seed: float(np.mean([by_seed[seed] for by_seed in values])) for seed in common}
        n = sum(summary.scores[column, language].n for language in languages)
        missing = tuple(language for language in section.languages if language not in languages)
        summary.scores[column, MEAN] = Score(means, n, missing)


def _resample(summary: Summary, resampler: Resampler) -> None:
    """Resample every cell whose predictions are over the rows that most cells of its language have."""
    section = summary.section
    if section.metric not in METRICS:
        return
    usable: dict[str, list[tuple[Column, int, ScoreCell]]] = {}
    for (column, language, seed), cell in section.cells.items():
        if cell.items is not None and cell.value is not None:
            usable.setdefault(language, []).append((column, seed, cell))
    ids = {}
    for language, entries in usable.items():
        keys = [cell.items.key for _, _, cell in entries if cell.items]
        most = max(dict.fromkeys(keys), key=keys.count)
        usable[language] = [entry for entry in entries if entry[2].items and entry[2].items.key == most]
        others = len(entries) - len(usable[language])
        if others:
            summary.notes.append(
                f"{language}: {others} of {len(entries)} scores are of other examples or labels than the rest; "
                "they cannot be paired and have no interval"
            )
        items = usable[language][0][2].items
        ids[language] = items.ids if items else ()
    summary.parallel = shared_items(ids)
    weights = resampler.items(ids)
    metric = METRICS[section.metric]
    for language, entries in usable.items():
        for start in range(0, len(entries), CELLS_AT_ONCE):
            part = [
                (column, seed, cell.items)
                for column, seed, cell in entries[start : start + CELLS_AT_ONCE]
                if cell.items is not None
            ]
            predicted = np.concatenate([items.predicted for _, _, items in part])
            gold, classes = part[0][2].gold, len(section.classes)
            values = metric(confusion(weights[language], gold, predicted, classes), labels_held(gold, classes))
            first = 0
            for column, seed, items in part:
                variants = len(items.predicted)
                summary.resampled[column, language, seed] = values[:, first : first + variants].mean(axis=1)
                first += variants


def _difference(summary: Summary, column: Column, row: str) -> None:
    base = summary.baselines[column]
    if (column, row) not in summary.scores or (base, row) not in summary.scores:
        return
    own, other = summary.scores[column, row], summary.scores[base, row]
    seeds = tuple(sorted(set(own.values) & set(other.values)))
    if not seeds or own.missing or other.missing:
        return
    value = float(np.mean([own.values[seed] - other.values[seed] for seed in seeds]))
    languages = summary.section.languages if row == MEAN else [row]
    cells = [(c, language, seed) for c in (column, base) for language in languages for seed in seeds]
    if any(cell not in summary.resampled for cell in cells):
        why = "no predictions to resample, or of other examples than the baseline's"
        summary.differences[column, row] = Difference(value, seeds, why=why)
        return
    by_seed = [
        np.mean(
            [
                summary.resampled[column, language, seed] - summary.resampled[base, language, seed]
                for language in languages
            ],
            axis=0,
        )
        for seed in seeds
    ]
    observed = np.array([own.values[seed] - other.values[seed] for seed in seeds])
    low, high = interval(observed, np.stack(by_seed), summary.options.confidence)
    summary.differences[column, row] = Difference(value, seeds, float(low), float(high))


def _remark(summary: Summary) -> None:
    """Note which numbers have fewer seeds or languages than the others, and which differences are missing."""
    section = summary.section
    most = len(summary.seeds)
    for column in section.columns:
        lacking = [
            f"{row} ({len(score.values)} of {most})"
            for row in section.languages
            if (score := summary.scores.get((column, row))) is not None and len(score.values) < most
        ]
        if lacking:
            summary.notes.append(f"{column.label}: fewer seeds than others for {', '.join(lacking)}")
        absent = [language for language in section.languages if (column, language) not in summary.scores]
        if absent:
            summary.notes.append(
                f"{column.label}: no score for {', '.join(absent)}; its mean over languages does not compare"
            )
    if summary.baseline is None:
        return
    alone = [
        column.label
        for column in section.columns
        if column not in summary.baselines and column.condition != summary.baseline and column.label != summary.baseline
    ]
    if alone:
        compared = [column.label for column in section.columns if column in summary.baselines]
        other = compared[0] if compared else section.columns[0].label
        summary.notes.append(
            f"no {summary.baseline} run with the same settings and so no difference: {'; '.join(alone)} (another "
            f'baseline can be chosen: --baseline "{other}")'
        )
    apart = [
        f"{column.label}, {row}"
        for (column, row), difference in summary.differences.items()
        if difference.low is None and row != MEAN
    ]
    if apart:
        few: Sequence[str] = apart[:4]
        more = f" and {len(apart) - 4} more" if len(apart) > 4 else ""
        summary.notes.append(f"no interval (no predictions that could be paired): {'; '.join(few)}{more}")
    if most < MARKED_SEEDS and summary.differences:
        summary.notes.append(
            f"{most} seed{'s' * (most > 1)}: no difference is marked; five seeds give intervals that tell something"
        )
    summary.notes += _copies(summary)


def _copies(summary: Summary) -> list[str]:
    """Return a note for each column whose runs of different seeds made the same predictions: copies of one run."""
    notes = []
    for column in summary.section.columns:
        predictions: dict[tuple[bytes, ...], list[int]] = {}
        for seed in summary.seeds:
            items = [
                cell.items.predicted.tobytes()
                for language in summary.section.languages
                if (cell := summary.section.cells.get((column, language, seed))) is not None and cell.items is not None
            ]
            if items:
                predictions.setdefault(tuple(items), []).append(seed)
        notes += [
            f"{column.label}: seeds {', '.join(map(str, seeds))} have identical predictions; copies of one run are no "
            "sample of seeds"
            for seeds in predictions.values()
            if len(seeds) > 1
        ]
    return notes
