"""How far a job is, as a small file beside its results that anyone may read; every room may use it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deftx.processes import Process, mark
from deftx.units import time_text

FILE = "progress.json"
"""In the folder of a job, while it runs."""

_file: ContextVar[Path | None] = ContextVar("progress_file", default=None)


@dataclass(frozen=True)
class Heartbeat:
    """What a job does at a moment.

    Attributes:
        label: The stage, and within it the phase that trains.
        step: Optimizer steps so far; null outside of a fit.
        steps: Of the phase.
        loss: The last mean training loss that was noted.
        rate: Steps a second since this process began the phase.
        when: Seconds since the epoch.
        owner: The process (:attr:`Process.text`).
    """

    label: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    rate: float | None = None
    when: float = field(default_factory=time.time)
    owner: str = field(default_factory=lambda: Process.this().text)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the phase needs at this rate; null while that is unknown."""
        if self.step is None or self.steps is None or not self.rate:
            return None
        return (self.steps - self.step) / self.rate

    @property
    def line(self) -> str:
        """The same for people, as a line of a log."""
        parts = [] if self.step is None else [f"step {self.step} of {self.steps}"]
        parts += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [] if not self.rate else [f"{self.rate:.3g} steps/s"]
        parts += [] if self.seconds_left is None else [f"{time_text(self.seconds_left)} left in this phase"]
        return f"{self.label}: {', '.join(parts)}" if parts else self.label


@contextlib.contextmanager
def heartbeats(folder: Path) -> Iterator[None]:
    """Keep :data:`FILE` in a job's folder within the block; a job that is killed leaves its last one."""
    token = _file.set(folder / FILE)
    try:
        yield
    finally:
        _file.reset(token)
        with contextlib.suppress(OSError):
            (folder / FILE).unlink()


def heartbeat_file() -> Path | None:
    """Return where this job's heartbeats go; null outside of :func:`heartbeats`."""
    return _file.get()


def write_heartbeat(beat: Heartbeat, file: Path | None) -> None:
    """Write a heartbeat, whole or not at all; whatever hinders that hinders no job."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        temporary = file.with_name(f".{FILE}.{mark()}")
        temporary.write_text(json.dumps(asdict(beat), ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """Read the last heartbeat of a job; null where there is none that can be read."""
    try:
        return Heartbeat(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
