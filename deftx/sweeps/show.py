"""What a person sees of a sweep: the plan of a dry run, a line as each job ends, the summary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from deftx.cache import Stage
from deftx.stages.plan import History, PlannedStage, StudyPlan, totals
from deftx.sweeps.waves import Part
from deftx.tracking import SweepJob, print_sweep

_LISTED = 24


def swept(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Of each job, the overrides that not all of them have."""
    every = [set(job) for job in overrides]
    common = set.intersection(*every) if len(every) > 1 else set[str]()
    # Hydra escapes what its grammar would read otherwise: rank=energy\:0.9.
    return [[text.replace("\\", "") for text in job if text not in common] for job in overrides]


def print_plan(plans: Mapping[int, StudyPlan], waves: Sequence[Sequence[Part]], cache_root: str) -> None:
    """Print what would run: stages by kind, what is missing, the waves, guesses at time and disk.

    Args:
        plans: Of every job.
        waves: From :func:`~deftx.sweeps.waves.shared_parts`, of the jobs that are not finished.
        cache_root: The stage cache.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, history = Console(), History(cache_root)
    stages: dict[str, PlannedStage] = {}
    for plan in plans.values():
        for item in plan.stages:
            stages.setdefault(item.stage.key, item)
    kinds = list(dict.fromkeys(item.stage.kind for item in stages.values()))
    table = Table()
    for title in ("stage", "to compute", "cached", "about", "disk"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for kind in [*kinds, None]:
        mine = [item for item in stages.values() if kind in (None, item.stage.kind)]
        missing = [item for item in mine if not item.cached]
        seconds, size, unknown = totals(missing, history)
        if kind is None:
            table.add_section()
        guess = duration(seconds) if unknown < len(missing) else "?" if missing else "–"
        told = guess + (f" + {unknown} × ?" if 0 < unknown < len(missing) else "")
        table.add_row(kind or "all", str(len(missing)), str(len(mine) - len(missing)), told, disk(size))
    console.print(table)
    wanted = [item.stage for item in stages.values() if not item.cached]
    names = list(dict.fromkeys(f"{stage.kind} {stage.label}{_seed(stage, wanted)}" for stage in wanted))
    lines = [f"to compute: {name}" for name in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"... and {len(names) - _LISTED} more")
    done = [number for number, plan in plans.items() if plan.done is not None]
    if len(plans) > 1:
        lines.append(f"jobs: {len(plans)}, of which {len(done)} were finished before")
        for number, wave in enumerate(waves, 1):
            labels = ", ".join(dict.fromkeys(part.label for part in wave))
            lines.append(f"wave {number}: {labels}, shared by up to {max(len(part.jobs) for part in wave)} jobs")
    elif done:
        lines.append("this very run was finished before")
    unknown = totals([item for item in stages.values() if not item.cached], history)[2]
    if unknown:
        lines.append(f"?: {unknown} stages of kinds and budgets that never ran with this cache: no time to go by")
    free = next(shutil.disk_usage(p).free for p in (Path(cache_root), *Path(cache_root).parents) if p.exists())
    lines.append(f"stage cache {cache_root}: {disk(free)} free; times are one job's after the other")
    lines.append("dry run: nothing was computed and nothing written")
    for line in lines:
        console.print(Text(line), soft_wrap=True, highlight=False)


def _seed(stage: Stage, stages: Sequence[Stage]) -> str:
    """The seed of a stage, where it tells it from another of the same name."""
    alike = {item.seed for item in stages if (item.kind, item.label) == (stage.kind, stage.label)}
    return f", seed {stage.seed}" if len(alike) > 1 else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def disk(size: float) -> str:
    """Bytes as people say them: ``12 MB``, ``1.1 GB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def job_line(position: int, total: int, job: SweepJob) -> str:
    """One line about a job that ended."""
    text = f"[{position}/{total}] {' '.join(job.swept) or 'job ' + str(job.number)}: {job.status}"
    if job.error:
        return f"{text}: {job.error.splitlines()[0]}"
    return text + (f" in {duration(job.seconds)}" if job.seconds else "")


def print_summary(jobs: Sequence[SweepJob], scores: Mapping[int, Mapping[str, float]], folder: str) -> None:
    """The jobs side by side, how many ended how, and where it all lies."""
    from rich.console import Console
    from rich.text import Text

    count = {status: sum(job.status == status for job in jobs) for status in ("done", "cached", "failed")}
    unfinished = len(jobs) - sum(count.values())
    parts = [f"{count['done']} done", f"{count['cached']} finished before", f"{count['failed']} failed"]
    if unfinished:
        parts.append(f"{unfinished} not run")
    rows = [(" ".join(job.swept) or "-", scores.get(job.number, {}), job.error) for job in jobs]
    print_sweep(rows, title=f"sweep: {len(jobs)} jobs, {', '.join(parts)}")
    console = Console()
    lines = [f"failed: {' '.join(job.swept) or job.number}: {job.error}" for job in jobs if job.status == "failed"]
    again = "the same command again runs what is missing; " if count["failed"] or unfinished else ""
    lines.append(f"{again}deftx report {folder}")
    for line in lines:
        console.print(Text(line), soft_wrap=True, highlight=False)
