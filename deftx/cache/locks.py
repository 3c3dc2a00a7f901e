"""One process computes a stage while the others wait. A lock only saves work; no result depends on one.

A process holds two locks of ``filelock`` together. The kernel's (``FileLock``) is free as soon as its process dies,
but may not reach other hosts. The lease (``SoftFileLease``) does: it is a file that its holder renews, and it passes
on after :data:`LEASE_SECONDS` without a renewal. ``DEFTX_LOCK`` (or ``StageCache(lock=...)``) chooses one, or none.
If the file system rejects a lock, the process continues without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from deftx.cache.processes import LOCKS
from deftx.cache.scratch import claim_in_force
from deftx.errors import DeftxError, did_you_mean
from deftx.units import time_text

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["LEASE_SECONDS", "MODES", "StageLock", "is_locked", "lock_mode", "lock_stage"]

log = logging.getLogger(__name__)
T = TypeVar("T")

MODES = ("auto", "file", "soft", "none")
VARIABLE = "DEFTX_LOCK"
LEASE_SECONDS = 60.0
"""Seconds a lease stays valid after its last renewal; all processes of one cache must agree on it."""
_POLL = (0.05, 2.0)
_REMIND_EVERY = 600.0


def lock_mode(mode: str | None = None) -> str:
    """Return the lock to use: ``mode``, else ``DEFTX_LOCK``, else ``auto``.

    Raises:
        DeftxError: It is not one of :data:`MODES`.
    """
    mode = mode or os.environ.get(VARIABLE) or "auto"
    if mode not in MODES:
        raise DeftxError(f"{VARIABLE}={mode}: available are {', '.join(MODES)}{did_you_mean(mode, MODES)}")
    return mode


class StageLock(Generic[T]):
    """What :func:`lock_stage` gives: the right to compute a stage, or its result.

    Attributes:
        published: The result that another process published meanwhile; None if this process has to compute it.
        locked: Whether this process holds a lock.
        leased: Whether it holds the lease, which other hosts see.
        waited: Seconds until one or the other was there.
    """

    def __init__(self) -> None:
        self.published: T | None = None
        self.locked = False
        self.leased = False
        self.waited = 0.0


@contextlib.contextmanager
def lock_stage(
    root: Path,
    name: str,
    label: str,
    mode: str,
    *,
    published: Callable[[], T | None],
    explain: Callable[[BaseException], DeftxError | None],
) -> Iterator[StageLock[T]]:
    """Wait until no other process computes a stage, or until its result is published.

    Args:
        root: The cache's folder.
        name: ``<kind>-<digits>`` of the stage.
        label: The stage's name in messages.
        mode: One of :data:`MODES`.
        published: Returns the result once it exists; called while waiting.
        explain: Returns the user's view of an error that going without a lock cannot solve (a full disk).
    """
    lock: StageLock[T] = StageLock()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for file_lock in _locks(root, name, mode):
            try:
                lock_path = Path(file_lock.lock_file)
                lock_path.parent.mkdir(parents=True, exist_ok=True)
                lock.published = _wait(file_lock, root, name, label, published)
            except (OSError, NotImplementedError) as error:
                if problem := explain(error):
                    raise problem from error
                log.debug("no %s for %s (%s); continuing without it", type(file_lock).__name__, label, error)
                continue
            if lock.published is not None:
                break
            stack.callback(_let_go, file_lock)
            lock.locked = True
            lock.leased |= _is_lease(file_lock)
        lock.waited = time.perf_counter() - started
        yield lock


def is_locked(root: Path, name: str) -> bool:
    """Tell whether a living process holds a lock of the stage, or claims its scratch."""
    claim = claim_in_force(root, name)
    if claim is not None and not claim.free and (claim.process is None or claim.process.here):
        return True
    from filelock import Timeout

    for lock in _locks(root, name, "auto"):
        if not os.path.lexists(lock.lock_file):
            continue
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except (OSError, NotImplementedError, ValueError):
            continue
        _let_go(lock)
    return False


def _locks(root: Path, name: str, mode: str) -> list[BaseFileLock]:
    """Return the locks of a mode in the order in which every process takes them."""
    import filelock

    locks: list[BaseFileLock] = []
    if mode in ("auto", "file"):
        locks.append(filelock.FileLock(root / LOCKS / f"{name}.lock"))
    if mode in ("auto", "soft"):
        locks.append(
            filelock.SoftFileLease(
                root / LOCKS / f"{name}.lease", lease_duration=LEASE_SECONDS, heartbeat_interval=LEASE_SECONDS / 4
            )
        )
    return locks


def _is_lease(lock: BaseFileLock) -> bool:
    return lock.lock_file.endswith(".lease")


def _let_go(lock: BaseFileLock) -> None:
    # The result is published, so a lock file that is gone or cannot be removed is no failure.
    with contextlib.suppress(OSError):
        lock.release()


def _wait(lock: BaseFileLock, root: Path, name: str, label: str, published: Callable[[], T | None]) -> T | None:
    """Take the lock, or return the result that was published while another process held it."""
    from filelock import LeaseSettingsMismatch, Timeout

    pause, reminded = _POLL[0], 0.0
    watch = _Watch(lock, root, name) if _is_lease(lock) else None
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
        except (Timeout, LeaseSettingsMismatch):
            pass
        else:
            return None
        if (result := published()) is not None:
            return result
        now = time.monotonic()
        if now - started > 0.2 and (not reminded or now - reminded > _REMIND_EVERY):
            log.warning("%s: %s computes it; waiting for its result", label, _owner_text(root, name))
            reminded = now
        if watch is not None:
            watch.look()
        time.sleep(pause)
        pause = min(_POLL[1], 1.5 * pause)


def _owner_text(root: Path, name: str) -> str:
    """Say who computes a stage and since when, if its claim tells."""
    claim = claim_in_force(root, name)
    if claim is None or claim.process is None or claim.free:
        return "another process"
    try:
        since = datetime.fromisoformat(claim.since)
    except ValueError:
        return str(claim.process)
    seconds = (datetime.now(UTC) - since).total_seconds()
    return f"{claim.process} (since {since.astimezone():%H:%M:%S}, {time_text(seconds)})"


class _Watch:
    """Removes a dead holder's lease where ``filelock`` cannot.

    ``filelock`` hands leases over by exchanging two names. NFS and SMB refuse that, so the lease would stay forever.
    """

    def __init__(self, lock: BaseFileLock, root: Path, name: str) -> None:
        self.lock, self.root, self.name = lock, root, name
        self.mark: tuple[int, int, int] | None = None
        self.since = time.monotonic()

    def look(self) -> None:
        mark = self._mark()
        if mark != self.mark:
            self.mark, self.since = mark, time.monotonic()
            return
        if mark is None or not (self._dead() or time.monotonic() - self.since > 1.5 * LEASE_SECONDS):
            return
        if self._mark() == mark:
            log.warning("%s: removing the lease of a process that is gone", self.name)
            with contextlib.suppress(OSError):
                Path(self.lock.lock_file).unlink()

    def _dead(self) -> bool:
        claim = claim_in_force(self.root, self.name)
        holder = getattr(self.lock, "pid", None)
        return bool(claim and claim.process and claim.process.pid == holder and not claim.process.lives())

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            stat = os.lstat(self.lock.lock_file)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
