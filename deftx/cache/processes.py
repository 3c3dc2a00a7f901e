"""Who uses which entries of a cache.

Of a process of another host (:mod:`deftx.processes`) nothing is known but what it renews: each process lists the
entries it was given in ``locks/<process>.used`` and touches that file every minute, so that pruning leaves them alone.
All of it is for comfort: a cache that cannot be written is read all the same.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from deftx.processes import Process

__all__ = ["LOCKS", "in_use", "note_use"]

LOCKS = "locks"
_RENEWED_EVERY = 60.0
_LOST_AFTER = 600.0
_USED = re.compile(r"([0-9a-f]{8})-(\d+)-(\d+)\.used")


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
