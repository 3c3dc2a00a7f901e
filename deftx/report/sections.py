"""Scores that may stand side by side: sections, their columns, and a cell for each language, column and seed.

A section is one study, task, split and model; nothing is averaged across sections. A column is a condition under the
settings it reads (:mod:`deftx.report.knobs`), of runs that read the same data wherever they read the same language. A
cell in several runs is one cell: equal scores count once; different ones give a warning, and the newest is shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deftx import tracking
from deftx.errors import DeftxError, listed
from deftx.methods.table import METHODS
from deftx.report.bootstrap import METRICS, confusion, labels_held
from deftx.report.collect import Run, read_predictions, section_key
from deftx.report.knobs import (
    Settings,
    agree,
    as_method,
    canonical,
    data_behind,
    knob_text,
    read_by,
    score_settings,
    sort_key,
    varying,
)

if TYPE_CHECKING:
    import pandas as pd

METRIC_NAMES = {"macro_f1": "macro-F1"}
MEAN = "mean"


@dataclass(frozen=True)
class Items:
    """The examples of one cell, sorted by id.

    Attributes:
        ids: Ids of the examples.
        key: A digest that cells over the same rows share.
        gold: Class numbers of the labels, int64 [n].
        predicted: Class numbers of the predictions, int64 [variants, n].
    """

    ids: tuple[str, ...]
    key: str
    gold: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScoreCell:
    """One score of one run.

    Attributes:
        value: The score, from 0 to 1; None when it could not be computed.
        n: Number of examples.
        run: The run that holds it.
        items: The examples it was computed from; None without usable predictions.
    """

    value: float | None
    n: int
    run: Run
    items: Items | None


@dataclass(eq=False)
class Column:
    """A condition under the settings it reads.

    Attributes:
        condition: One of :data:`deftx.tracking.CONDITIONS`, or another name.
        settings: The settings that it reads.
        data: Digests of the data behind its scores in all its runs, by name.
        origins: All settings of the runs that hold it.
        knobs: The settings that differ from those of the condition's other columns, under short names.
        label: Its title in a table.
    """

    condition: str
    settings: Settings
    data: dict[str, str] = field(default_factory=dict)
    origins: list[Settings] = field(default_factory=list)
    knobs: Settings = field(default_factory=dict)
    label: str = ""

    @property
    def title(self) -> str:
        """The title of its condition, without settings; says where its task SFT stands on a φ_S that others share."""
        shared = self.settings.get("source.shared") is True and self.settings.get("source.enabled") is not False
        return tracking.title_of(self.condition, shared_source=shared)

    @property
    def setting(self) -> str:
        """Its knobs as a text: ``rank=16 density=0.1``."""
        return " ".join(text for name, value in self.knobs.items() if (text := knob_text(name, value)))

    @property
    def paper_name(self) -> str:
        """Its title in a table that is sent: ``DeFT-X, rank 4, density 0.1``."""
        knobs = (knob_text(name, value).replace("=", " ", 1) for name, value in self.knobs.items())
        return ", ".join([self.title, *(text for text in knobs if text)])


@dataclass(eq=False)
class Section:
    """Everything about one study, task, split and model."""

    key: tuple[str, ...]
    metric: str
    runs: list[Run] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    cells: dict[tuple[Column, str, int], ScoreCell] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    slug: str = ""
    title: str = ""
    _found: dict[str, list[Column]] = field(default_factory=dict)
    _held: dict[tuple[Run, str], Column] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """Which labelled rows of the targets its scores are of."""
        return self.key[2]

    @property
    def metric_name(self) -> str:
        """The metric's name in tables."""
        return METRIC_NAMES.get(self.metric, self.metric)

    def seeds(self, column: Column, language: str) -> list[int]:
        """Return the seeds that have a score in a column and language, sorted."""
        return sorted(
            seed
            for (c, where, seed), cell in self.cells.items()
            if c is column and where == language and cell.value is not None
        )

    def column_of(self, run: Run, condition: str) -> Column | None:
        """Return the column that holds a run's own scores under a condition."""
        return self._held.get((run, condition))

    def runs_of(self, column: Column) -> list[Run]:
        """Return the runs that scored a column themselves."""
        return [run for run in self.runs if self.column_of(run, column.condition) is column]

    @property
    def methods(self) -> list[str]:
        """Conditions that compose SFTs of a method: those in the table of methods, and given SFTs."""
        conditions = {column.condition for column in self.columns}
        return [name for name in (*METHODS, "composed") if name in conditions]

    def named(self, conditions: Iterable[str]) -> list[Column]:
        """Return the columns of some conditions, in order."""
        names = set(conditions)
        return [column for column in self.columns if column.condition in names]

    def baseline_of(self, column: Column, name: str) -> Column | None:
        """Return the column that another is compared with: the condition ``name`` under the same settings.

        Args:
            column: Any column.
            name: A condition, or the label of one column, which is then the baseline of all columns.

        Returns:
            None for the baseline itself, and where no column or more than one fits.
        """
        fixed = next((candidate for candidate in self.columns if candidate.label == name), None)
        if fixed is not None:
            return None if fixed is column else fixed
        if column.condition == name:
            return None
        # The same runs' own, where they have it; else that of other runs under the same settings.
        held = {base for run in self.runs_of(column) if (base := self.column_of(run, name)) is not None}
        if held:
            return held.pop() if len(held) == 1 else None
        candidates: list[Column] = []
        for key in dict.fromkeys(
            _column_key(name, read_by(name, as_method(name, origin))) for origin in column.origins
        ):
            matches = [candidate for candidate in self._found.get(key, []) if agree(candidate.data, column.data)]
            # Of several data sets, the one that shares most of the column's.
            shared = [len(candidate.data.keys() & column.data.keys()) for candidate in matches]
            candidates += [candidate for candidate, count in zip(matches, shared, strict=True) if count == max(shared)]
        return candidates[0] if len(candidates) == 1 else None

    def add_column(self, run: Run, condition: str, settings: Settings) -> Column:
        """Return the column of a condition under a run's settings and data; creates it if needed."""
        read, data = read_by(condition, settings, run.record.cells), data_behind(condition, run.data)
        columns = self._found.setdefault(_column_key(condition, read), [])
        column = next((held for held in columns if agree(held.data, data)), None)
        if column is None:
            column = Column(condition, read)
            columns.append(column)
            self.columns.append(column)
        column.data |= data
        if settings not in column.origins:
            column.origins.append(settings)
        self._held[run, condition] = column
        return column


def _column_key(condition: str, read: Settings) -> str:
    return canonical({"condition": condition, "settings": read})


def make_sections(runs: Sequence[Run], metric: str | None = None) -> list[Section]:
    """Sort runs into sections and read their predictions.

    Args:
        runs: Finished runs with scores, oldest first.
        metric: Which of the runs' metrics; None: each task's own, a result's first.

    Raises:
        DeftxError: No run has this metric.
    """
    if metric is not None:
        available = sorted({score.metric for run in runs for score in run.record.metrics})
        if metric not in available:
            raise DeftxError(f"--metric {metric}: no result has it; available: {', '.join(available)}")
    sections: dict[tuple[str, ...], Section] = {}
    for run in runs:
        name = metric or run.record.metrics[0].metric
        if not any(score.metric == name for score in run.record.metrics):
            continue
        for split in dict.fromkeys(score.split for score in run.record.metrics if score.metric == name):
            key = (*section_key(run.record, split), name)
            sections.setdefault(key, Section(key, name)).runs.append(run)
    for section in sections.values():
        _fill(section)
        _name_columns(section)
    _name_sections(list(sections.values()))
    return list(sections.values())


def _fill(section: Section) -> None:
    shared = 0
    conflicts: dict[tuple[str, str], list[str]] = {}
    section.classes = _classes(section.runs)
    for run in section.runs:
        settings = score_settings(run.record.settings)
        items = _items(run, section)
        for score in run.record.metrics:
            if (score.metric, score.split) != (section.metric, section.split):
                continue
            if score.language not in section.languages:
                section.languages.append(score.language)
            column = section.add_column(run, score.condition, settings)
            value = None if score.value is None or not np.isfinite(score.value) else float(score.value)
            cell = ScoreCell(value, score.n, run, items.get((score.language, score.condition)))
            cell_key = (column, score.language, run.record.seed or 0)
            before = section.cells.get(cell_key)
            if before is None:
                section.cells[cell_key] = cell
            elif _equal(before, cell):
                shared += 1
                if before.items is None:
                    section.cells[cell_key] = cell
            else:
                conflicts.setdefault((before.run.shown, run.shown), []).append(f"{score.language} {score.condition}")
                section.cells[cell_key] = cell
    for (old, new), where in conflicts.items():
        section.warnings.append(
            f"{old} and {new} have the same settings and seed but other numbers ({listed(where, 4)}); "
            "the newer one is shown, they are not averaged"
        )
    if shared:
        section.warnings.append(f"{shared} scores stand in more than one run (the same computation); each counts once")
    section.languages.sort(key=_order_of([run.record.settings.get("language") for run in section.runs]))
    for language in section.languages:
        rows = {
            cell.run.record.fingerprints.get(f"{section.split} {language}")
            for (_, where, _), cell in section.cells.items()
            if where == language
        }
        if len(rows - {None}) > 1:
            section.warnings.append(f"{language}: the runs were evaluated on different rows (fingerprints differ)")
    differing = tracking.provenance_differences([each for run in section.runs for each in run.record.provenances])
    if differing:
        section.warnings.append(
            "the stages behind these scores were computed under different versions, thread counts or devices: "
            + ", ".join(differing)
        )


def _classes(runs: Sequence[Run]) -> list[str]:
    """Return the names of the classes in the order of their numbers; empty for results that do not say them."""
    for run in runs:
        labels = run.record.settings.get("data.labels")
        if labels:
            return [str(label) for label in labels]
    return []


def _items(run: Run, section: Section) -> dict[tuple[str, str], Items]:
    """Return a run's usable examples by language and condition; adds a warning for those it cannot use."""
    try:
        frame = read_predictions(run)
    except DeftxError as error:
        section.warnings.append(f"{error}: no intervals for its scores")
        return {}
    usable: dict[tuple[str, str], Items] = {}
    frame = frame[frame["split"] == section.split]
    scored = [m for m in run.record.metrics if (m.metric, m.split) == (section.metric, section.split)]
    values = {(m.language, m.condition): m.value for m in scored}
    labels = _coded(section, frame["label"])
    predictions = _coded(section, frame["prediction"])
    frame = frame.assign(label=labels, prediction=predictions).sort_values(["variant", "id"], kind="stable")
    wrong, doubled = [], []
    for (language, condition), rows in frame.groupby(["language", "condition"], sort=False):
        where = (str(language), str(condition))
        if where not in values:
            continue
        items = _cell_items(rows, run.record.fingerprints.get(f"{section.split} {language}", ""))
        if items is None:
            doubled.append(" ".join(where))
            continue
        again = _metric(items, section)
        if again is None or values[where] is None or abs(again - float(values[where] or 0)) > 1e-4:
            wrong.append(" ".join(where))
        else:
            usable[where] = items
    if wrong and section.metric in METRICS:
        section.warnings.append(
            f"{run.shown}: its predictions do not give the {section.metric_name} that {tracking.RESULT} says "
            f"({listed(wrong, 4)}); no intervals for these scores. Results of older versions count a label that only "
            "predictions hold as a class of macro-F1"
        )
    if doubled:
        section.warnings.append(
            f"{run.shown}: an example twice, or missing, in {listed(doubled, 4)}; no intervals for them"
        )
    return usable


def _coded(section: Section, column: pd.Series[Any]) -> npt.NDArray[np.int64]:
    """Return class numbers, int64 [n]; appends new names to the section's classes."""
    import pandas as pd

    if column.dtype.kind in "iu":
        most = int(column.max()) + 1 if len(column) else 0
        section.classes += [str(number) for number in range(len(section.classes), most)]
        return column.to_numpy(dtype=np.int64)
    numbers, words = pd.factorize(column.astype(str), sort=True)
    section.classes += [str(word) for word in words if word not in section.classes]
    return np.array([section.classes.index(word) for word in words], dtype=np.int64)[numbers]


def _cell_items(rows: pd.DataFrame, fingerprint: str) -> Items | None:
    """Return one cell's examples; None unless all its variants hold the same ones, each once.

    Args:
        rows: Columns ``variant``, ``id``, ``label`` (int) and ``prediction`` (int), sorted by variant and id.
        fingerprint: Of the rows that were evaluated.
    """
    variants = rows["variant"].nunique()
    if len(rows) % variants:
        return None
    ids = rows["id"].to_numpy(dtype=object).reshape(variants, -1)
    gold = rows["label"].to_numpy(dtype=np.int64).reshape(variants, -1)
    each_once = len(set(ids[0])) == ids.shape[1]
    if not each_once or (ids != ids[0]).any() or (gold != gold[0]).any():
        return None
    digest = hashlib.sha256("\0".join([fingerprint, *ids[0]]).encode())
    digest.update(gold[0].tobytes())
    predicted = rows["prediction"].to_numpy(dtype=np.int64).reshape(variants, -1)
    return Items(tuple(ids[0]), digest.hexdigest(), gold[0], predicted)


def _metric(items: Items, section: Section) -> float | None:
    """Recompute the metric; the mean over variants."""
    if section.metric not in METRICS:
        return None
    weights = np.ones((1, len(items.ids)), dtype=np.float32)
    classes = len(section.classes)
    counts = confusion(weights, items.gold, items.predicted, classes)
    return float(METRICS[section.metric](counts, labels_held(items.gold, classes)).mean())


def _equal(first: ScoreCell, second: ScoreCell) -> bool:
    if (first.value is None) != (second.value is None):
        return False
    if first.value is not None and abs(first.value - (second.value or 0)) > 1e-6:
        return False
    if first.items is None or second.items is None:
        return True
    same = first.items.key == second.items.key and first.items.predicted.shape == second.items.predicted.shape
    return same and bool((first.items.predicted == second.items.predicted).all())


def _order_of(lists: Sequence[Any]) -> Any:
    """Return a sort key for languages: the order in which the runs name them."""
    order = list(dict.fromkeys(str(code) for codes in lists if isinstance(codes, list) for code in codes))
    return lambda code: order.index(code) if code in order else len(order)


def _name_columns(section: Section) -> None:
    """Label columns by what differs between those of one condition, and sort them."""
    for condition in dict.fromkeys(column.condition for column in section.columns):
        columns = section.named([condition])
        differing = _differing_data(columns)
        for column, knobs in zip(columns, varying([column.settings for column in columns]), strict=True):
            column.knobs = knobs | {name: column.data[name][:8] for name in differing if name in column.data}
            column.label = f"{column.title} {column.setting}".strip()
    order = list(tracking.CONDITIONS)
    section.columns.sort(
        key=lambda column: (
            order.index(column.condition) if column.condition in order else len(order),
            column.condition,
            [sort_key(value) for value in column.knobs.values()],
        )
    )


def _differing_data(columns: Sequence[Column]) -> list[str]:
    """Return the names of data whose content differs between columns."""
    names = dict.fromkeys(name for column in columns for name in column.data)
    return sorted(name for name in names if len({c.data[name] for c in columns if name in c.data}) > 1)


def _name_sections(sections: Sequence[Section]) -> None:
    """Give sections distinct titles and file names, with the base's fingerprint only where titles would be equal."""
    plain = [" · ".join(part for part in section.key[:4] if part) for section in sections]
    for section, title in zip(sections, plain, strict=True):
        base = f" · base {section.key[4][:8] or 'unknown'}" if plain.count(title) > 1 else ""
        section.title = f"{title}{base} · {section.metric_name}"
        slug = "-".join([*section.key[:4], *([section.key[4][:8]] if base else [])])
        section.slug = "".join(char if char.isalnum() or char in "-_." else "-" for char in slug).strip("-.") or "study"
    for number, section in enumerate(sections):
        if any(other.slug == section.slug for other in sections[:number]):
            section.slug += f"-{number}"
