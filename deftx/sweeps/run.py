"""Runs a sweep: what was finished before, the waves of shared stages, the other jobs, the summary."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from deftx import atomic
from deftx.cache import Entry, StageCache
from deftx.errors import DeftxError
from deftx.jobs import End, Task, work
from deftx.launch import LauncherSettings, Lost, run_all
from deftx.search import OBJECTIVES, SearchSettings, knob_and_value
from deftx.signals import terminated_as_interrupted
from deftx.stages.settings import StudySettings
from deftx.sweeps.plan import JobPlan, SharedPart, plan_jobs, shared_parts
from deftx.sweeps.search import search
from deftx.sweeps.show import job_line, print_plan, print_summary, swept
from deftx.tracking import RESULT, SWEEP, SweepJob, SweepRecord, mean_scores, read_result, write_sweep

log = logging.getLogger(__name__)


@dataclass
class Sweep:
    """Jobs to run and where.

    Attributes:
        command: The subcommand.
        overrides: Of each job.
        folder: The sweep's folder; new.
        launcher: Where jobs run.
        config_dir: The user's own configuration folder.
        studies: Settings of each job of ``deftx run``; empty for other commands, which are neither planned nor shared.
        devices: Kind of device that each job trains on (:meth:`LauncherSettings.device`).
    """

    command: str
    overrides: Sequence[Sequence[str]]
    folder: Path
    launcher: LauncherSettings
    config_dir: str | None = None
    studies: Sequence[StudySettings] = ()
    devices: Sequence[str] = ()
    scores: dict[int, Mapping[str, float]] = field(default_factory=dict)
    _plans: dict[int, JobPlan] = field(default_factory=dict)

    @property
    def cache_root(self) -> str:
        """The stage cache all jobs share."""
        return self.studies[0].cache_root

    def task(self, overrides: Sequence[str], folder: Path, headline: str = "", job: int = 0) -> Task:
        """A job as it travels, on the kind of device that job number ``job`` was planned for."""
        config_dir = None if self.config_dir is None else str(Path(self.config_dir).absolute())
        logged = self.launcher.name != "basic"
        return Task(self.command, tuple(overrides), str(folder), config_dir, headline, self.devices[job], logged)


def dry_run(sweep: Sweep) -> None:
    """Print what a sweep, or a single run, would compute; nothing is written."""
    plans = plan_jobs(sweep.studies)
    open_plans = {number: plan for number, plan in plans.items() if plan.finished is None}
    waves = shared_parts(open_plans) if len(plans) > 1 else []
    print_plan(plans, waves, sweep.cache_root)


def run_sweep(sweep: Sweep) -> int:
    """Run what is missing of a sweep.

    Returns:
        The exit status: 0, or 1 where a job failed.

    Raises:
        DeftxError: The sweep's folder is not new or cannot be written, or the launcher does not work here.
        KeyboardInterrupt: Interrupted; the summary of what was finished has been printed.
    """
    _make(sweep.folder)
    jobs = [
        _job(number, texts, differing, str(number))
        for number, (texts, differing) in enumerate(zip(sweep.overrides, swept(sweep.overrides), strict=True))
    ]
    study = sweep.studies[0].name if sweep.studies else sweep.command
    record = SweepRecord(study, sweep.command, jobs, shared=_shared(jobs))
    write_sweep(sweep.folder, record)
    try:
        with _ending_in_order(sweep.launcher):
            if sweep.studies:
                sweep._plans = plan_jobs(sweep.studies)
                _restore(sweep, record)
                _run_waves(sweep, record)
            _run_jobs(sweep, record)
    finally:
        _close(sweep, record)
    return 1 if any(job.status == "failed" for job in record.jobs) else 0


def run_search(sweep: Sweep, settings: SearchSettings) -> int:
    """Search over knobs, then run what was best.

    Args:
        sweep: Of one job: what every trial has in common.
        settings: What is searched for.

    Returns:
        The exit status of the best trial's run.

    Raises:
        DeftxError: As :func:`run_sweep`; or every trial failed.
    """
    _make(sweep.folder)
    study, common = sweep.studies[0], list(sweep.overrides[0])
    # Nothing of a trial is evaluated on a target: it makes the SFTs it is judged by, and no more.
    judged = ["sft:task"]
    if OBJECTIVES[settings.objective][0] == "language":
        judged = [f"sft:language:{code}" for code in study.targets]
    record = SweepRecord(study.name, sweep.command, [])
    write_sweep(sweep.folder, record)

    def run(proposals: Sequence[Sequence[str]]) -> list[End | Lost]:
        first = len(record.stages)
        trials = [
            _job(first + n, [*common, *texts, f"only=[{','.join(judged)}]"], texts, f"trials/{first + n}")
            for n, texts in enumerate(proposals)
        ]
        record.stages += trials
        ends: dict[int, End | Lost] = {}
        with _states(sweep, record, trials, quiet=True) as (began, ended):

            def keep(number: int, end: End | Lost) -> None:
                ends[number] = end
                ended(number, end)

            tasks = [sweep.task(trial.overrides, sweep.folder / trial.folder) for trial in trials]
            run_all(sweep.launcher, work, tasks, keep, sweep.folder, began)
        return [ends[number] for number in range(len(trials))]

    at_once = 1 if sweep.launcher.name == "basic" else sweep.launcher.workers or 1
    try:
        with _ending_in_order(sweep.launcher):
            best = search(settings, sweep.folder, run, at_once=at_once)
            record.jobs.append(_job(0, [*common, *best], best, "best"))
            record.shared = _shared(record.jobs)
            _run_jobs(sweep, record)
    finally:
        _close(sweep, record)
    return 1 if any(job.status == "failed" for job in record.jobs) else 0


def _job(number: int, overrides: Sequence[str], differing: Sequence[str], folder: str) -> SweepJob:
    """A job that waits; what it changes stands in it as fields, too."""
    return SweepJob(number, list(overrides), list(differing), folder, dict(map(knob_and_value, differing)))


def _shared(jobs: Sequence[SweepJob]) -> list[str]:
    """Overrides that all jobs have and none of them changes."""
    changed = {knob for job in jobs for knob in job.knobs}
    every = [text for text in jobs[0].overrides if all(text in job.overrides for job in jobs)]
    return [text for text in every if knob_and_value(text)[0] not in changed]


def _ending_in_order(launcher: LauncherSettings) -> contextlib.AbstractContextManager[None]:
    """SIGTERM ends a sweep in order: workers stopped, summary printed.

    Not where jobs run in this process: a phase answers SIGTERM itself, by keeping its state before it stops.
    """
    return contextlib.nullcontext() if launcher.name == "basic" else terminated_as_interrupted()


def _note(sweep: Sweep, record: SweepRecord) -> None:
    """Bring ``sweep.json`` up to date; a disk that is full by now must not stop the jobs."""
    try:
        write_sweep(sweep.folder, record)
    except DeftxError as error:
        log.warning("%s", error)


def _close(sweep: Sweep, record: SweepRecord) -> None:
    """The last word of ``sweep.json``, also after an interruption, and the summary."""
    record.finished = datetime.now(UTC).isoformat(timespec="seconds")
    for job in [*record.jobs, *record.stages]:
        job.status = "waiting" if job.status == "running" else job.status
    _note(sweep, record)
    print_summary(record.jobs, sweep.scores, _shown(sweep.folder))


def _make(folder: Path) -> None:
    """Make the sweep's folder, which must not hold anything: no two sweeps share one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = next(folder.iterdir(), None)
        if used is None:
            (folder / SWEEP).touch(exist_ok=False)  # of two that begin at once, one
    except FileExistsError:
        used = folder / SWEEP
    except OSError as error:
        raise DeftxError(
            f"the sweep's folder cannot be made: {folder}: {error.strerror}; choose another hydra.sweep.dir=FOLDER"
        ) from error
    if used is not None:
        raise DeftxError(f"hydra.sweep.dir={folder} exists and is not empty; give a new folder, or none")


def _restore(sweep: Sweep, record: SweepRecord) -> None:
    """Copy the results of jobs that were finished before."""
    caches = {study.cache_root: StageCache(study.cache_root) for study in sweep.studies}
    for job in record.jobs:
        plan = sweep._plans[job.number]
        # Read once more, checksums and all: what is copied is published again.
        entry = caches[sweep.studies[job.number].cache_root].find(plan.graph.finished) if plan.finished else None
        scores = None if entry is None else _scores_of(entry)
        if entry is None or scores is None:
            continue
        place = sweep.folder / job.folder
        try:
            with atomic.folder(place) as temporary:
                for name in entry.manifest["files"]:
                    shutil.copyfile(entry.file(name), temporary / name)
        except OSError as error:
            raise DeftxError(f"cannot write {place}: {error.strerror}; free space and run the command again") from error
        job.status = "cached"
        sweep.scores[job.number] = scores
    write_sweep(sweep.folder, record)


def _scores_of(entry: Entry) -> dict[str, float] | None:
    """Mean scores of a finished run; None where this deftx cannot read it, and the job simply runs again."""
    try:
        return mean_scores(read_result(entry.file(RESULT)))
    except DeftxError as error:
        log.warning("a finished run is not taken from the cache: %s", error)
        return None


def _run_waves(sweep: Sweep, record: SweepRecord) -> None:
    """Make what several jobs share; a job whose part failed fails with its reason."""
    waiting = {job.number: sweep._plans[job.number] for job in record.jobs if job.status == "waiting"}
    waves = shared_parts(waiting) if len(waiting) > 1 else []
    for number, wave in enumerate(waves, 1):
        # What only jobs need that have failed by now would be trained for nobody, and fail the same way.
        alive = {job.number for job in record.jobs if job.status == "waiting"}
        parts = [part for part in wave if part.jobs & alive]
        for part in parts:
            part.job = part.job if part.job in alive else min(part.jobs & alive)
        stages = [
            SweepJob(
                len(record.stages) + place,
                [*sweep.overrides[part.job], f"only=[{part.name}]"],
                [part.name, part.label],
                f"stages/{len(record.stages) + place}",
            )
            for place, part in enumerate(parts)
        ]
        record.stages += stages
        print(f"wave {number} of {len(waves)}: {len(parts)} shared parts", flush=True)
        with _states(sweep, record, stages) as (began, ended):
            run_all(
                sweep.launcher,
                work,
                [
                    sweep.task(stage.overrides, sweep.folder / stage.folder, f"shared: {part.label}", part.job)
                    for part, stage in zip(parts, stages, strict=True)
                ],
                ended,
                sweep.folder,
                began,
            )
        for part, stage in zip(parts, stages, strict=True):
            if stage.status == "failed":
                _give_up(record, part, stage.error or "unknown")


def _give_up(record: SweepRecord, part: SharedPart, reason: str) -> None:
    """A part that failed: whatever needs it would train it again and fail the same way."""
    for job in record.jobs:
        if job.status == "waiting" and job.number in part.jobs:
            job.status, job.error = "failed", f"{part.label}, which it shares with other jobs: {reason}"


def _run_jobs(sweep: Sweep, record: SweepRecord) -> None:
    jobs = [job for job in record.jobs if job.status == "waiting"]
    total = len(record.jobs)
    tasks = [
        sweep.task(
            job.overrides,
            sweep.folder / job.folder,
            f"job {job.number + 1} of {total}: {' '.join(job.swept)}",
            job.number,
        )
        for job in jobs
    ]
    with _states(sweep, record, jobs) as (began, ended):
        run_all(sweep.launcher, work, tasks, ended, sweep.folder, began)


@contextlib.contextmanager
def _states(
    sweep: Sweep, record: SweepRecord, jobs: Sequence[SweepJob], *, quiet: bool = False
) -> Iterator[tuple[Callable[[int], None], Callable[[int, End | Lost], None]]]:
    """What to call as a job begins and ends: ``sweep.json`` then says so."""
    write_sweep(sweep.folder, record)
    count = 0

    def began(number: int) -> None:
        jobs[number].status = "running"
        _note(sweep, record)

    def ended(number: int, end: End | Lost) -> None:
        nonlocal count
        count += 1
        job = jobs[number]
        if isinstance(end, Lost):
            job.status, job.error = "failed", str(end)
        else:
            job.status, job.error, job.seconds = ("failed" if end.error else "done"), end.error, end.seconds
            if job in record.jobs:
                sweep.scores[job.number] = end.scores
        _note(sweep, record)
        if not quiet:
            print(job_line(count, len(jobs), job), flush=True)

    yield began, ended


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
