"""sweep.json: what a sweep consists of and how far each of its jobs got; rewritten whenever one ends.

It lies beside the folders of the jobs, so that a report can name those that failed or are missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deftx.tracking.legacy import upgrade_sweep
from deftx.tracking.results import plain, read_record, write_file

__all__ = ["JOB_STATES", "SWEEP", "SweepJob", "SweepRecord", "read_sweep", "write_sweep"]

SWEEP = "sweep.json"
SCHEMA_VERSION = 2
OLDEST_READ = 1
JOB_STATES = ("waiting", "running", "done", "cached", "failed", "interrupted")
"""``cached``: an earlier launch had finished it, and its results were copied into this sweep's folder."""


@dataclass
class SweepJob:
    """One job of a sweep.

    Attributes:
        number: its place in the grid, from 0.
        overrides: the whole of what was asked for.
        swept: the part that differs between the jobs, such as ``rank=16``.
        folder: where its ``result.json`` is or will be, relative to the sweep's folder.
        knobs: the same as fields: knob -> value as it is written on the command line.
        status: one of :data:`JOB_STATES`.
        error: why it failed.
        seconds: wall time, once it ended.
    """

    number: int
    overrides: list[str]
    swept: list[str]
    folder: str
    knobs: Mapping[str, str] = field(default_factory=dict)
    status: str = "waiting"
    error: str | None = None
    seconds: float | None = None


@dataclass
class SweepRecord:
    """What ``sweep.json`` says.

    Attributes:
        study: name of the study.
        command: the subcommand, such as ``run``.
        jobs: one entry for each.
        stages: the shared stages that ran first, in the same form; ``swept`` names them.
        shared: overrides that all jobs have and none of them changes.
        started, finished: UTC, ISO 8601.
    """

    study: str
    command: str
    jobs: list[SweepJob]
    stages: list[SweepJob] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    finished: str | None = None


def write_sweep(folder: str | os.PathLike[str], record: SweepRecord) -> Path:
    """Write ``sweep.json`` into a sweep's folder, atomically.

    Raises:
        DeftxError: the folder cannot be written.
    """
    content = {"schema_version": SCHEMA_VERSION, **plain(dataclasses.asdict(record))}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return write_file(Path(folder) / SWEEP, lambda path: path.write_text(text, encoding="utf-8"))


def read_sweep(path: str | os.PathLike[str]) -> SweepRecord:
    """Read a ``sweep.json``, or the one in a sweep's folder.

    Raises:
        DeftxError: there is none, it is not one, or its schema is another.
    """

    def build(version: int, content: Any) -> SweepRecord:
        if version < SCHEMA_VERSION:
            content = upgrade_sweep(content)
        for kind in ("jobs", "stages"):
            content[kind] = [SweepJob(**job) for job in content[kind]]
        return SweepRecord(**content)

    return read_record(path, SWEEP, "sweep", (OLDEST_READ, SCHEMA_VERSION), build)
