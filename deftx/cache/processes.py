"""Who uses which entries of a cache.

Each process lists the entries it reads in ``locks/<process>.used`` and touches that file every minute, so that pruning
leaves them alone. The file is also how a process shows other hosts that it lives (:mod:`deftx.processes`). A cache that
cannot be written is still read, without a record.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from pathlib import Path

from deftx.processes import Process

__all__ = ["LOCKS", "in_use", "lives", "note_use"]

LOCKS = "locks"
_RENEWED_EVERY = 60.0
_PATIENCE = 600.0  # seconds without a renewal after which a process of another host counts as gone


class _Records:
    """This process's records of use, one for each cache; one thread renews them all."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._pid = 0
        self._names: dict[Path, set[str]] = {}

    def add(self, root: Path, name: str) -> None:
        with self._guard:
            if self._pid != os.getpid():  # the first use, or a fork: the parent's records stay the parent's
                self._pid, self._names = os.getpid(), {}
                threading.Thread(target=self._renew, args=(self._pid,), daemon=True, name="deftx-cache-use").start()
                atexit.register(self._remove, self._pid)
            record = root / LOCKS / f"{Process.this().text}.used"
            names = self._names.setdefault(record, set())
            unwritten = {name} - names if record.exists() else {name} | names
            if unwritten:
                record.parent.mkdir(parents=True, exist_ok=True)
                with record.open("a", encoding="ascii") as stream:
                    stream.write("".join(f"{name}\n" for name in sorted(unwritten)))
                names.add(name)

    def _renew(self, pid: int) -> None:
        pause = threading.Event()
        while not pause.wait(_RENEWED_EVERY) and self._pid == pid:
            for record in list(self._names):
                with contextlib.suppress(OSError):
                    os.utime(record)

    def _remove(self, pid: int) -> None:
        if pid == os.getpid():
            for record in self._names:
                with contextlib.suppress(OSError):
                    record.unlink()


_RECORDS = _Records()


def note_use(root: Path, folder: Path) -> None:
    """Record that this process reads an entry, until it ends; does nothing if the cache cannot be written."""
    with contextlib.suppress(OSError):
        _RECORDS.add(root, folder.relative_to(root).as_posix())


def in_use(root: Path) -> dict[str, Process]:
    """Return the entries (``kind/digits``) that living processes have read, each with one of those processes.

    Removes the records of processes that are gone.
    """
    users: dict[str, Process] = {}
    for record in sorted((root / LOCKS).glob("*.used")):
        process = Process.parse(record.stem)
        with contextlib.suppress(OSError, ValueError):
            if process is None:
                continue
            if process.lives(record, _PATIENCE):
                users |= dict.fromkeys(record.read_text(encoding="ascii").split(), process)
            else:
                record.unlink()
    return users


def lives(root: Path, process: Process) -> bool:
    """Tell whether a process that works in the cache lives; on another host, it must renew its record of use."""
    if process.here:
        return process.lives()
    records = (root / LOCKS).glob(f"{process.host}-{process.pid}-{process.start or '*'}.used")
    return any(process.lives(record, _PATIENCE) for record in records)
