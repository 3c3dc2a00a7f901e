"""Words about the runs of a report: how many there are, which failed and why, and their own remarks."""

from __future__ import annotations

import math
import shlex

from deftx.report.collect import Collection, Trouble
from deftx.tracking import Remark


def counts(collection: Collection) -> list[str]:
    """Say how many results there are, and which the tables leave out or count once."""
    lines = [f"{len(collection.runs)} run{'s' * (len(collection.runs) != 1)} with scores"]
    if collection.without_scores:
        lines[0] += f", {len(collection.without_scores)} without (stages, SFTs)"
    if collection.repeated:
        lines.append(
            f"{len(collection.repeated)} results repeat others (same settings, seed and predictions) and count once: "
            + ", ".join(f"{again.name} = {first.name}" for again, first in collection.repeated[:4])
            + (" ..." if len(collection.repeated) > 4 else "")
        )
    return lines


def trouble_text(trouble: Trouble) -> str:
    """Return one line on a job without a usable result."""
    later = f"; finished in another launch: {trouble.finished_in}" if trouble.finished_in else ""
    return f"{trouble.kind}: {trouble.name}: {trouble.reason}{later}"


def run_notes(collection: Collection) -> dict[str, str]:
    """Return the remarks of the runs, each with the runs that make it."""
    notes: dict[str, list[str]] = {}
    for run in collection.runs:
        for remark in run.record.notes:
            if remark.kind != "provenances_differ":  # their section's warning says it
                notes.setdefault(_remark_text(remark), []).append(run.name)
    total = len(collection.runs)
    return {
        note: "every run" if len(names) == total else names[0] if len(names) == 1 else f"{len(names)} of {total} runs"
        for note, names in notes.items()
    }


def _remark_text(remark: Remark) -> str:
    """Return a remark without its list of cells, which differs from run to run."""
    return f"in some cells {remark.text}" if remark.kind == "constant_predictions" else remark.line


def rerun_commands(collection: Collection) -> list[tuple[str, str]]:
    """Return the name of each sweep and what runs it again: one command for a full grid, else one for each job."""
    commands = []
    for name, sweep in collection.sweeps:
        jobs = sweep.jobs
        if not jobs:
            continue
        swept: dict[str, dict[str, None]] = {}
        for job in jobs:
            for knob, value in job.knobs.items():
                swept.setdefault(knob, {})[value] = None
        if math.prod(len(values) for values in swept.values()) == len(jobs):
            grid = [f"{knob}={','.join(values)}" for knob, values in swept.items()]
            commands.append((name, _command(sweep.command, ["-m", *sweep.shared, *grid])))
        else:
            lines = [_command(sweep.command, job.overrides) for job in jobs]
            commands.append((name, "\n".join(dict.fromkeys(lines))))
    return list(dict.fromkeys(commands))


def _command(name: str, overrides: list[str]) -> str:
    return " ".join(["deftx", name, *map(shlex.quote, overrides)])
