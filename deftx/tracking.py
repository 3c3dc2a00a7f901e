"""What a run leaves behind: result.json, predictions, CSV, a table on the terminal, a W&B run.

``result.json`` is the record that reports read; everything else repeats or details it. It is written for
failed runs too, atomically, with everything needed to say where its numbers come from (provenance,
fingerprints, stage keys). W&B mirrors it: one run for each job, group = study, offline unless asked
otherwise, closed whatever happens; trouble with W&B is logged and never costs a result.

Scores are stored as fractions (0 to 1) and shown multiplied by 100. wandb, pandas, pyarrow, rich and Lightning
are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deftx.errors import DeftxError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "CONDITIONS",
    "LoggerSettings",
    "Metric",
    "RunRecord",
    "Tracker",
    "mean_scores",
    "print_results",
    "print_sweep",
    "provenance",
    "read_result",
    "recording",
    "results_table",
    "write_diagnostics",
    "write_predictions",
    "write_result",
]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RESULT = "result.json"
METRICS = "metrics.csv"
PREDICTIONS = "predictions.parquet"
DIAGNOSTICS = "diagnostics.parquet"

CONDITIONS = {
    "no_language_sft": "no language SFTs",
    "source_sft": "source SFT left in",
    "other_language_sft": "other language's SFT",
    "ltsft": "LT-SFT",
    "deftx": "DeFT-X",
    "source_language_only": "task SFT alone",
    "composed": "composed",
}
"""Stable names of what a target is evaluated with, in the order of the table's columns, and the columns'
titles."""

_PACKAGES = (
    "deftx",
    "torch",
    "pytorch-lightning",
    "torchmetrics",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "pandas",
    "hydra-core",
    "wandb",
)
_NAMES = {"macro_f1": "macro-F1"}


# ------------------------------------------------------------------------------------------------- provenance


def provenance(folder: Path | None = None, *, gpu: str | None = None) -> dict[str, Any]:
    """Say where numbers come from: code, versions and the kind of machine. No host or user names.

    Args:
        folder: the working directory whose git checkout is recorded; default: the current one.
        gpu: name of the device used, if any (this module does not ask torch).

    Returns:
        Plain values: ``git`` (``deftx`` and ``working_directory``, each ``{commit, dirty}``, or None outside
        of a checkout), ``versions`` (installed packages), ``python``, ``platform``, ``machine``, ``cpu``,
        ``cpus`` (usable ones), ``threads`` (torch's when it is loaded), ``gpu``.
    """
    package = Path(__file__).parent
    torch: Any = sys.modules.get("torch")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "git": {
            "deftx": _git(package) if _git_output(package, "ls-files", "errors.py") else None,
            "working_directory": _git(Path(folder or Path.cwd())),
        },
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": cpus,
        "threads": torch.get_num_threads() if torch is not None else cpus,
        "gpu": gpu,
    }


@functools.cache
def _git(folder: Path) -> dict[str, Any] | None:
    commit = _git_output(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_git_output(folder, "status", "--porcelain", "-uno"))}


def _git_output(folder: Path, *arguments: str) -> str:
    import subprocess

    # Inside a git hook, GIT_DIR and its like would point at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


@functools.cache
def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------- results


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
        settings: the knobs, flat or nested; a knob the method ignores is None.
        seed: the run's seed.
        provenance: from :func:`provenance`.
        status: ``running``, ``done`` or ``failed``.
        metrics: every score.
        fingerprints: name -> fingerprint: ``base`` (as in ``sft.json``), ``base files``, the rows evaluated.
        sfts: one mapping for each SFT: ``name``, ``sha256``, ``metrics`` of its sparse phase.
        data: name -> what was read, dropped (and why) and kept.
        stages: one mapping for each stage: ``kind``, ``label``, ``key``, ``outcome``, ``seconds``.
        times: name -> seconds of parts of the run.
        peak_memory: bytes: ``cpu`` (this process), ``gpu`` (given by the caller).
        error: of a failed run: ``type``, ``message``, ``traceback``.
        notes: plain remarks a reader should see beside the numbers (an untrained head, dev in place of test).
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
    sfts: list[Mapping[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    stages: list[Mapping[str, Any]] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int | None] = field(default_factory=dict)
    error: dict[str, str | None] | None = None
    notes: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: _now())
    finished: str | None = None
    seconds: float | None = None
    _clock: float = field(default_factory=time.perf_counter, repr=False)

    def finish(self, error: BaseException | None = None) -> None:
        """Set status, end, wall time, peak memory, and for a failed run the error."""
        self.status = "done" if error is None else "failed"
        self.finished, self.seconds = _now(), round(time.perf_counter() - self._clock, 3)
        self.peak_memory["cpu"] = _peak_memory()
        if error is not None:
            # A user's mistake is told by its message; anything else needs its traceback.
            told = isinstance(error, DeftxError | KeyboardInterrupt)
            trace = None if told else "".join(traceback.format_exception(error))
            self.error = {"type": type(error).__name__, "message": str(error), "traceback": trace}


def write_result(run_dir: str | os.PathLike[str], record: RunRecord) -> Path:
    """Write ``result.json`` and ``metrics.csv`` (one row for each score) into the run directory, atomically.

    Values that JSON has no word for never spoil a finished run: NaN and infinity become null, paths and other
    objects their text.

    Raises:
        DeftxError: the directory cannot be written.
    """
    import csv
    import io

    content = {"schema_version": SCHEMA_VERSION}
    content |= {
        item.name: getattr(record, item.name) for item in dataclasses.fields(record) if not item.name.startswith("_")
    }
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow([item.name for item in dataclasses.fields(Metric)])
    table.writerows(dataclasses.astuple(metric) for metric in record.metrics)
    folder = Path(run_dir)
    _write(folder / METRICS, lambda path: path.write_text(rows.getvalue(), encoding="utf-8"))
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _write(folder / RESULT, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def read_result(path: str | os.PathLike[str]) -> RunRecord:
    """Read a ``result.json``, or the one in a run directory.

    Raises:
        DeftxError: there is none, it is not one, or its schema is another.
    """
    place = Path(path)
    place = place / RESULT if place.is_dir() else place
    try:
        content = json.loads(place.read_bytes())
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise DeftxError(f"{place} has schema version {version}; this deftx reads {SCHEMA_VERSION}")
        content["metrics"] = [Metric(**metric) for metric in content["metrics"]]
        return RunRecord(**content)
    except OSError as error:
        raise DeftxError(f"cannot read {place}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeftxError(f"{place} is not a result of deftx ({error})") from error


@contextlib.contextmanager
def recording(run_dir: str | os.PathLike[str], record: RunRecord) -> Iterator[RunRecord]:
    """Write the record when the block ends, also when it fails; the exception goes on.

    Raises:
        DeftxError: the run directory cannot be written.
    """
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
    return _write(Path(run_dir) / PREDICTIONS, lambda path: frame.to_parquet(path, index=False))


def write_diagnostics(run_dir: str | os.PathLike[str], frame: pd.DataFrame) -> Path:
    """Write ``diagnostics.parquet``: spectra, ranks, energies, mask densities and overlaps, one row for each
    fact.

    Raises:
        DeftxError: the directory cannot be written.
    """
    return _write(Path(run_dir) / DIAGNOSTICS, lambda path: frame.to_parquet(path, index=False))


def _write(path: Path, fill: Callable[[Path], Any]) -> Path:
    temporary = path.with_name(f".{path.stem}.{os.urandom(4).hex()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DeftxError(
            f"cannot write {path}: {reason}. Make room or permission there, or choose another output folder, "
            "and run the command again: finished stages come from the cache."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if type(value).__module__ in ("numpy", "torch") and getattr(value, "ndim", 1) == 0:
        return _plain(value.item())
    return str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------ table


def results_table(metrics: Sequence[Metric], *, metric: str | None = None, title: str | None = None) -> Table:
    """Lay out scores for the terminal: a row for each target and their mean, a column for each condition.

    Scores are multiplied by 100; the best of a row is bold. ``–`` is a score that was not asked for,
    ``failed`` one that could not be computed. A mean over fewer than all targets says so and is never bold:
    it does not compare.

    Args:
        metrics: scores of one run; targets stand in the order of their first score.
        metric: which metric to show when there are several; default: the first.
        title: what stands above; default: the metric.

    Raises:
        ValueError: two scores for one cell.
    """
    from rich.table import Table
    from rich.text import Text

    metric = metric or (metrics[0].metric if metrics else "")
    cells: dict[tuple[str, str], dict[str, Metric]] = {}
    for item in metrics:
        if item.metric == metric:
            row = cells.setdefault((item.language, item.split), {})
            if item.condition in row:
                raise ValueError(f"two scores for {item.language}, {item.condition}: show one run at a time")
            row[item.condition] = item
    asked = dict.fromkeys(condition for row in cells.values() for condition in row)
    conditions = [name for name in CONDITIONS if name in asked] + [n for n in asked if n not in CONDITIONS]

    table = Table(title=Text(title or f"{_NAMES.get(metric, metric)} × 100"), title_style="bold")
    table.add_column("target")
    table.add_column("n", justify="right")
    for name in conditions:
        table.add_column(Text(CONDITIONS.get(name, name)), justify="right")
    for (language, split), row in cells.items():
        sizes = sorted({item.n for item in row.values()})
        size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        values = [_number(row[name].value) if name in row else None for name in conditions]
        texts = [
            f"{100 * value:.1f}" if value is not None else "failed" if name in row else "–"
            for name, value in zip(conditions, values, strict=True)
        ]
        table.add_row(Text(language if split == "test" else f"{language} ({split})"), size, *_bold(texts, values))
    for split in dict.fromkeys(split for _, split in cells):
        rows = [row for (_, of), row in cells.items() if of == split]
        if len(rows) == 1:
            continue
        table.add_section()
        means: list[float | None] = []
        texts = []
        for name in conditions:
            known = [value for row in rows if name in row and (value := _number(row[name].value)) is not None]
            mean = sum(known) / len(known) if known else None
            complete = len(known) == len(rows)
            means.append(mean if complete else None)
            text = "–" if mean is None else f"{100 * mean:.1f}"
            texts.append(text if complete or mean is None else f"{text} ({len(known)} of {len(rows)})")
        label = f"mean of {len(rows)}"
        table.add_row(label if split == "test" else f"{label} ({split})", "", *_bold(texts, means))
    return table


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _bold(texts: Sequence[str], values: Sequence[float | None]) -> list[Any]:
    from rich.text import Text

    known = [value for value in values if value is not None]
    best = max(known) if len(known) > 1 else None
    pairs = zip(texts, values, strict=True)
    return [Text(text, style="bold" if value is not None and value == best else "") for text, value in pairs]


def print_results(
    metrics: Sequence[Metric],
    *,
    where: Mapping[str, object] | None = None,
    failed: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a table for each metric, then notes, failed runs with their reasons, and where everything lies.

    Args:
        metrics: scores of one run; may be empty.
        where: what -> path, one line each.
        failed: name of a run -> the reason in one line.
        notes: remarks that belong to the numbers.
        title: what stands above the tables.
        console: default: standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for name in dict.fromkeys(item.metric for item in metrics):
        shown = f"{_NAMES.get(name, name)} × 100"
        console.print(results_table(metrics, metric=name, title=f"{title}: {shown}" if title else shown))
    if not metrics:
        console.print("no scores")
    lines = [f"note: {note}" for note in notes]
    lines += [f"failed: {name}: {reason}" for name, reason in (failed or {}).items()]
    width = max((len(name) for name in where or {}), default=0)
    lines += [f"{name:<{width}}  {place}" for name, place in (where or {}).items()]
    for line in lines:
        # Paths stay on one line, so that they can be copied.
        console.print(Text(line), soft_wrap=True, highlight=False)


def mean_scores(record: RunRecord) -> dict[str, float]:
    """Mean over the targets of each condition's score, in the task's own metric (a record's first)."""
    values: dict[str, list[float]] = {}
    for item in record.metrics:
        if item.metric == record.metrics[0].metric and item.value is not None:
            values.setdefault(item.condition, []).append(item.value)
    return {condition: sum(found) / len(found) for condition, found in values.items()}


def print_sweep(jobs: Sequence[tuple[str, Mapping[str, float], str | None]], *, title: str) -> None:
    """Print a sweep's jobs side by side, scores multiplied by 100.

    Args:
        jobs: of each job, what was swept (``rank=8``), its mean scores by condition, and its error if it failed.
        title: what stands above.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    asked = {condition for _, scores, _ in jobs for condition in scores}
    conditions = [name for name in CONDITIONS if name in asked]
    table = Table(title=Text(title + (", mean over targets × 100" if conditions else "")), title_style="bold")
    table.add_column("job")
    for name in conditions:
        table.add_column(Text(CONDITIONS[name]), justify="right")
    for swept, scores, error in jobs:
        cells = [f"{100 * scores[name]:.1f}" if name in scores else "failed" if error else "–" for name in conditions]
        table.add_row(Text(swept), *cells)
    Console().print(table)


# ------------------------------------------------------------------------------------------- Weights & Biases


@dataclass
class LoggerSettings:
    """Where a run is logged beside its own files.

    Attributes:
        wandb: ``offline`` (files in the run directory, no account, no network), ``online`` or ``off``. The
            environment's ``WANDB_MODE`` can lower it, never raise it.
        project: W&B project.
        entity: W&B user or team; None: the account's own.
        group: None: the study's name.
        name: None: the job's name.
        tags: added to method, task and languages.
        dir: where W&B writes its files; None: the run directory.
        artifacts: upload (or stage) SFT folders as artifacts.
        curves: write training curves as CSV under ``curves/`` in the run directory.
    """

    wandb: str = "offline"
    project: str = "deftx"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    dir: str | None = None
    artifacts: bool = False
    curves: bool = True

    def validate(self) -> None:
        """Check what can be checked without importing wandb.

        Raises:
            DeftxError: an unknown mode, or a project name that W&B does not take.
        """
        if self.wandb not in _MODES:
            guess = did_you_mean(str(self.wandb), _MODES)
            raise DeftxError(f"logger.wandb is {self.wandb!r}; it can be {', '.join(_MODES)}{guess}")
        if not self.project or len(self.project) > 128 or re.search(r"[/\\#?%:]", self.project):
            raise DeftxError(f"logger.project is {self.project!r}; W&B takes 1 to 128 characters without / \\ # ? % :")


_MODES = ("off", "offline", "online")


class Tracker:
    """One W&B run for one job, as a context manager; every method does nothing when W&B is off.

    The run is a new one whatever other runs the process has or had, is finished when the block ends (exit
    code 1 when it ends by an exception), and never asks anything. Without an account, ``online`` becomes
    ``offline`` with a warning. W&B's own process completes the run's files a moment after the block ends.
    Publish an offline run with ``wandb sync RUN_DIR/wandb/offline-run-*`` from where it was made: its tables
    and artifacts are staged under ``RUN_DIR/wandb/staging`` and found by absolute path.

    Args:
        settings: where to log.
        run_dir: the run's directory.
        study: W&B group.
        job_type: ``run``, ``sft-language``, ``sft-task`` or ``eval``.
        name: name of the run.
        config: the knobs; nested ones are flattened, ``{"lang": {"rank": 16}}`` to ``lang/rank`` (W&B keys
            should hold no dots).
        tags: method, task, languages.

    Attributes:
        run: the ``wandb.Run``, or None.
        mode: what W&B really does: ``off``, ``offline`` or ``online``.
    """

    def __init__(
        self,
        settings: LoggerSettings,
        run_dir: str | os.PathLike[str],
        *,
        study: str,
        job_type: str = "run",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        settings.validate()
        self.settings = settings
        self.run_dir = Path(run_dir).absolute()
        self.study = study
        self.job_type = job_type
        self.name = settings.name or name
        self.config = _flat(_plain(config or {}))
        self.tags = [tag[:64] for tag in dict.fromkeys([*tags, *settings.tags]) if tag]
        self.run: Any = None
        self.mode = "off"
        self._environment: dict[str, str | None] = {}
        self._curves: set[str] = set()

    @property
    def folder(self) -> Path:
        """The folder that holds W&B's own ``wandb`` folder."""
        return Path(self.settings.dir).expanduser().absolute() if self.settings.dir else self.run_dir

    def __enter__(self) -> Self:
        mode = min(self.settings.wandb, _environment_mode(), key=_MODES.index)
        if mode == "off" or not _is_first_rank():
            return self
        try:
            # wandb itself would fall back to the system's temporary folder, and lose the run there.
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeftxError(f"cannot write {self.folder}: {error.strerror}") from error
        if mode == "online":
            self._start("online")
        if self.run is None:
            # Error reports of wandb go over the network even when the run does not.
            self._set_environment("WANDB_ERROR_REPORTING", "false")
            self._start("offline")
        if self.run is None:
            self._restore_environment()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.run is not None:
                with self._forgiving("finishing the run"):
                    self.run.summary["status"] = "done" if kind is None else "failed"
                with self._forgiving("finishing the run"):
                    self.run.finish(exit_code=0 if kind is None else 1)
        finally:
            self.run = None
            self._restore_environment()

    def record(self, metrics: Sequence[Metric], *, extra: Mapping[str, Any] | None = None) -> None:
        """Put scores into the run.

        They become a summary entry ``metric/language/condition`` for each, means over the
        targets (``metric/mean/condition``, only where no target is missing), and the table ``results``, a row
        for each target and metric, a column for each condition.

        Args:
            metrics: scores as fractions.
            extra: other summary values under stable names, such as ``seconds/total``.
        """
        if self.run is None:
            return
        import wandb

        summary: dict[str, Any] = {}
        rows: dict[tuple[str, str, str], dict[str, Metric]] = {}
        for item in metrics:
            rows.setdefault((item.metric, item.split, item.language), {})[item.condition] = item
        asked = {item.condition: None for item in metrics}
        conditions = [name for name in CONDITIONS if name in asked] + [n for n in asked if n not in CONDITIONS]
        means: dict[tuple[str, str, str], list[float | None]] = {}
        for (metric, split, language), row in rows.items():
            for name in conditions:
                value = _number(row[name].value) if name in row else None
                means.setdefault((metric, split, name), []).append(value)
                if name in row:
                    summary[_summary_name(metric, split, language, name)] = value
        for (metric, split, name), values in means.items():
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                summary[_summary_name(metric, split, "mean", name)] = sum(known) / len(known)
        summary |= _flat(_plain(extra or {}))
        with self._forgiving("logging the scores"):
            self.run.summary.update(summary)
            if rows:
                data: list[Any] = [
                    [language, split, metric, max(item.n for item in row.values())]
                    + [_number(row[name].value) if name in row else None for name in conditions]
                    for (metric, split, language), row in rows.items()
                ]
                table = wandb.Table(columns=["language", "split", "metric", "n", *conditions], data=data)
                with self._staging():
                    self.run.log({"results": table})

    def artifact(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str,
        kind: str = "sft",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Log a folder as an artifact, when ``settings.artifacts`` asks for it.

        Args:
            folder: the SFT's folder.
            name: artifact name; characters W&B does not take become ``-``.
            kind: artifact type.
            about: plain metadata.
        """
        if self.run is None or not self.settings.artifacts:
            return
        import wandb

        with self._forgiving(f"logging the artifact {name}"), self._staging():
            clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128]
            artifact = wandb.Artifact(clean, type=kind, metadata=_plain(about or {}))
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
            self.run.log_artifact(artifact)

    def lightning_loggers(self, stage: str) -> list[Any]:
        """Return Lightning loggers for the trainer of one stage: CSV curves, and this W&B run when it is on.

        In W&B the stage's curves are ``STAGE/train/loss`` and so on over ``STAGE/step``; hyperparameters of
        modules are left out, the config is the job's. As CSV they are ``curves/STAGE/metrics.csv`` in the run
        directory.

        Args:
            stage: a stable name such as ``full/ace``; a repeated one gets a number.
        """
        if not _is_first_rank():
            return []
        loggers: list[Any] = []
        number = 1
        name = stage
        while name in self._curves or (self.run_dir / "curves" / name).exists():
            number += 1
            name = f"{stage}-{number}"
        self._curves.add(name)
        if self.settings.curves:
            from pytorch_lightning.loggers import CSVLogger

            loggers.append(CSVLogger(self.run_dir / "curves", name=name, version=""))
        if self.run is not None:
            loggers.append(_stage_logger(self, name))
        return loggers

    def log_curve(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Log points of a stage's curves at an optimizer step."""
        if self.run is not None:
            with self._forgiving("logging curves"):
                self.run.log({**{f"{stage}/{key}": value for key, value in values.items()}, f"{stage}/step": step})

    # ---------------------------------------------------------------------------------------------- the run

    def _start(self, mode: str) -> None:
        import wandb

        with self._forgiving(f"starting W&B {mode}"):
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("no W&B account on this machine; `wandb login` adds one")
            self.run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                id=os.urandom(4).hex(),
                dir=str(self.folder),
                project=self.settings.project,
                entity=self.settings.entity,
                group=self.settings.group or self.study,
                job_type=self.job_type,
                name=self.name,
                tags=self.tags,
                config=self.config,
                reinit="create_new",
                settings=wandb.Settings(
                    silent=mode == "offline",
                    quiet=True,
                    show_info=False,
                    console="off",
                    disable_code=True,
                    save_code=False,
                    init_timeout=30,
                ),
            )
            self.mode = mode
            if mode == "online":
                log.info("W&B: %s", self.run.url)

    @contextlib.contextmanager
    def _forgiving(self, doing: str) -> Iterator[None]:
        """Turn what wandb raises into a warning: the run's own files hold everything."""
        import wandb

        try:
            yield
        except (wandb.errors.Error, OSError, ValueError, TypeError, RuntimeError) as error:
            log.warning("%s: %s (result.json is complete without it)", doing, error)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        # Offline, tables and artifacts are uploaded from here later: keep them with the run.
        if "WANDB_DATA_DIR" in os.environ:
            yield
            return
        os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb" / "staging")
        try:
            yield
        finally:
            os.environ.pop("WANDB_DATA_DIR", None)

    def _set_environment(self, name: str, value: str) -> None:
        self._environment[name] = os.environ.get(name)
        os.environ[name] = value

    def _restore_environment(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()


def _summary_name(metric: str, split: str, language: str, condition: str) -> str:
    return f"{metric}/{language}/{condition}" + ("" if split == "test" else f"/{split}")


def _environment_mode() -> str:
    mode = os.environ.get("WANDB_MODE", "")
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(mode, "online")


def _is_first_rank() -> bool:
    """Whether this process is the one of a distributed training that logs."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return True


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{key}/")
        else:
            flat[f"{above}{key}".replace(".", "/")] = value
    return flat


def _stage_logger(tracker: Tracker, stage: str) -> Any:
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_only

    class StageLogger(Logger):
        """Passes a trainer's metrics to the job's W&B run, under the stage's name."""

        @property
        def name(self) -> str:
            return stage

        @property
        def version(self) -> str:
            return ""

        @property
        def experiment(self) -> Any:
            return tracker.run

        @rank_zero_only
        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Nothing: the config is the job's."""

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            tracker.log_curve(stage, metrics, step or 0)

    with tracker._forgiving("defining curves"):
        tracker.run.define_metric(f"{stage}/step", hidden=True)
        tracker.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return StageLogger()
