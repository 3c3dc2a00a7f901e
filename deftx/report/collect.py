"""Finding and reading what runs left behind: results, failed and missing jobs, files that cannot be read.

Nothing here is fatal but a folder that does not exist: a report says what it could not read. Folders are walked by
name, hidden ones and those that runs keep for other purposes (``wandb``, ``curves``) left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx import tracking
from deftx.errors import DeftxError
from deftx.report.knobs import agree, canonical, digests, score_settings

if TYPE_CHECKING:
    import pandas as pd

MARKER = "report.json"
"""Tells a report's folder from any other."""

_SKIPPED = ("wandb", "curves", "__pycache__")


@dataclass(eq=False)
class Run:
    """One ``result.json``.

    Attributes:
        name: where it lies, below the folder that was given.
        folder: the run's directory.
        record: what it says.
        swept: what its sweep varied, such as ``rank=16 seed=1``; empty outside of a sweep.
    """

    name: str
    folder: Path
    record: tracking.RunRecord
    swept: str = ""

    @property
    def shown(self) -> str:
        """Its name and what was swept."""
        return f"{self.name} ({self.swept})" if self.swept else self.name

    @cached_property
    def job(self) -> str:
        """Equal for two runs of one job, whatever came of them: a run that failed early knows no base."""
        record = self.record
        about = {
            "settings": score_settings(record.settings),
            "targets": record.settings.get("language"),
            "conditions": [record.settings.get(key) for key in ("method", "compare", "controls")],
            "parts": sorted(map(str, record.settings.get("only") or [])),
            "section": section_key(record)[:-1],
        }
        if record.job_type == "stage" and "only" not in record.settings:
            about["name"] = self.name  # an older result does not say which part of a job it is
        return canonical({"job": record.job_type, "seed": record.seed, **about})

    @cached_property
    def data(self) -> list[tracking.DataRead]:
        """What data it read; empty for results that do not say it."""
        return tracking.data_read(self.record.settings)

    def repeats(self, other: Run) -> bool:
        """Whether two finished runs are one job on one base and the same data, wherever they were launched."""
        bases = [section_key(run.record)[-1] for run in (self, other)]
        return self.job == other.job and bases[0] == bases[1] and self._read_the_same(other)

    def made_up_by(self, other: Run) -> bool:
        """Whether a finished run is the same job, as far as this one came to know its base and its data."""
        mine, its = self.record.fingerprints, other.record.fingerprints
        known = [name for name in ("base", "base files") if mine.get(name) and its.get(name)]
        return self.job == other.job and all(mine[name] == its[name] for name in known) and self._read_the_same(other)

    def _read_the_same(self, other: Run) -> bool:
        return agree(digests(self.data), digests(other.data))


@dataclass(frozen=True)
class Trouble:
    """A job without a usable result.

    Attributes:
        kind: ``failed``, ``missing`` or ``unreadable``.
        name: where its result is or should be.
        reason: why.
        finished_in: the run that finished the same job in another launch, if one did.
    """

    kind: str
    name: str
    reason: str
    finished_in: str = ""


@dataclass
class Collection:
    """Everything found below the folders that were given."""

    runs: list[Run] = field(default_factory=list)
    without_scores: list[Run] = field(default_factory=list)
    repeated: list[tuple[Run, Run]] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    sweeps: list[tuple[str, tracking.SweepRecord]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Trouble]:
        """Troubles of some kinds that no other launch made up for."""
        return [item for item in self.troubles if item.kind in kinds and not item.finished_in]


def section_key(record: tracking.RunRecord) -> tuple[str, ...]:
    """What has to agree for scores to stand in one table: study, task, split, model, and the base's weights."""
    base = record.fingerprints.get("base") or record.fingerprints.get("base files") or ""
    settings = record.settings
    splits = sorted({item.split for item in record.metrics}) or [str(settings.get("split", "test"))]
    return (record.study, str(settings.get("task", "")), "+".join(splits), str(settings.get("model", "")), base)


def collect(folders: Sequence[Path]) -> Collection:
    """Read every result and every sweep below some folders.

    Args:
        folders: Given by the user; one inside another is read once.

    Raises:
        DeftxError: A folder that does not exist, one message for all of them; or nothing in any of them.
    """
    bad = [f"{folder}: no such folder" for folder in folders if not folder.exists()]
    bad += [f"{folder}: not a folder" for folder in folders if folder.exists() and not folder.is_dir()]
    if bad:
        raise DeftxError("\n".join(bad))
    found = Collection()
    seen: set[Path] = set()
    results: dict[Path, Run | Trouble] = {}
    sweeps: list[tuple[Path, str]] = []
    for folder in folders:
        for place, name in _walk(folder, found.troubles):
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            if (place / tracking.RESULT).is_file():
                results[place.resolve()] = _read(place, name)
            if (place / tracking.SWEEP).is_file():
                sweeps.append((place, name))
    if not results and not sweeps and not found.troubles:
        places = ", ".join(str(folder) for folder in folders)
        raise DeftxError(
            f"no {tracking.RESULT} below {places}; give the folder of a run or a sweep "
            "(outputs/STUDY/..., multirun/STUDY/...), or make one: deftx run experiment=demo"
        )
    done, failed = _sort(results, found)
    absent = [item for place, name in sweeps for item in _sweep(place, name, results, found)]
    _settle(found, done, failed, absent)
    return found


def _walk(folder: Path, troubles: list[Trouble]) -> list[tuple[Path, str]]:
    """Folders below one, itself included, by name; other reports and what cannot be opened left out."""
    places: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        troubles.append(Trouble("unreadable", str(error.filename), error.strerror or "cannot be opened"))

    start = folder.name or str(folder.resolve().name)
    for root, below, files in os.walk(folder, onerror=unreadable):
        if MARKER in files:
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in _SKIPPED)
        place = Path(root)
        places.append((place, (Path(start) / place.relative_to(folder)).as_posix()))
    return places


def _read(place: Path, name: str) -> Run | Trouble:
    try:
        record = tracking.read_result(place)
        if not isinstance(record.settings, dict) or not isinstance(record.study, str):
            raise DeftxError(f"{place / tracking.RESULT} is not a result of deftx (its settings are no mapping)")
    except DeftxError as error:
        return Trouble("unreadable", name, str(error).replace(str(place), name))
    return Run(name, place, record)


def _sort(
    results: dict[Path, Run | Trouble], found: Collection
) -> tuple[dict[str, list[Run]], list[tuple[Run, Trouble]]]:
    """Finished runs by job, repeated ones set aside; failed ones with what is wrong."""
    done: dict[str, list[Run]] = {}
    failed: list[tuple[Run, Trouble]] = []
    runs = sorted(
        (item for item in results.values() if isinstance(item, Run)),
        key=lambda run: (run.record.finished or "", run.name),
    )
    found.troubles += [item for item in results.values() if isinstance(item, Trouble)]
    for run in runs:
        record = run.record
        if record.status != "done":
            error: dict[str, Any] = record.error or {}
            reason = " ".join(str(error.get("message") or error.get("type") or "no reason given").split())
            if error.get("traceback"):
                reason = f"{error.get('type')}: {reason}"
            kind = "failed" if record.status == "failed" else "missing"
            told = reason if kind == "failed" else f"status {record.status}: it has not finished"
            failed.append((run, Trouble(kind, run.name, told)))
            continue
        alike = done.setdefault(run.job, [])
        first = next((other for other in alike if run.repeats(other)), None)
        if first is None:
            alike.append(run)
        if not record.metrics:
            found.without_scores.append(run)
        elif first is not None and _same_scores(first, run):
            found.repeated.append((run, first))
        else:
            found.runs.append(run)  # sections.py tells of a conflict, score by score
    return done, failed


def _same_scores(first: Run, second: Run) -> bool:
    """Whether two runs of one job say the same; predictions decide where both have them."""
    values = [{(m.language, m.condition, m.metric): m.value for m in run.record.metrics} for run in (first, second)]
    if values[0] != values[1]:
        return False
    paths = [run.folder / tracking.PREDICTIONS for run in (first, second)]
    if not all(path.is_file() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return True
    try:
        frames = [read_predictions(run) for run in (first, second)]
    except DeftxError:
        return True  # told of where they are needed
    by = ["language", "condition", "variant", "id"]
    tables = [frame.sort_values(by).reset_index(drop=True)[[*by, "label", "prediction"]] for frame in frames]
    return bool(tables[0].equals(tables[1]))


def read_predictions(run: Run) -> pd.DataFrame:
    """Columns ``language``, ``condition``, ``variant``, ``id``, ``label`` and ``prediction`` of a run's predictions.

    Raises:
        DeftxError: There are none, or they cannot be read.
    """
    frame = _parquet(run, tracking.PREDICTIONS, ["language", "condition", "variant", "id", "label", "prediction"])
    if "variant" not in frame:
        frame["variant"] = ""
    missing = {"language", "condition", "id", "label", "prediction"} - set(frame.columns)
    if missing:
        raise DeftxError(f"{run.name}/{tracking.PREDICTIONS} lacks the columns {', '.join(sorted(missing))}")
    return frame.astype({"id": str, "variant": str})


def read_diagnostics(run: Run, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of a run's diagnostics; ``key`` and ``other_key`` are those of the SFTs in its result.

    Raises:
        DeftxError: There are none, or they cannot be read.
    """
    return tracking.with_keys(_parquet(run, tracking.DIAGNOSTICS, [*columns, "sft", "other"]))


def _parquet(run: Run, name: str, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    path = run.folder / name
    try:
        there = set(pq.read_schema(path).names)
        return pd.read_parquet(path, columns=[column for column in columns if column in there])
    except FileNotFoundError as error:
        raise DeftxError(f"{run.name} has no {name}") from error
    except (OSError, ValueError, ArrowException) as error:
        raise DeftxError(f"{run.name}/{name} cannot be read ({' '.join(str(error).split())[:120]})") from error


def _sweep(
    place: Path, name: str, results: dict[Path, Run | Trouble], found: Collection
) -> list[tuple[tuple[str, ...], Trouble | Run]]:
    """The jobs of a sweep by what was asked for: the run that has the result, or what is wrong."""
    try:
        record = tracking.read_sweep(place)
    except DeftxError as error:
        found.troubles.append(Trouble("unreadable", name, str(error).replace(str(place), name)))
        return []
    found.sweeps.append((name, record))
    jobs: list[tuple[tuple[str, ...], Trouble | Run]] = []
    for job in [*record.stages, *record.jobs]:
        asked = (record.study, record.command, *sorted(job.overrides))
        swept = " ".join(job.swept)
        where = f"{name}/{job.folder}"
        item = results.get((place / job.folder).resolve())
        if item is None and job in record.stages and job.status in ("done", "cached"):
            continue  # a shared stage keeps its result in the cache
        if isinstance(item, Run):
            item.swept = item.swept or swept
            jobs.append((asked, item))
        elif item is None:
            shown = f"{where} ({swept})" if swept else where
            if job.status == "failed":
                jobs.append((asked, Trouble("failed", shown, " ".join((job.error or "no reason given").split()))))
            else:
                told = {
                    "waiting": "not started when the sweep stopped",
                    "running": "begun but not finished: the sweep was killed, or still runs",
                }.get(job.status, f"the sweep says {job.status}, but there is no {tracking.RESULT}")
                jobs.append((asked, Trouble("missing", shown, told)))
    return jobs


def _settle(
    found: Collection,
    done: dict[str, list[Run]],
    failed: list[tuple[Run, Trouble]],
    jobs: list[tuple[tuple[str, ...], Trouble | Run]],
) -> None:
    """Say of each failed or missing job whether another launch finished it."""
    finished = {asked: item for asked, item in jobs if isinstance(item, Run) and item.record.status == "done"}
    names = {item.name: item.shown for _, item in jobs if isinstance(item, Run)}
    asked_of = {item.name: asked for asked, item in jobs if isinstance(item, Run)}
    for run, trouble in failed:
        later = next((other for other in done.get(run.job, []) if run.made_up_by(other)), None)
        if later is None and run.name in asked_of:
            later = finished.get(asked_of[run.name])
        name = names.get(trouble.name, trouble.name)
        found.troubles.append(Trouble(trouble.kind, name, trouble.reason, later.shown if later else ""))
    for asked, item in jobs:
        if isinstance(item, Trouble):
            again = finished.get(asked)
            found.troubles.append(Trouble(item.kind, item.name, item.reason, again.shown if again else ""))
