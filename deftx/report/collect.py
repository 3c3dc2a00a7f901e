"""Finds and reads what runs left behind: results, failed and missing jobs, files that cannot be read.

Only a folder that does not exist is an error; a report lists the files that could not be read. Folders are walked in
the order of their names; hidden ones, ``wandb`` and ``curves`` are skipped.
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
"""The file that marks a folder as a report."""

_SKIPPED = ("wandb", "curves", "__pycache__")


@dataclass(eq=False)
class Run:
    """One ``result.json``.

    Attributes:
        name: its path, beginning with the name of the folder that the user gave.
        folder: the run's directory.
        record: the content of ``result.json``.
        swept: what its sweep varied, such as ``rank=16 seed=1``; empty outside of a sweep.
    """

    name: str
    folder: Path
    record: tracking.RunRecord
    swept: str = ""

    @property
    def shown(self) -> str:
        """Its name, and what its sweep varied."""
        return f"{self.name} ({self.swept})" if self.swept else self.name

    @cached_property
    def job(self) -> str:
        """A key that runs of one job share, also failed ones: it leaves the base out, which an early failure lacks."""
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
        """The data that it read; empty for results that do not say it."""
        return tracking.data_read(self.record.settings)

    def repeats(self, other: Run) -> bool:
        """Return whether two finished runs are one job on the same base and the same data."""
        bases = [section_key(run.record)[-1] for run in (self, other)]
        return self.job == other.job and bases[0] == bases[1] and self._read_the_same(other)

    def made_up_by(self, other: Run) -> bool:
        """Return whether a finished run is the same job, as far as this one recorded its base and its data."""
        own, others = self.record.fingerprints, other.record.fingerprints
        shared = [name for name in ("base", "base files") if own.get(name) and others.get(name)]
        return (
            self.job == other.job and all(own[name] == others[name] for name in shared) and self._read_the_same(other)
        )

    def _read_the_same(self, other: Run) -> bool:
        return agree(digests(self.data), digests(other.data))


@dataclass(frozen=True)
class Trouble:
    """A job without a usable result.

    Attributes:
        kind: ``failed``, ``missing`` or ``unreadable``.
        name: where its result is or should be.
        reason: why there is none.
        finished_in: the run that finished the same job in another launch, if one did.
    """

    kind: str
    name: str
    reason: str
    finished_in: str = ""


@dataclass
class Collection:
    """Everything found below the folders that the user gave."""

    runs: list[Run] = field(default_factory=list)
    without_scores: list[Run] = field(default_factory=list)
    repeated: list[tuple[Run, Run]] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    sweeps: list[tuple[str, tracking.SweepRecord]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Trouble]:
        """Troubles of some kinds whose job no other launch finished."""
        return [trouble for trouble in self.troubles if trouble.kind in kinds and not trouble.finished_in]


def section_key(record: tracking.RunRecord, split: str | None = None) -> tuple[str, ...]:
    """Study, task, split, model and fingerprint of the base: scores stand in one table only if these agree.

    Args:
        record: A result.
        split: One of the splits that it scored; None: all of them together.
    """
    base = record.fingerprints.get("base") or record.fingerprints.get("base files") or ""
    settings = record.settings
    splits = sorted({metric.split for metric in record.metrics}) or [str(settings.get("split", "test"))]
    split = split or "+".join(splits)
    return (record.study, str(settings.get("task", "")), split, str(settings.get("model", "")), base)


def collect(folders: Sequence[Path]) -> Collection:
    """Read every result and every sweep below some folders.

    Args:
        folders: The folders that the user gave; one inside another is read once.

    Raises:
        DeftxError: Some folders do not exist (one message for all of them), or none holds a result or a sweep.
    """
    bad = [f"{folder}: no such folder" for folder in folders if not folder.exists()]
    bad += [f"{folder}: not a folder" for folder in folders if folder.exists() and not folder.is_dir()]
    if bad:
        raise DeftxError("\n".join(bad))
    collection = Collection()
    seen: set[Path] = set()
    results: dict[Path, Run | Trouble] = {}
    sweeps: list[tuple[Path, str]] = []
    for folder in folders:
        for path, name in _walk(folder, collection.troubles):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if (path / tracking.RESULT).is_file():
                results[path.resolve()] = _read(path, name)
            if (path / tracking.SWEEP).is_file():
                sweeps.append((path, name))
    if not results and not sweeps and not collection.troubles:
        searched = ", ".join(str(folder) for folder in folders)
        raise DeftxError(
            f"no {tracking.RESULT} below {searched}; give the folder of a run or a sweep "
            "(outputs/STUDY/..., multirun/STUDY/...), or make one: deftx run experiment=demo"
        )
    done, failed = _sort(results, collection)
    jobs = [job for path, name in sweeps for job in _sweep(path, name, results, collection)]
    _settle(collection, done, failed, jobs)
    return collection


def _walk(folder: Path, troubles: list[Trouble]) -> list[tuple[Path, str]]:
    """Return path and name of a folder and of those below it; reports and folders that cannot be opened are skipped."""
    paths: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        troubles.append(Trouble("unreadable", str(error.filename), error.strerror or "cannot be opened"))

    start = folder.name or str(folder.resolve().name)
    for root, subfolders, files in os.walk(folder, onerror=unreadable):
        if MARKER in files:
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in _SKIPPED)
        path = Path(root)
        paths.append((path, (Path(start) / path.relative_to(folder)).as_posix()))
    return paths


def _read(run_dir: Path, name: str) -> Run | Trouble:
    try:
        record = tracking.read_result(run_dir)
        if not isinstance(record.settings, dict) or not isinstance(record.study, str):
            raise DeftxError(f"{run_dir / tracking.RESULT} is not a result of deftx (its settings are no mapping)")
    except DeftxError as error:
        return Trouble("unreadable", name, str(error).replace(str(run_dir), name))
    return Run(name, run_dir, record)


def _sort(
    results: dict[Path, Run | Trouble], collection: Collection
) -> tuple[dict[str, list[Run]], list[tuple[Run, Trouble]]]:
    """Return distinct finished runs by job, and unfinished runs with their trouble; fills in the collection's runs."""
    done: dict[str, list[Run]] = {}
    failed_runs: list[tuple[Run, Trouble]] = []
    runs = sorted(
        (result for result in results.values() if isinstance(result, Run)),
        key=lambda run: (run.record.finished or "", run.name),
    )
    collection.troubles += [result for result in results.values() if isinstance(result, Trouble)]
    for run in runs:
        record = run.record
        if record.status != "done":
            error: dict[str, Any] = record.error or {}
            reason = " ".join(str(error.get("message") or error.get("type") or "no reason given").split())
            if error.get("traceback"):
                reason = f"{error.get('type')}: {reason}"
            kind = "failed" if record.status == "failed" else "missing"
            text = reason if kind == "failed" else f"{record.status}: it has not finished; its command again goes on"
            failed_runs.append((run, Trouble(kind, run.name, text)))
            continue
        same_job = done.setdefault(run.job, [])
        first = next((other for other in same_job if run.repeats(other)), None)
        if first is None:
            same_job.append(run)
        if not record.metrics:
            collection.without_scores.append(run)
        elif first is not None and _same_scores(first, run):
            collection.repeated.append((run, first))
        else:
            collection.runs.append(run)  # sections.py reports conflicting scores
    return done, failed_runs


def _same_scores(first: Run, second: Run) -> bool:
    """Return whether two runs of one job have equal scores and, where both have them, equal predictions."""
    values = [
        {(m.language, m.condition, m.metric, m.split): m.value for m in run.record.metrics} for run in (first, second)
    ]
    if values[0] != values[1]:
        return False
    paths = [run.folder / tracking.PREDICTIONS for run in (first, second)]
    if not all(path.is_file() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return True
    try:
        frames = [read_predictions(run) for run in (first, second)]
    except DeftxError:
        return True  # sections.py reports it where they are needed
    by = ["split", "language", "condition", "variant", "id"]
    tables = [frame.sort_values(by).reset_index(drop=True)[[*by, "label", "prediction"]] for frame in frames]
    return bool(tables[0].equals(tables[1]))


def read_predictions(run: Run) -> pd.DataFrame:
    """Read a run's predictions.

    Returns:
        Columns ``split``, ``language``, ``condition``, ``variant`` (str), ``id`` (str), ``label`` and ``prediction``;
        one row for each example of each cell.

    Raises:
        DeftxError: There are none, or they cannot be read.
    """
    columns = ["split", "language", "condition", "variant", "id", "label", "prediction"]
    frame = _parquet(run, tracking.PREDICTIONS, columns)
    if "split" not in frame:  # an older result evaluated one
        frame["split"] = section_key(run.record)[2]
    if "variant" not in frame:
        frame["variant"] = ""
    missing = {"language", "condition", "id", "label", "prediction"} - set(frame.columns)
    if missing:
        raise DeftxError(f"{run.name}/{tracking.PREDICTIONS} lacks the columns {', '.join(sorted(missing))}")
    return frame.astype({"id": str, "variant": str})


def read_diagnostics(run: Run, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a run's diagnostics; ``key`` and ``other_key`` are the keys of the SFTs in its result.

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
        available = set(pq.read_schema(path).names)
        return pd.read_parquet(path, columns=[column for column in columns if column in available])
    except FileNotFoundError as error:
        raise DeftxError(f"{run.name} has no {name}") from error
    except (OSError, ValueError, ArrowException) as error:
        raise DeftxError(f"{run.name}/{name} cannot be read ({' '.join(str(error).split())[:120]})") from error


def _sweep(
    sweep_dir: Path, name: str, results: dict[Path, Run | Trouble], collection: Collection
) -> list[tuple[tuple[str, ...], Trouble | Run]]:
    """Return the request (study, command, overrides) of each job of a sweep, with its run or its trouble."""
    try:
        record = tracking.read_sweep(sweep_dir)
    except DeftxError as error:
        collection.troubles.append(Trouble("unreadable", name, str(error).replace(str(sweep_dir), name)))
        return []
    collection.sweeps.append((name, record))
    jobs: list[tuple[tuple[str, ...], Trouble | Run]] = []
    for job in [*record.stages, *record.jobs]:
        request = (record.study, record.command, *sorted(job.overrides))
        swept = " ".join(job.swept)
        where = f"{name}/{job.folder}"
        result = results.get((sweep_dir / job.folder).resolve())
        if result is None and job in record.stages and job.status in ("done", "cached"):
            continue  # a shared stage keeps its result in the cache
        if isinstance(result, Run):
            result.swept = result.swept or swept
            jobs.append((request, result))
        elif result is None:
            shown = f"{where} ({swept})" if swept else where
            if job.status == "failed":
                jobs.append((request, Trouble("failed", shown, " ".join((job.error or "no reason given").split()))))
            else:
                state = {
                    "waiting": "not started when the sweep stopped",
                    "interrupted": "interrupted; the same command again goes on",
                    "running": "begun but not finished: the sweep was killed, or still runs",
                }.get(job.status, f"the sweep says {job.status}, but there is no {tracking.RESULT}")
                jobs.append((request, Trouble("missing", shown, state)))
    return jobs


def _settle(
    collection: Collection,
    done: dict[str, list[Run]],
    failed_runs: list[tuple[Run, Trouble]],
    jobs: list[tuple[tuple[str, ...], Trouble | Run]],
) -> None:
    """Add the trouble of each failed or missing job, with the run of another launch that finished it."""
    runs = [(request, result) for request, result in jobs if isinstance(result, Run)]
    finished = {request: run for request, run in runs if run.record.status == "done"}
    names = {run.name: run.shown for _, run in runs}
    requests = {run.name: request for request, run in runs}
    for run, trouble in failed_runs:
        later = next((other for other in done.get(run.job, []) if run.made_up_by(other)), None)
        if later is None and run.name in requests:
            later = finished.get(requests[run.name])
        name = names.get(trouble.name, trouble.name)
        collection.troubles.append(Trouble(trouble.kind, name, trouble.reason, later.shown if later else ""))
    for request, result in jobs:
        if isinstance(result, Trouble):
            again = finished.get(request)
            collection.troubles.append(Trouble(result.kind, result.name, result.reason, again.shown if again else ""))
