"""Who shares a cache: whether another process still lives, and which entries it has in use.

A process is known by a hash of its host (and process-id namespace), its id and its start time. On the same host it is
dead when its id is gone or has another start time. Of another host nothing is known but what it renews: each process
lists the entries it was given in ``locks/<process>.used`` and touches that file every minute, so that pruning leaves
them alone. All of it is for comfort: a cache that cannot be written is read all the same.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import platform
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["LOCKS", "Process", "in_use", "note_use", "owner"]

LOCKS = "locks"
_RENEWED_EVERY = 60.0
_LOST_AFTER = 600.0
_USED = re.compile(r"([0-9a-f]{8})-(\d+)-(\d+)\.used")


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
    """One process that shares the cache."""

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


class _Records:
    """This process's lists of used entries, one a cache; one thread renews them all."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._pid = 0
        self._files: dict[Path, tuple[Path, set[str]]] = {}

    def add(self, root: Path, name: str) -> None:
        with self._guard:
            if self._pid != os.getpid():  # the first use, or a fork: the parent's lists stay the parent's
                self._pid, self._files = os.getpid(), {}
                threading.Thread(target=self._renew, args=(self._pid,), daemon=True, name="deftx-cache-use").start()
                atexit.register(self._remove, self._pid)
            file, names = self._files.setdefault(root, (_record_of(root, Process.this()), set()))
            if name not in names or not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="ascii") as stream:
                    stream.write("".join(f"{item}\n" for item in ([name] if name not in names else sorted(names))))
                names.add(name)

    def _renew(self, pid: int) -> None:
        pause = threading.Event()
        while not pause.wait(_RENEWED_EVERY) and self._pid == pid:
            for file, _ in list(self._files.values()):
                with contextlib.suppress(OSError):
                    os.utime(file)

    def _remove(self, pid: int) -> None:
        if pid == os.getpid():
            for file, _ in self._files.values():
                with contextlib.suppress(OSError):
                    file.unlink()


_RECORDS = _Records()


def _record_of(root: Path, process: Process) -> Path:
    return root / LOCKS / f"{process.owner}-{process.pid}-{process.start}.used"


def note_use(root: Path, folder: Path) -> None:
    """Say that this process reads an entry, until it ends; silent where the cache cannot be written."""
    with contextlib.suppress(OSError):
        _RECORDS.add(root, folder.relative_to(root).as_posix())


def in_use(root: Path, *, ours: bool = True) -> dict[str, Process]:
    """Entries (``kind/digits``) that living processes have been given, and one process for each.

    Lists of processes that are gone are removed. A process of another host counts as gone when it has not renewed its
    list for ten minutes of the file system's own clock.

    Args:
        root: the cache's folder.
        ours: whether this process's own uses count.
    """
    found: dict[str, Process] = {}
    for file, process in _records(root):
        try:
            if process.dead or (not process.here and _now_at(root) - file.stat().st_mtime > _LOST_AFTER):
                file.unlink()
            elif ours or process != Process.this():
                found |= dict.fromkeys(file.read_text(encoding="ascii").split(), process)
        except (OSError, ValueError):
            continue
    return found


def _records(root: Path) -> Iterable[tuple[Path, Process]]:
    for file in sorted((root / LOCKS).glob("*.used")):
        if parts := _USED.fullmatch(file.name):
            yield file, Process(parts[1], int(parts[2]), int(parts[3]))


def _now_at(root: Path) -> float:
    """The time by the clock that stamps files there: another host's clock may be minutes off."""
    probe = root / LOCKS / f".clock.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
