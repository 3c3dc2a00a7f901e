"""Runs a sweep: what was finished before, the waves of shared stages, the other jobs, the summary."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from deftx import atomic
from deftx.cache import Entry, StageCache
from deftx.errors import DeftxError
from deftx.jobs import JobEnd, Task, work
from deftx.launch import LauncherSettings, TaskFailure, TaskStop, run_all
from deftx.search import OBJECTIVES, SearchSettings, knob_and_value
from deftx.signals import terminated_as_interrupted
from deftx.stages.settings import StudySettings
from deftx.sweeps.plan import JobPlan, plan_jobs, shared_parts
from deftx.sweeps.search import search
from deftx.sweeps.show import cost_of, job_line, print_plan, print_summary, swept
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
        scores: Mean scores of the jobs that ended well, by number.
    """

    command: str
    overrides: Sequence[Sequence[str]]
    folder: Path
    launcher: LauncherSettings
    config_dir: str | None = None
    studies: Sequence[StudySettings] = ()
    devices: Sequence[str] = ()
    scores: dict[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def cache_root(self) -> str:
        """The stage cache all jobs share."""
        return self.studies[0].cache_root

    def task(self, job: SweepJob, headline: str, number: int) -> Task:
        """Return a job as it travels, on the kind of device that job ``number`` of the command was planned for."""
        return Task(
            self.command,
            tuple(job.overrides),
            str(self.folder / job.folder),
            None if self.config_dir is None else str(Path(self.config_dir).absolute()),
            headline,
            self.devices[number],
            logged=self.launcher.name != "basic",
        )


def dry_run(sweep: Sweep) -> None:
    """Print what a sweep, or a single run, would compute; nothing is written."""
    plans = plan_jobs(sweep.studies)
    open_plans = {number: plan for number, plan in plans.items() if plan.finished is None}
    waves = shared_parts(open_plans) if len(plans) > 1 else []
    print_plan(plans, waves, sweep.cache_root, _source_costs(sweep, plans))


def _source_costs(sweep: Sweep, plans: Mapping[int, JobPlan]) -> list[str]:
    """Return what a φ_S of each column costs beside one that all share."""
    studies = [study for study in sweep.studies if study.source_sft is not None]
    if len(studies) < len(sweep.studies) or any(study.only for study in studies):
        return []
    shared = studies[0].source_shared
    first = studies[0].source_sft
    others = []
    for study in studies:
        if first is None or study.source_sft is None or study.source_shared != shared:
            return []
        own = replace(study.language_sft, training=study.source_sft.training)
        source_sft = own if shared else first.by(studies[0].methods[0])
        others.append(replace(study, source_shared=not shared, source_sft=source_sft))
    costs = {shared: cost_of(plans, sweep.cache_root), not shared: cost_of(plan_jobs(others), sweep.cache_root)}
    if costs[True] == costs[False]:
        return []
    return [
        f"source=sft, a φ_S of each column: {costs[False]}; source=shared, one φ_S under all columns: {costs[True]}; "
        f"this is source={'shared' if shared else 'sft'}"
    ]


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
    with _recorded(sweep, record):
        if sweep.studies:
            plans = plan_jobs(sweep.studies)
            _restore(sweep, record, plans)
            _run_waves(sweep, record, plans)
        _run_jobs(sweep, record)
    return _status(record)


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

    def run(proposals: Sequence[Sequence[str]]) -> list[JobEnd | TaskFailure]:
        trials = [
            _job(number, [*common, *texts, f"only=[{','.join(judged)}]"], texts, f"trials/{number}")
            for number, texts in enumerate(proposals, len(record.stages))
        ]
        record.stages += trials
        return _launch(sweep, record, trials, [sweep.task(trial, "", 0) for trial in trials], quiet=True)

    at_once = 1 if sweep.launcher.name == "basic" else sweep.launcher.workers or 1
    with _recorded(sweep, record):
        best = search(settings, sweep.folder, run, at_once=at_once)
        record.jobs.append(_job(0, [*common, *best], best, "best"))
        record.shared = _shared(record.jobs)
        _run_jobs(sweep, record)
    return _status(record)


def _status(record: SweepRecord) -> int:
    return 1 if any(job.status in ("failed", "interrupted") for job in record.jobs) else 0


def _job(number: int, overrides: Sequence[str], differing: Sequence[str], folder: str) -> SweepJob:
    """Return a job that waits; what it changes stands in it as fields, too."""
    return SweepJob(number, list(overrides), list(differing), folder, dict(map(knob_and_value, differing)))


def _shared(jobs: Sequence[SweepJob]) -> list[str]:
    """Overrides that all jobs have and none of them changes."""
    changed = {knob for job in jobs for knob in job.knobs}
    every = [text for text in jobs[0].overrides if all(text in job.overrides for job in jobs)]
    return [text for text in every if knob_and_value(text)[0] not in changed]


@contextlib.contextmanager
def _recorded(sweep: Sweep, record: SweepRecord) -> Iterator[None]:
    """Write ``sweep.json`` first and last, and print the summary, also after an interruption."""
    write_sweep(sweep.folder, record)
    # SIGTERM stops the workers, too. Where jobs run in this process, a phase itself keeps its state before it stops.
    in_this_process = sweep.launcher.name == "basic"
    try:
        with contextlib.nullcontext() if in_this_process else terminated_as_interrupted():
            yield
    finally:
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        for job in [*record.jobs, *record.stages]:
            job.status = "waiting" if job.status == "running" else job.status
        _note(sweep, record)
        shared = bool(sweep.studies) and all(study.source_shared for study in sweep.studies)
        print_summary(record.jobs, sweep.scores, _shown(sweep.folder), shared_source=shared)


def _note(sweep: Sweep, record: SweepRecord) -> None:
    """Bring ``sweep.json`` up to date; a disk that is full by now must not stop the jobs."""
    try:
        write_sweep(sweep.folder, record)
    except DeftxError as error:
        log.warning("%s", error)


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


def _restore(sweep: Sweep, record: SweepRecord, plans: Mapping[int, JobPlan]) -> None:
    """Copy the results of jobs that were finished before."""
    caches = {study.cache_root: StageCache(study.cache_root) for study in sweep.studies}
    for job in record.jobs:
        plan = plans[job.number]
        # Read once more, checksums and all: what is copied is published again.
        entry = caches[sweep.studies[job.number].cache_root].find(plan.graph.finished) if plan.finished else None
        scores = None if entry is None else _scores_of(entry)
        if entry is None or scores is None:
            continue
        folder = sweep.folder / job.folder
        try:
            with atomic.folder(folder) as temporary:
                for name in entry.manifest["files"]:
                    shutil.copyfile(entry.file(name), temporary / name)
        except OSError as error:
            raise DeftxError(
                f"cannot write {folder}: {error.strerror}; free space and run the command again"
            ) from error
        job.status = "cached"
        sweep.scores[job.number] = scores
    write_sweep(sweep.folder, record)


def _scores_of(entry: Entry) -> dict[str, float] | None:
    """Return mean scores of a finished run; None where this deftx cannot read it, and the job simply runs again."""
    try:
        return mean_scores(read_result(entry.file(RESULT)))
    except DeftxError as error:
        log.warning("a finished run is not taken from the cache: %s", error)
        return None


def _run_waves(sweep: Sweep, record: SweepRecord, plans: Mapping[int, JobPlan]) -> None:
    """Make what several jobs share; a job whose part failed fails with its reason."""
    waiting = {job.number: plans[job.number] for job in record.jobs if job.status == "waiting"}
    waves = shared_parts(waiting) if len(waiting) > 1 else []
    for number, wave in enumerate(waves, 1):
        # What only jobs need that have failed by now would be trained for nobody, and fail the same way.
        alive = {job.number for job in record.jobs if job.status == "waiting"}
        parts = [part for part in wave if part.jobs & alive]
        for part in parts:
            part.job = part.job if part.job in alive else min(part.jobs & alive)
        stages = [
            SweepJob(
                index,
                [*sweep.overrides[part.job], f"only=[{part.name}]"],
                [part.name, part.label],
                f"stages/{index}",
            )
            for index, part in enumerate(parts, len(record.stages))
        ]
        record.stages += stages
        print(f"wave {number} of {len(waves)}: {len(parts)} shared parts", flush=True)
        tasks = [
            sweep.task(stage, f"shared: {part.label}", part.job) for part, stage in zip(parts, stages, strict=True)
        ]
        _launch(sweep, record, stages, tasks)
        for part, stage in zip(parts, stages, strict=True):
            # What needs a part that failed would train it again and fail the same way.
            for job in record.jobs if stage.status in ("failed", "interrupted") else ():
                if job.status == "waiting" and job.number in part.jobs:
                    job.status = stage.status
                    job.error = f"{part.label}, which it shares with other jobs: {stage.error or 'unknown'}"


def _run_jobs(sweep: Sweep, record: SweepRecord) -> None:
    jobs = [job for job in record.jobs if job.status == "waiting"]
    total = len(record.jobs)
    tasks = [sweep.task(job, f"job {job.number + 1} of {total}: {' '.join(job.swept)}", job.number) for job in jobs]
    _launch(sweep, record, jobs, tasks)


def _launch(
    sweep: Sweep, record: SweepRecord, jobs: Sequence[SweepJob], tasks: Sequence[Task], *, quiet: bool = False
) -> list[JobEnd | TaskFailure]:
    """Run jobs where the launcher puts them; ``sweep.json`` says so as each begins and ends.

    Returns:
        How each job ended, in their order.
    """
    write_sweep(sweep.folder, record)
    ends: dict[int, JobEnd | TaskFailure] = {}

    def began(number: int) -> None:
        jobs[number].status = "running"
        _note(sweep, record)

    def ended(number: int, end: JobEnd | TaskFailure) -> None:
        ends[number] = end
        job = jobs[number]
        if isinstance(end, TaskFailure):
            job.status, job.error = ("interrupted" if isinstance(end, TaskStop) else "failed"), str(end)
        else:
            job.status, job.error, job.seconds = ("failed" if end.error else "done"), end.error, end.seconds
            if job in record.jobs:
                sweep.scores[job.number] = end.scores
        _note(sweep, record)
        if not quiet:
            print(job_line(len(ends), len(jobs), job), flush=True)

    run_all(sweep.launcher, work, tasks, ended, sweep.folder, began)
    return [ends[number] for number in range(len(jobs))]


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
