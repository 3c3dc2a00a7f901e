"""What a report says of its runs in words: how many, which failed and why, what they remark themselves."""

from __future__ import annotations

import math
import shlex

from deftx.report.collect import Collection, Trouble
from deftx.tracking import Remark


def counts(found: Collection) -> list[str]:
    """How many results there are, and what was left out of the tables."""
    lines = [f"{len(found.runs)} runs with scores"]
    if found.without_scores:
        lines[0] += f", {len(found.without_scores)} without (stages, SFTs)"
    if found.repeated:
        lines.append(
            f"{len(found.repeated)} results repeat others (same settings, seed and predictions) and count once: "
            + ", ".join(f"{again.name} = {first.name}" for again, first in found.repeated[:4])
            + (" ..." if len(found.repeated) > 4 else "")
        )
    return lines


def trouble_text(item: Trouble) -> str:
    """One line on a job without a usable result."""
    later = f"; finished in another launch: {item.finished_in}" if item.finished_in else ""
    return f"{item.kind}: {item.name}: {item.reason}{later}"


def run_notes(found: Collection) -> dict[str, str]:
    """What the runs themselves remark -> which of them do."""
    notes: dict[str, list[str]] = {}
    for run in found.runs:
        for remark in run.record.notes:
            if remark.kind != "provenances_differ":  # their section's warning says it
                notes.setdefault(_shown(remark), []).append(run.name)
    every = len(found.runs)
    return {
        note: "every run" if len(names) == every else names[0] if len(names) == 1 else f"{len(names)} of {every} runs"
        for note, names in notes.items()
    }


def _shown(remark: Remark) -> str:
    """A remark; without the cells that it lists, which differ from run to run: their scores are in the tables."""
    return f"in some cells {remark.text}" if remark.kind == "constant_predictions" else remark.line


def rerun_commands(found: Collection) -> list[tuple[str, str]]:
    """Name of each sweep, and the command that runs it again: one for a full grid, else one for each job."""
    commands = []
    for name, sweep in found.sweeps:
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
