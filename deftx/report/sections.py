"""Scores that may stand side by side: sections, their columns, and a cell for each language, column and seed.

A section is one study, task, split and model; nothing is averaged across sections. A column is a condition under the
settings it reads (:mod:`deftx.report.knobs`), of runs that read the same data wherever they read the same language. A
cell found in several runs is one cell: equal ones count once, and different ones are told of, the newest is shown.
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
from deftx.report.bootstrap import METRICS, confusion
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
        ids: Of the examples.
        key: Equal for cells over the same rows.
        gold: Labels [n], as numbers of classes.
        predicted: Predictions [variants, n].
    """

    ids: tuple[str, ...]
    key: str
    gold: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScoreCell:
    """One score of one run.

    Attributes:
        value: Fraction; None when it could not be computed.
        n: Examples.
        run: Where it comes from.
        items: What it was computed from, where the predictions are there.
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
        settings: What it reads.
        data: Digests of the data behind its scores, by name; of all its runs together.
        origins: Settings of the runs that hold it, whole.
        knobs: What tells it from the other columns of its condition, under short names.
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
        """The condition's title, without settings."""
        return tracking.CONDITIONS.get(self.condition, self.condition)

    @property
    def setting(self) -> str:
        """What tells it from the other columns of its condition: ``rank=16 density=0.1``."""
        return " ".join(text for name, value in self.knobs.items() if (text := knob_text(name, value)))


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
    def metric_name(self) -> str:
        """The metric as tables write it."""
        return METRIC_NAMES.get(self.metric, self.metric)

    def seeds(self, column: Column, language: str) -> list[int]:
        """Seeds that have a value for a cell, sorted."""
        return sorted(
            seed
            for (c, where, seed), cell in self.cells.items()
            if c is column and where == language and cell.value is not None
        )

    def column_of(self, run: Run, condition: str) -> Column | None:
        """The column that holds a run's own scores under a condition."""
        return self._held.get((run, condition))

    def runs_of(self, column: Column) -> list[Run]:
        """Runs that scored a column themselves."""
        return [run for run in self.runs if self.column_of(run, column.condition) is column]

    @property
    def methods(self) -> list[str]:
        """Conditions that compose SFTs of a method: those in the table of methods, and given SFTs."""
        there = {column.condition for column in self.columns}
        return [name for name in (*METHODS, "composed") if name in there]

    def named(self, conditions: Iterable[str]) -> list[Column]:
        """Columns of some conditions, in order."""
        wanted = set(conditions)
        return [column for column in self.columns if column.condition in wanted]

    def baseline_of(self, column: Column, name: str) -> Column | None:
        """What a column is compared with: the condition ``name`` under its own settings.

        Args:
            column: Any column.
            name: A condition, or the label of one column, which is then everybody's baseline.

        Returns:
            None for the baseline itself, and where no run or more than one setting fits.
        """
        fixed = next((item for item in self.columns if item.label == name), None)
        if fixed is not None:
            return None if fixed is column else fixed
        if column.condition == name:
            return None
        # The same runs' own, where they have it; else that of other runs under the same settings.
        held = {base for run in self.runs_of(column) if (base := self.column_of(run, name)) is not None}
        if held:
            return held.pop() if len(held) == 1 else None
        found: list[Column] = []
        for key in dict.fromkeys(
            _column_key(name, read_by(name, as_method(name, origin))) for origin in column.origins
        ):
            fits = [item for item in self._found.get(key, []) if agree(item.data, column.data)]
            # Of several data sets, the one that shares most of the column's.
            shared = [len(item.data.keys() & column.data.keys()) for item in fits]
            found += [item for item, count in zip(fits, shared, strict=True) if count == max(shared)]
        return found[0] if len(found) == 1 else None

    def add_column(self, run: Run, condition: str, settings: Settings) -> Column:
        """The column of a condition under a run's settings and data, made if needed."""
        read, data = read_by(condition, settings, run.record.cells), data_behind(condition, run.data)
        alike = self._found.setdefault(_column_key(condition, read), [])
        column = next((item for item in alike if agree(item.data, data)), None)
        if column is None:
            column = Column(condition, read)
            alike.append(column)
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
        there = sorted({item.metric for run in runs for item in run.record.metrics})
        if metric not in there:
            raise DeftxError(f"--metric {metric}: no result has it; available: {', '.join(there)}")
    sections: dict[tuple[str, ...], Section] = {}
    for run in runs:
        name = metric or run.record.metrics[0].metric
        if not any(item.metric == name for item in run.record.metrics):
            continue
        key = (*section_key(run.record), name)
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
        for item in run.record.metrics:
            if item.metric != section.metric:
                continue
            if item.language not in section.languages:
                section.languages.append(item.language)
            column = section.add_column(run, item.condition, settings)
            value = None if item.value is None or not np.isfinite(item.value) else float(item.value)
            cell = ScoreCell(value, item.n, run, items.get((item.language, item.condition)))
            place = (column, item.language, run.record.seed or 0)
            before = section.cells.get(place)
            if before is None:
                section.cells[place] = cell
            elif _equal(before, cell):
                shared += 1
                if before.items is None:
                    section.cells[place] = cell
            else:
                conflicts.setdefault((before.run.shown, run.shown), []).append(f"{item.language} {item.condition}")
                section.cells[place] = cell
    for (old, new), where in conflicts.items():
        section.warnings.append(
            f"{old} and {new} have the same settings and seed but other numbers ({listed(where, 4)}); "
            "the newer one is shown, they are not averaged"
        )
    if shared:
        section.warnings.append(f"{shared} scores stand in more than one run (the same computation); each counts once")
    section.languages.sort(key=_place_of([run.record.settings.get("language") for run in section.runs]))
    for language in section.languages:
        rows = {
            cell.run.record.fingerprints.get(f"{section.key[2]} {language}")
            for (_, where, _), cell in section.cells.items()
            if where == language
        }
        if len(rows - {None}) > 1:
            section.warnings.append(f"{language}: the runs were evaluated on different rows (fingerprints differ)")
    differing = tracking.provenance_differences([item for run in section.runs for item in run.record.provenances])
    if differing:
        section.warnings.append(
            "the stages behind these scores were computed under different versions, thread counts or devices: "
            + ", ".join(differing)
        )


def _classes(runs: Sequence[Run]) -> list[str]:
    """Names of the classes in the order of the task's numbers; empty for results that do not say."""
    for run in runs:
        labels = run.record.settings.get("data.labels")
        if labels:
            return [str(label) for label in labels]
    return []


def _items(run: Run, section: Section) -> dict[tuple[str, str], Items]:
    """The examples of each language and condition of a run; empty, with a warning, where there are none to use."""
    try:
        frame = read_predictions(run)
    except DeftxError as error:
        section.warnings.append(f"{error}: no intervals for its scores")
        return {}
    found: dict[tuple[str, str], Items] = {}
    values = {(m.language, m.condition): m.value for m in run.record.metrics if m.metric == section.metric}
    labels = _coded(section, frame["label"])
    predictions = _coded(section, frame["prediction"])
    frame = frame.assign(label=labels, prediction=predictions).sort_values(["variant", "id"], kind="stable")
    wrong, doubled = [], []
    for (language, condition), rows in frame.groupby(["language", "condition"], sort=False):
        where = (str(language), str(condition))
        if where not in values:
            continue
        items = _one(rows, run.record.fingerprints.get(f"{section.key[2]} {language}", ""))
        if items is None:
            doubled.append(" ".join(where))
            continue
        again = _metric(items, section)
        if again is None or values[where] is None or abs(again - float(values[where] or 0)) > 1e-4:
            wrong.append(" ".join(where))
        else:
            found[where] = items
    if wrong and section.metric in METRICS:
        section.warnings.append(
            f"{run.shown}: its predictions do not give the {section.metric_name} that {tracking.RESULT} says "
            f"({listed(wrong, 4)}); no intervals for these scores"
        )
    if doubled:
        section.warnings.append(
            f"{run.shown}: an example twice, or missing, in {listed(doubled, 4)}; no intervals for them"
        )
    return found


def _coded(section: Section, column: pd.Series[Any]) -> npt.NDArray[np.int64]:
    """Classes as numbers; new names go to the end of the section's list."""
    import pandas as pd

    if column.dtype.kind in "iu":
        most = int(column.max()) + 1 if len(column) else 0
        section.classes += [str(number) for number in range(len(section.classes), most)]
        return column.to_numpy(dtype=np.int64)
    numbers, words = pd.factorize(column.astype(str), sort=True)
    section.classes += [str(word) for word in words if word not in section.classes]
    return np.array([section.classes.index(word) for word in words], dtype=np.int64)[numbers]


def _one(rows: pd.DataFrame, fingerprint: str) -> Items | None:
    """One cell's examples, sorted by variant and id; None where its variants do not hold the same ones, each once."""
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
    """The metric, recomputed; the mean over variants."""
    if section.metric not in METRICS:
        return None
    weights = np.ones((1, len(items.ids)), dtype=np.float32)
    counts = confusion(weights, items.gold, items.predicted, len(section.classes))
    return float(METRICS[section.metric](counts).mean())


def _equal(first: ScoreCell, second: ScoreCell) -> bool:
    if (first.value is None) != (second.value is None):
        return False
    if first.value is not None and abs(first.value - (second.value or 0)) > 1e-6:
        return False
    if first.items is None or second.items is None:
        return True
    same = first.items.key == second.items.key and first.items.predicted.shape == second.items.predicted.shape
    return same and bool((first.items.predicted == second.items.predicted).all())


def _place_of(lists: Sequence[Any]) -> Any:
    """A sort key: languages in the order that the runs name them."""
    order = list(dict.fromkeys(str(code) for codes in lists if isinstance(codes, list) for code in codes))
    return lambda code: order.index(code) if code in order else len(order)


def _name_columns(section: Section) -> None:
    """Label columns by what differs between those of one condition, and put them into order."""
    for condition in dict.fromkeys(column.condition for column in section.columns):
        columns = section.named([condition])
        differing = _differing_data(columns)
        for column, knobs in zip(columns, varying([column.settings for column in columns]), strict=True):
            column.knobs = knobs | {name: column.data[name][:8] for name in differing if name in column.data}
            column.label = f"{column.title} {column.setting}".strip()
    known = list(tracking.CONDITIONS)
    section.columns.sort(
        key=lambda column: (
            known.index(column.condition) if column.condition in known else len(known),
            column.condition,
            [sort_key(value) for value in column.knobs.values()],
        )
    )


def _differing_data(columns: Sequence[Column]) -> list[str]:
    """Names of data that some columns read with another content."""
    names = dict.fromkeys(name for column in columns for name in column.data)
    return sorted(name for name in names if len({c.data[name] for c in columns if name in c.data}) > 1)


def _name_sections(sections: Sequence[Section]) -> None:
    """Titles and file names that tell the sections apart; the base's fingerprint only where nothing else does."""
    plain = [" · ".join(part for part in section.key[:4] if part) for section in sections]
    for section, title in zip(sections, plain, strict=True):
        base = f" · base {section.key[4][:8] or 'unknown'}" if plain.count(title) > 1 else ""
        section.title = f"{title}{base} · {section.metric_name}"
        slug = "-".join([*section.key[:4], *([section.key[4][:8]] if base else [])])
        section.slug = "".join(char if char.isalnum() or char in "-_." else "-" for char in slug).strip("-.") or "study"
    for number, section in enumerate(sections):
        if any(other.slug == section.slug for other in sections[:number]):
            section.slug += f"-{number}"
