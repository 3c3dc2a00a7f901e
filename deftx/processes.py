"""Processes that share a folder: which one a name belongs to, and whether it still lives; every room may use it.

A process is known by a hash of its host (and process-id namespace), its id and its start time. On the same host it is
dead when its id is gone or has another start time. Of another host nothing is known.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Process", "mark", "marked", "owner"]

_MARKED = re.compile(r"(.+)\.([0-9a-z]{8})\.(\d+)\.[0-9a-f]+(?:\.[a-z]+)?")


@functools.cache
def owner() -> str:
    """Eight digits for this boot of this host and process-id namespace, within which a process id means something."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def _started(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        return int(status[status.rindex(b")") + 1 :].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class Process(NamedTuple):
    """One process that shares a folder with others.

    Attributes:
        owner: its host, as :func:`owner` gives it there.
        pid: its id on that host.
        start: its start time in clock ticks since boot; 0 where nobody told.
    """

    owner: str
    pid: int
    start: int

    @classmethod
    def this(cls) -> Process:
        """The process that asks."""
        return cls(owner(), os.getpid(), _started(os.getpid()))

    @property
    def here(self) -> bool:
        """Whether it is of this host, so that its death can be proven."""
        return self.owner == owner()

    @property
    def dead(self) -> bool:
        """Whether it is proven dead; of another host nothing is proven."""
        if not self.here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        now = _started(self.pid)
        return bool(self.start and now and now != self.start)

    def __str__(self) -> str:
        return f"process {self.pid}" if self.here else f"process {self.pid} on the host {self.owner}"


def mark() -> str:
    """Return an end for a name that no other process makes, and this one only once: ``host.pid.digits``."""
    return f"{owner()}.{os.getpid()}.{os.urandom(4).hex()}"


def marked(name: str) -> tuple[str, Process] | None:
    """Return what stands before the :func:`mark` in a name, and whose mark it is; None for a name without one.

    One suffix may follow the mark. The process's start time is not in it.
    """
    found = _MARKED.fullmatch(name)
    return (found[1], Process(found[2], int(found[3]), 0)) if found else None
