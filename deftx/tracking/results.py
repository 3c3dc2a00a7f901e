"""Reads and writes result.json and its companion files; writes are atomic, and failed runs have a record too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deftx import atomic
from deftx.errors import DeftxError
from deftx.memory import peak_memory
from deftx.methods.table import BY_PROXY, METHODS, WITHOUT_LANGUAGE_SFT
from deftx.tracking.facts import CellFacts, Provenance, Remark, SFTFacts, data_read
from deftx.tracking.legacy import upgrade

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CONDITIONS",
    "DIAGNOSTICS",
    "PREDICTIONS",
    "RESULT",
    "RUN_FILES",
    "Metric",
    "RunRecord",
    "clock_imports",
    "mean_scores",
    "read_result",
    "recording",
    "score_rows",
    "title_of",
    "write_diagnostics",
    "write_predictions",
    "write_result",
]


log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA_VERSION = 4
OLDEST_READ = 1
WITH_FACTS = 3  # from here on results say what was composed as fields
RESULT = "result.json"
METRICS = "metrics.csv"
PREDICTIONS = "predictions.parquet"
DIAGNOSTICS = "diagnostics.parquet"
RUN_FILES = {"result": RESULT, "scores": METRICS, "predictions": PREDICTIONS, "diagnostics": DIAGNOSTICS}

CONDITIONS = {
    "no_language_sft": "no language SFTs",
    "source_sft": "source SFT left in",
    "other_language_sft": "other language's SFT",
    **{name: METHODS[name].title for name in reversed(METHODS)},
    **{name: f"{METHODS[method].title} without φ_L" for name, method in reversed(WITHOUT_LANGUAGE_SFT.items())},
    **{name: f"{METHODS[method].title} with a proxy φ_L" for name, method in reversed(BY_PROXY.items())},
    "source_language_only": "task SFT alone",
    "composed": "composed",
}
"""Stable names of what a target is evaluated with, in the order of the table's columns, and the columns' titles:
controls, methods, methods where a target has no language SFT, and given SFTs."""

SHARED_SOURCE = "shared φ_S"
"""What tables add to the title of a condition whose task SFT stands on one φ_S for all methods and settings."""


def title_of(condition: str, *, shared_source: bool = False) -> str:
    """Return the title of a condition's column.

    Args:
        condition: One of :data:`CONDITIONS`, or a name of its own.
        shared_source: Whether the run's task SFTs stand on one φ_S; the one without language SFTs stands on none.
    """
    title = CONDITIONS.get(condition, condition)
    return f"{title}, {SHARED_SOURCE}" if shared_source and condition != "no_language_sft" else title


@dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
        language: the target language's code.
        condition: what was composed; one of :data:`CONDITIONS`, or a name of its own.
        metric: ``macro_f1``, ``accuracy``, ...
        value: a fraction from 0 to 1 (or whatever the metric's unit is); None when it could not be computed.
        n: number of examples.
        split: what the examples are: ``test`` unless the user asked for another split.
    """

    language: str
    condition: str
    metric: str
    value: float | None
    n: int
    split: str = "test"


@dataclass
class RunRecord:
    """Everything ``result.json`` says about one run; plain values only.

    Attributes:
        study: name of the study (the W&B group).
        job: name of this run within it.
        settings: the knobs, flat or nested; a knob the method ignores is None. ``data.read`` says what data was read
            (:func:`deftx.tracking.data_setting`), as soon as it is known.
        seed: the run's seed.
        provenance: of this process, from :func:`deftx.tracking.provenance`.
        status: ``running``, ``done``, ``failed`` or ``interrupted``, which can go on.
        metrics: every score.
        fingerprints: name -> fingerprint: ``base`` (as in ``sft.json``), ``base files``, ``base commit`` on the
            hub, the rows evaluated.
        job_type: ``run``, ``stage`` (part of a study that a sweep's jobs share), ``sft-language``, ``sft-task`` or
            ``eval``.
        sfts: every SFT that the run made or read.
        cells: every evaluation, with what it composes.
        languages: code -> what is known of a target: ``name``, ``family``, ``script``, and of its unlabelled text
            ``fertility`` (pieces a word), ``type_token_ratio``, ``words_per_sentence``, where it was computed.
        data: name -> what was read, dropped (and why) and kept.
        stages: one mapping for each stage: ``kind``, ``label``, ``key``, ``outcome``, ``seconds``.
        times: name -> seconds: of each kind of stage, and ``imports``, from the start of the command to that of its
            first run (other runs lack it): loading modules and checking the configuration. It is not in ``seconds``.
        peak_memory: bytes: ``cpu`` (this process), ``gpu`` (given by the caller).
        error: of a failed run: ``type``, ``message``, ``traceback``.
        notes: what a reader should see beside the numbers (an untrained head, dev in place of test).
        provenances: what the stages that the result stands on were computed under; several where they differ, empty
            where nobody noted it.
        started, finished: UTC, ISO 8601; ``seconds``: wall time between them.
    """

    study: str
    job: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    status: str = "running"
    metrics: list[Metric] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    job_type: str = "run"
    sfts: list[SFTFacts] = field(default_factory=list)
    cells: list[CellFacts] = field(default_factory=list)
    languages: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    stages: list[Mapping[str, Any]] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int | None] = field(default_factory=dict)
    error: dict[str, str | None] | None = None
    notes: list[Remark] = field(default_factory=list)
    provenances: list[Provenance] = field(default_factory=list)
    started: str = field(default_factory=lambda: _now())
    finished: str | None = None
    seconds: float | None = None
    _clock: float = field(default_factory=time.perf_counter, repr=False)

    def own_cells(self) -> list[CellFacts]:
        """Return the cells of the job's own composed models: controls and the methods it is compared with left out."""
        if self.job_type == "eval":  # given SFTs are composed as they are, whatever trained them
            return [cell for cell in self.cells if cell.condition == "composed"] or self.cells
        return [cell for cell in self.cells if cell.condition == self.settings.get("method")]

    def composed(self, condition: str | None = None) -> set[str]:
        """Return keys of the SFTs that a condition's cells compose; without one, those of all but the controls."""
        if condition is not None:
            cells = [cell for cell in self.cells if cell.condition == condition]
        else:
            cells = [cell for cell in self.cells if cell.condition == cell.method or self.job_type == "eval"]
        return {term.key for cell in cells for term in cell.terms}

    def finish(self, error: BaseException | None = None) -> None:
        """Set status, end, wall time, peak memory, and for a failed run the error."""
        self.status = status_of(None if error is None else type(error))
        self.finished, self.seconds = _now(), round(time.perf_counter() - self._clock, 3)
        self.peak_memory["cpu"] = peak_memory()
        if _command_starts:
            self.times["imports"] = round(self._clock - _command_starts.pop(), 3)
        if error is not None:
            # A message explains a user's mistake; any other error needs its traceback.
            expected = isinstance(error, DeftxError | KeyboardInterrupt)
            trace = None if expected else "".join(traceback.format_exception(error))
            self.error = {"type": type(error).__name__, "message": str(error), "traceback": trace}


def status_of(error: type[BaseException] | None) -> str:
    """Return the status of a run that ended with an error of a type, or without one."""
    if error is None:
        return "done"
    return "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"


_command_starts: list[float] = []  # of the command in this process, until its first run has ended


def clock_imports() -> None:
    """Note that a command starts; its first run records the seconds from here to its own start as ``imports``."""
    _command_starts[:] = [time.perf_counter()]


def score_rows(
    metrics: Iterable[Metric],
) -> tuple[dict[tuple[str, str, str], dict[str, Metric]], list[str]]:
    """Return scores as (metric, split, language) -> condition -> score, and the conditions in order."""
    rows: dict[tuple[str, str, str], dict[str, Metric]] = {}
    for score in metrics:
        rows.setdefault((score.metric, score.split, score.language), {})[score.condition] = score
    present = {name: None for row in rows.values() for name in row}
    return rows, [name for name in CONDITIONS if name in present] + [n for n in present if n not in CONDITIONS]


def mean_scores(record: RunRecord) -> dict[str, float]:
    """Return each condition's mean over the targets: the record's first metric, the task's own, on its first split."""
    values: dict[str, list[float]] = {}
    for score in record.metrics:
        first = record.metrics[0]
        if (score.metric, score.split) == (first.metric, first.split) and score.value is not None:
            values.setdefault(score.condition, []).append(score.value)
    return {condition: sum(fractions) / len(fractions) for condition, fractions in values.items()}


def write_result(run_dir: str | os.PathLike[str], record: RunRecord) -> Path:
    """Write ``result.json`` and ``metrics.csv`` (one row for each score) into the run directory, atomically.

    Values that JSON lacks raise no error: NaN and infinity become null, paths and other objects their text.

    Raises:
        DeftxError: the directory cannot be written.
    """
    import csv
    import io

    content = {"schema_version": SCHEMA_VERSION}
    content |= {
        member.name: getattr(record, member.name)
        for member in dataclasses.fields(record)
        if not member.name.startswith("_")
    }
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow([column.name for column in dataclasses.fields(Metric)])
    table.writerows(dataclasses.astuple(metric) for metric in record.metrics)
    folder = Path(run_dir)
    write_file(folder / METRICS, lambda path: path.write_text(rows.getvalue(), encoding="utf-8"))
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_file(folder / RESULT, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def read_record(
    path: str | os.PathLike[str], name: str, kind: str, versions: tuple[int, int], build: Callable[[int, Any], T]
) -> T:
    """Read a JSON record that says its schema's version.

    Args:
        path: the file, or the folder it lies in.
        name: its usual name.
        kind: what it is, for messages.
        versions: the oldest and the newest schema that can be read.
        build: makes the record from the schema's version and the rest of the content.

    Raises:
        DeftxError: the file is missing, is no such record, or has a schema that cannot be read.
    """
    file = Path(path)
    file = file / name if file.is_dir() else file
    oldest, newest = versions
    try:
        content = json.loads(file.read_bytes())
        version = content.pop("schema_version")
        if not oldest <= version <= newest:
            readable = str(newest) if oldest == newest else f"{oldest} to {newest}"
            raise DeftxError(f"{file} has schema version {version}; this deftx reads {readable}")
        return build(version, content)
    except OSError as error:
        raise DeftxError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeftxError(f"{file} is not a {kind} of deftx ({error})") from error


def read_result(path: str | os.PathLike[str]) -> RunRecord:
    """Read a ``result.json``, or the one in a run directory.

    Raises:
        DeftxError: the file is missing, is no such record, or has a schema that cannot be read.
    """

    def build(version: int, content: Any) -> RunRecord:
        if version < WITH_FACTS:
            content = upgrade(version, content)
        content["metrics"] = [Metric(**metric) for metric in content["metrics"]]
        content["sfts"] = [SFTFacts(**sft) for sft in content["sfts"]]
        content["cells"] = [CellFacts.read(cell) for cell in content["cells"]]
        content["notes"] = [Remark(**remark) for remark in content["notes"]]
        content["provenances"] = [Provenance(**provenance) for provenance in content["provenances"]]
        data_read(content.get("settings", {}))  # raises here, not where it is needed
        return RunRecord(**content)

    return read_record(path, RESULT, "result", (OLDEST_READ, SCHEMA_VERSION), build)


@contextlib.contextmanager
def recording(run_dir: str | os.PathLike[str], record: RunRecord) -> Iterator[RunRecord]:
    """Write the record when the block begins and when it ends, also when it fails; re-raises the exception.

    A killed run leaves a record with the status ``running``.

    Raises:
        DeftxError: the run directory cannot be written, or holds a finished run.
    """
    _refuse_finished(Path(run_dir) / RESULT)
    write_result(run_dir, record)
    try:
        yield record
    except BaseException as error:
        record.finish(error)
        try:
            write_result(run_dir, record)
        except DeftxError as unwritten:
            log.error("%s", unwritten)
        raise
    record.finish()
    write_result(run_dir, record)


def _refuse_finished(result: Path) -> None:
    if not result.is_file():
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(result.read_bytes()).get("status") == "done":
            raise DeftxError(f"{result.parent} holds a finished run; nothing is overwritten: give another folder")


def write_predictions(run_dir: str | os.PathLike[str], frame: pd.DataFrame) -> Path:
    """Write ``predictions.parquet``: one row for each language, condition and example.

    Args:
        run_dir: the run directory.
        frame: columns ``language``, ``condition``, ``id`` (str), ``label`` (int), and the scores, one float32
            column for each class; its index is left out.

    Raises:
        DeftxError: the directory cannot be written.
        ValueError: a column is missing.
    """
    missing = [name for name in ("language", "condition", "id", "label") if name not in frame.columns]
    if missing:
        raise ValueError(f"predictions lack the columns {missing}; they have {list(frame.columns)}")
    return write_file(Path(run_dir) / PREDICTIONS, lambda path: frame.to_parquet(path, index=False))


def write_diagnostics(run_dir: str | os.PathLike[str], frame: pd.DataFrame) -> Path:
    """Write ``diagnostics.parquet``: spectra, ranks, energies, mask densities and overlaps, one row for each
    fact. Its columns ``key`` and ``other_key`` are those of the result's SFTs.

    Raises:
        DeftxError: the directory cannot be written.
    """
    return write_file(Path(run_dir) / DIAGNOSTICS, lambda path: frame.to_parquet(path, index=False))


def write_file(path: Path, fill: Callable[[Path], Any]) -> Path:
    """Write a file atomically: ``fill`` writes a temporary sibling, which is synced and renamed.

    Raises:
        DeftxError: the folder cannot be written.
    """
    try:
        with atomic.file(path) as temporary:
            fill(temporary)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DeftxError(
            f"cannot write {path}: {reason}. Make room or permission there, or choose another output folder, "
            "and run the command again: finished stages come from the cache."
        ) from error
    return path


def finite(value: float | None) -> float | None:
    """Return the value, None in place of NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Return a value in JSON's types: NaN and infinity become None, paths and other objects their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {member.name: plain(getattr(value, member.name)) for member in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(element) for key, element in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(element) for element in value]
    if type(value).__module__ in ("numpy", "torch") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    return str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
