"""What a person sees of a sweep: the plan of a dry run, a line as each job ends, the summary."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deftx.cache import Stage, StageCache
from deftx.stages.graph import History
from deftx.stages.node import Node
from deftx.sweeps.plan import JobPlan, SharedPart
from deftx.tracking import SweepJob, print_sweep
from deftx.units import size_text, time_text

_LISTED = 24


def swept(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Of each job, the overrides that not all of them have."""
    every = [set(job) for job in overrides]
    common = set.intersection(*every) if len(every) > 1 else set[str]()
    # Hydra escapes what its grammar would read otherwise: rank=energy\:0.9.
    return [[text.replace("\\", "") for text in job if text not in common] for job in overrides]


def cost_of(plans: Mapping[int, JobPlan], cache_root: str) -> str:
    """Return how many stages some jobs would compute, and about how long that takes."""
    missing = {item.key: item for plan in plans.values() for item in plan.missing}
    seconds, _, unknown = History(StageCache(cache_root)).totals(list(missing.values()))
    guess = f", about {time_text(seconds)}" if unknown < len(missing) else ""
    return f"{len(missing)} stages{guess}" + (f" and {unknown} of unknown length" if guess and unknown else "")


def print_plan(
    plans: Mapping[int, JobPlan],
    waves: Sequence[Sequence[SharedPart]],
    cache_root: str,
    remarks: Sequence[str] = (),
) -> None:
    """Print what would run: stages by kind, what is missing, the waves, guesses at time and disk.

    Args:
        plans: Of every job.
        waves: From :func:`~deftx.sweeps.plan.shared_parts`, of the jobs that are not finished.
        cache_root: The stage cache.
        remarks: Lines before the last ones.
    """
    from rich.console import Console
    from rich.table import Column, Table

    history = History(StageCache(cache_root))
    nodes: dict[str, tuple[Node, bool]] = {}
    for plan in plans.values():
        for item, is_cached in plan.nodes:
            nodes.setdefault(item.key, (item, is_cached))
    kinds = list(dict.fromkeys(item.stage.kind for item, _ in nodes.values()))
    missing = [item for item, is_cached in nodes.values() if not is_cached]
    table = Table("stage", *(Column(title, justify="right") for title in ("to compute", "cached", "about", "disk")))
    for kind in [*kinds, None]:
        of_kind = [item for item in missing if kind in (None, item.stage.kind)]
        cached = sum(is_cached and kind in (None, item.stage.kind) for item, is_cached in nodes.values())
        seconds, size, unknown = history.totals(of_kind)
        if kind is None:
            table.add_section()
        guess = time_text(seconds) if unknown < len(of_kind) else "?" if of_kind else "–"
        guess += f" + {unknown} × ?" if 0 < unknown < len(of_kind) else ""
        table.add_row(kind or "all", str(len(of_kind)), str(cached), guess, size_text(size))
    Console().print(table)
    seeds: dict[tuple[str, str], set[int | None]] = {}
    for item in missing:
        seeds.setdefault((item.stage.kind, item.stage.label), set()).add(item.stage.seed)
    names = list(dict.fromkeys(_named(item.stage, seeds) for item in missing))
    lines = [f"to compute: {name}" for name in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"... and {len(names) - _LISTED} more")
    done = [number for number, plan in plans.items() if plan.finished is not None]
    if len(plans) > 1:
        lines.append(f"jobs: {len(plans)}, of which {len(done)} were finished before")
        for number, wave in enumerate(waves, 1):
            labels = ", ".join(dict.fromkeys(part.label for part in wave))
            lines.append(f"wave {number}: {labels}, shared by up to {max(len(part.jobs) for part in wave)} jobs")
    elif done:
        lines.append("this very run was finished before")
    unknown = history.totals(missing)[2]
    if unknown:
        lines.append(f"?: {unknown} stages of kinds and budgets that never ran with this cache: no time to go by")
    lines += remarks
    free = next(shutil.disk_usage(p).free for p in (Path(cache_root), *Path(cache_root).parents) if p.exists())
    lines.append(f"stage cache {cache_root}: {size_text(free)} free; times are one job's after the other")
    lines.append("dry run: nothing was computed and nothing written")
    _print_lines(lines)


def _named(stage: Stage, seeds: Mapping[tuple[str, str], set[int | None]]) -> str:
    """Return a stage for people; with its seed where that tells it from another of the same name."""
    name = f"{stage.kind} {stage.label}"
    return f"{name}, seed {stage.seed}" if len(seeds[stage.kind, stage.label]) > 1 else name


def job_line(position: int, total: int, job: SweepJob) -> str:
    """Return one line about a job that ended."""
    text = f"[{position}/{total}] {' '.join(job.swept) or 'job ' + str(job.number)}: {job.status}"
    if job.error:
        return f"{text}: {job.error.splitlines()[0]}"
    return text + (f" in {time_text(job.seconds)}" if job.seconds else "")


def print_summary(
    jobs: Sequence[SweepJob], scores: Mapping[int, Mapping[str, float]], folder: str, *, shared_source: bool = False
) -> None:
    """Print the jobs side by side, how many ended how, and where it all lies."""
    count = {
        status: sum(job.status == status for job in jobs) for status in ("done", "cached", "failed", "interrupted")
    }
    unfinished = len(jobs) - sum(count.values())
    parts = [f"{count['done']} done", f"{count['cached']} finished before", f"{count['failed']} failed"]
    if count["interrupted"]:
        parts.append(f"{count['interrupted']} interrupted")
    if unfinished:
        parts.append(f"{unfinished} not run")
    rows = [(" ".join(job.swept) or "-", scores.get(job.number, {}), job.error) for job in jobs]
    print_sweep(rows, title=f"sweep: {len(jobs)} jobs, {', '.join(parts)}", shared_source=shared_source)
    ended = [job for job in jobs if job.status in ("failed", "interrupted")]
    lines = [f"{job.status}: {' '.join(job.swept) or job.number}: {job.error}" for job in ended]
    again = "the same command again runs what is missing; " if ended or unfinished else ""
    lines.append(f"{again}deftx report {folder}")
    _print_lines(lines)


def _print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are: nothing in them is wrapped, coloured or read as markup."""
    from rich.console import Console

    for line in lines:
        Console().print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
