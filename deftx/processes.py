"""Processes that share a folder: which one owns a file, and whether it still lives; every room may use it.

An owner is one record: a hash of its host (and process-id namespace), its id, and its start time. Names of temporary
files and of records of use hold it, and so do claims. On this host, an owner is gone when its id is gone or has another
start time. An owner on another host is judged by a file that it renews.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple, Self

__all__ = ["Process", "host_id", "mark", "marked"]

_OWNER = r"([0-9a-z]{8})[.-](\d+)(?:-(\d+))?"  # names of older versions hold host.pid
_MARKED = re.compile(rf"(.+)\.({_OWNER})\.[0-9a-f]+(?:\.[a-z]+)?")


@functools.cache
def host_id() -> str:
    """Return eight digits for this boot of this host and its process-id namespace, where a process id is unique."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def _start_of(pid: int) -> int:
    """Return a process's start time in clock ticks since boot; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        return int(status[status.rindex(b")") + 1 :].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class Process(NamedTuple):
    """One process that shares a folder with others.

    Attributes:
        host: :func:`host_id` on its host.
        pid: its id on that host.
        start: its start time in clock ticks since boot; 0 where it is unknown.
    """

    host: str
    pid: int
    start: int

    @classmethod
    def this(cls) -> Self:
        """Return the calling process."""
        return cls(host_id(), os.getpid(), _start_of(os.getpid()))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a process from its :attr:`text`; None where the text does not name one."""
        match = re.fullmatch(_OWNER, text)
        return cls(match[1], int(match[2]), int(match[3] or 0)) if match else None

    @property
    def text(self) -> str:
        """The record as part of a file name."""
        return f"{self.host}-{self.pid}-{self.start}"

    @property
    def here(self) -> bool:
        """Whether it belongs to this host, so that its death can be proven."""
        return self.host == host_id()

    def lives(self, sign: Path | None = None, patience: float | None = None) -> bool:
        """Tell whether the process lives, as far as that can be known.

        Args:
            sign: For a process of another host: a file that it renews while it lives.
            patience: Seconds without a renewal after which such a process counts as gone; it also does when the file
                is gone. None trusts that it lives.
        """
        if not self.here:
            return sign is None or patience is None or _renewed(sign, patience)
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
        now = _start_of(self.pid)
        return not (self.start and now and now != self.start)

    def __str__(self) -> str:
        return f"process {self.pid}" if self.here else f"process {self.pid} on the host {self.host}"


def _renewed(sign: Path, patience: float) -> bool:
    """Tell whether a file changed lately, by the clock that stamps files there: hosts' clocks may be minutes apart."""
    probe = sign.with_name(f".clock.{mark()}")
    try:
        changed = sign.lstat().st_mtime
        probe.touch()
        return probe.stat().st_mtime - changed <= patience
    except FileNotFoundError:
        return False
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def mark() -> str:
    """Return an ending for a name that no other process makes, and this one only once."""
    return f"{Process.this().text}.{os.urandom(4).hex()}"


def marked(name: str) -> tuple[str, Process] | None:
    """Return what stands before the :func:`mark` in a name, and its process; None for a name without a mark.

    One suffix may follow the mark.
    """
    match = _MARKED.fullmatch(name)
    process = Process.parse(match[2]) if match else None
    return (match[1], process) if match and process else None
