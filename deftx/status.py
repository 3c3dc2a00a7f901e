"""``deftx status [DIR]``: what sweeps and runs have done, what runs now and what is left, from their files alone."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from deftx.errors import DeftxError
from deftx.heartbeat import FILE, Heartbeat, read_heartbeat
from deftx.processes import Process
from deftx.tracking import RESULT, SWEEP, RunRecord, SweepJob, SweepRecord, read_result, read_sweep
from deftx.units import time_text

HELP = """\
deftx status: what sweeps and runs have done, what runs now, and what is left

usage: deftx status [DIR...] [--all]

  DIR      folder of a sweep or a run, or of many of them; default: multirun/ and outputs/ here. Files alone are read,
           so it works from another terminal, and from another node that sees the folder
  --all    every sweep and run below DIR; default: those that are not over, or else the newest one
"""
DEFAULTS = ("multirun", "outputs")
PATIENCE = 300.0
"""Seconds without a word after which a job of another host counts as gone."""
_SAID = {
    "done": "done",
    "cached": "finished before",
    "running": "running",
    "waiting": "waiting",
    "failed": "failed",
    "interrupted": "interrupted",
}


def main(arguments: Sequence[str]) -> int:
    """Run ``deftx status``.

    Args:
        arguments: What follows ``status`` on the command line.

    Returns:
        The exit status.

    Raises:
        DeftxError: A mistake in the arguments, or nothing there.
    """
    if any(item in ("-h", "--help") for item in arguments):
        print(HELP, end="")
        return 0

    def refuse(text: str) -> NoReturn:
        raise DeftxError(f"deftx status: {text}; the only option is --all")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[assignment,method-assign]
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(list(arguments))
    folders = options.folders or [Path(name) for name in DEFAULTS if Path(name).is_dir()]
    for folder in folders:
        if not folder.is_dir():
            raise DeftxError(f"deftx status: {folder}: no such folder; give that of a sweep or a run")
    found = sorted({path for folder in folders for path in _records(folder)}, key=_changed)
    if not found:
        places = ", ".join(map(str, folders)) or "multirun/ and outputs/, which are not here"
        raise DeftxError(f"deftx status: no sweep and no run in {places}; `deftx run experiment=demo` makes one")
    shown: list[tuple[Path, SweepRecord | RunRecord]] = []
    for path in found:
        try:
            shown.append((path, read_sweep(path) if path.name == SWEEP else read_result(path)))
        except DeftxError as error:
            print(error)
    read = list(shown)
    if not options.all:
        shown = [(path, record) for path, record in read if not _over(record)] or read[-1:]
    for path, record in shown:
        if isinstance(record, SweepRecord):
            _print_sweep(path.parent, record)
        else:
            _print_run(path.parent, record)
    hidden = len(read) - len(shown)
    if hidden:
        print(f"{hidden} more that {'is' if hidden == 1 else 'are'} over: deftx status --all")
    return 0


def _changed(path: Path) -> float:
    """Return when a file changed last; a job that ends removes its own, and counts as long ago."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _records(folder: Path) -> Iterator[Path]:
    """Yield the files of sweeps, and of runs that belong to none."""
    sweeps = [path for path in folder.rglob(SWEEP) if path.stat().st_size]
    yield from sweeps
    of_sweeps = {path.parent for path in sweeps}
    for path in folder.rglob(RESULT):
        if not of_sweeps & set(path.parents) and not any((above / SWEEP).is_file() for above in path.parents):
            yield path


def _over(record: SweepRecord | RunRecord) -> bool:
    return record.finished is not None


def _print_sweep(folder: Path, record: SweepRecord) -> None:
    from rich.console import Console
    from rich.table import Table

    count = Counter(job.status for job in record.jobs)
    states = ", ".join(f"{count[name]} {said}" for name, said in _SAID.items() if count[name])
    times = [f"began {_ago(record.started)}"] + ([f"ended {_ago(record.finished)}"] if record.finished else [])
    print(f"{folder}: {record.study}, {len(record.jobs)} jobs: {states}; {', '.join(times)}")
    if record.stages:
        made = Counter(job.status for job in record.stages)
        print(f"  shared parts: {', '.join(f'{made[name]} {said}' for name, said in _SAID.items() if made[name])}")
    under_way = [job for job in [*record.stages, *record.jobs] if job.status == "running" and not record.finished]
    if under_way:
        table = Table("job", "doing", "step", "loss", "steps/s", "left", "heard of")
        for job in under_way:
            table.add_row(" ".join(job.swept) or str(job.number), *_cells(read_heartbeat(folder / job.folder)))
        Console(width=None if Console().is_terminal else 160).print(table)
    for job in record.jobs:
        if job.status in ("failed", "interrupted"):
            reason = (job.error or "no reason given").splitlines()[0]
            print(f"  {job.status}: {' '.join(job.swept) or job.number}: {reason}")
    if record.finished is None:
        for line in _outlook(folder, record, under_way):
            print(f"  {line}")


def _cells(beat: Heartbeat | None) -> list[str]:
    """Return the cells of a job that is under way."""
    if beat is None:
        return ["beginning", "", "", "", "", ""]
    left = "" if beat.seconds_left is None else f"{time_text(beat.seconds_left)} of this phase"
    return [
        beat.label,
        "" if beat.step is None else f"{beat.step}/{beat.steps}",
        "" if beat.loss is None else f"{beat.loss:.4f}",
        "" if not beat.rate else f"{beat.rate:.3g}",
        left,
        _heard(beat),
    ]


def _heard(beat: Heartbeat) -> str:
    return f"{time_text(time.time() - beat.when)} ago" + ("" if _lives(beat) else ": its process has gone")


def _lives(beat: Heartbeat) -> bool:
    process = Process.parse(beat.owner)
    return process is not None and (process.lives() if process.here else time.time() - beat.when <= PATIENCE)


def _outlook(folder: Path, record: SweepRecord, under_way: Sequence[SweepJob]) -> Iterator[str]:
    """Yield what is left, and whether anything still works on it."""
    left = [job for job in record.jobs if job.status in ("waiting", "running")]
    seconds = [job.seconds for job in record.jobs if job.status == "done" and job.seconds]
    if left and seconds:
        about = sum(seconds) / len(seconds) * len(left) / max(1, len(under_way))
        yield f"left: {len(left)} jobs, about {time_text(about)} at the mean of those that are done"
    elif left:
        yield f"left: {len(left)} jobs"
    beats = [beat for job in under_way if (beat := read_heartbeat(folder / job.folder)) is not None]
    quiet = time.time() - max(map(_changed, (folder / SWEEP, *folder.rglob(FILE))))
    if (beats and not any(map(_lives, beats))) or (not beats and quiet > PATIENCE):
        yield f"nothing has been heard of it for {time_text(quiet)}: if it was stopped, the same command again goes on"


def _print_run(folder: Path, record: RunRecord) -> None:
    beat = read_heartbeat(folder) if record.status == "running" else None
    facts = [record.status, f"began {_ago(record.started)}"]
    facts += [f"ended {_ago(record.finished)}"] if record.finished else []
    print(f"{folder}: {record.study}, {record.job_type}: {', '.join(facts)}")
    if record.error:
        print(f"  {str(record.error.get('message') or record.error.get('type')).splitlines()[0]}")
    if beat is not None:
        print(f"  {beat.line}; heard of {_heard(beat)}")
    if record.status == "interrupted" or (beat is not None and not _lives(beat)):
        print("  the same command again goes on")


def _ago(stamp: str | None) -> str:
    if not stamp:
        return "at an unknown time"
    return f"{time_text((datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds())} ago"
