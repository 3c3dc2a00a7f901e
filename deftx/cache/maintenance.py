"""Maintains a cache: lists what is in it, finds damaged entries and leftovers, and removes what is not needed.

Nothing here removes an entry that a running process reads or computes. One rename to a hidden name removes an entry,
so a reader sees all of it or nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deftx.atomic import temporary_name
from deftx.cache.entry import MANIFEST, Entry
from deftx.cache.keys import RESERVED
from deftx.cache.locks import is_locked
from deftx.cache.processes import in_use, lives
from deftx.cache.scratch import SCRATCH, forget_claims, scratch_owner
from deftx.cache.verify import DAMAGED, DamageError, Verifier, entry_folders, load
from deftx.errors import DeftxError, listed
from deftx.processes import Process, marked

__all__ = ["Filter", "Leftover", "check_all", "find_entry", "last_used", "leftovers_of", "prunable", "remove"]

DAY = 86400.0
_TOKENS = "tokens"


def last_used(entry: Entry) -> float:
    """Return the time of the entry's last use (seconds since 1970), the modification time of its manifest."""
    try:
        return (entry.path / MANIFEST).stat().st_mtime
    except OSError:
        return time.time()


def find_entry(entries: Sequence[Entry], text: str) -> Entry:
    """Return the one entry whose key starts with ``text``, which may also be ``kind/digits``.

    Raises:
        DeftxError: There is none, or more than one.
    """
    kind, _, digits = text.lower().rpartition("/")
    matches = [entry for entry in entries if entry.key.startswith(digits) and kind in ("", entry.kind)]
    if not digits or not matches:
        raise DeftxError(f"no entry has a key that starts with {text!r}; deftx cache ls lists all {len(entries)}")
    if len(matches) > 1:
        names = listed([f"{entry.kind}/{entry.key[:16]} ({entry.label})" for entry in matches])
        raise DeftxError(f"{len(matches)} keys start with {text!r}: {names}; give more digits")
    return matches[0]


def check_all(
    folders: Sequence[Path], progress: Callable[[int], None] | None = None
) -> Iterator[tuple[Path, str | None]]:
    """Verify entries one by one and yield each folder with the reason why it is damaged, or None.

    Args:
        folders: Folders from :func:`deftx.cache.verify.entry_folders`.
        progress: Called with the bytes of each entry after it was read.
    """
    verifier = Verifier()
    for folder in folders:
        reason, size = None, 0
        try:
            entry = load(folder)
            size = entry.size
            if folder != folder.parent / entry.key[:16] or entry.kind != folder.parent.name:
                raise DamageError(f"it belongs to the key {entry.key} of {entry.kind}")
            verifier.check(entry)
        except (DamageError, DeftxError) as problem:
            reason = str(problem)
        if progress is not None:
            progress(size)
        if reason is None or folder.is_dir():  # else it was pruned or set aside meanwhile
            yield folder, reason


@dataclass(frozen=True)
class Filter:
    """Selects entries; a value of None does not matter.

    Attributes:
        older_than: Least number of seconds since the last use.
        larger_than: Least number of bytes.
        kinds: Kinds of stages; empty for all.
    """

    older_than: float | None = None
    larger_than: int | None = None
    kinds: tuple[str, ...] = ()

    @property
    def given(self) -> bool:
        """Whether it selects by anything."""
        return self != Filter()

    def takes(self, entry: Entry, now: float) -> bool:
        """Tell whether it selects the entry."""
        return (
            (self.older_than is None or now - last_used(entry) >= self.older_than)
            and (self.larger_than is None or entry.size >= self.larger_than)
            and (not self.kinds or entry.kind in self.kinds)
        )


def prunable(root: Path, entries: Sequence[Entry], criteria: Filter) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Return the selected entries that may go, and those that must stay, with the reason."""
    used, now = in_use(root), time.time()
    chosen: list[Entry] = []
    refused: list[tuple[Entry, str]] = []
    for entry in entries:
        if criteria.takes(entry, now):
            reason = _reason_to_keep(root, entry, used)
            refused += [] if reason is None else [(entry, reason)]
            chosen += [entry] if reason is None else []
    return chosen, refused


def _reason_to_keep(root: Path, entry: Entry, used: dict[str, Process]) -> str | None:
    name = entry.path.relative_to(root).as_posix()
    if name in used:
        return f"{used[name]} uses it"
    if is_locked(root, name.replace("/", "-")):
        return "it is being computed"
    return None


def remove(root: Path, entry: Entry) -> bool:
    """Remove an entry, unless a process has started to use it or it is gone already.

    Raises:
        DeftxError: It cannot be removed.
    """
    hidden = temporary_name(entry.path)
    try:
        entry.path.rename(hidden)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DeftxError(f"cannot remove {entry.path}: {error.strerror}") from error
    if _reason_to_keep(root, entry, in_use(root)) is not None:
        with contextlib.suppress(OSError):  # fails if it was recomputed already, with the same result
            hidden.rename(entry.path)
            return False
    shutil.rmtree(hidden, ignore_errors=True)
    return True


@dataclass(frozen=True)
class Leftover:
    """Something in the cache that is no result.

    Attributes:
        path: Its folder or file.
        sort: ``damaged`` (an entry that was set aside), ``checkpoints`` (of an unfinished stage), ``temporary`` (a
            result that was being written or removed) or ``tokens`` (tokenised text, which is made again when needed).
        size: Bytes.
        changed: Time of its last change (seconds since 1970).
        running: The living process that owns it, if any.
    """

    path: Path
    sort: str
    size: int
    changed: float
    running: Process | None = None

    def remove(self, root: Path) -> bool:
        """Remove it; return False if something of it remains."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
            if self.sort == "checkpoints":
                forget_claims(root, self.path.name)
        else:
            with contextlib.suppress(OSError):
                self.path.unlink()
        return not os.path.lexists(self.path)


def leftovers_of(root: Path) -> list[Leftover]:
    """List all that is no result: damaged entries, checkpoints, temporary folders, tokenised text."""
    leftovers = [_leftover(path, "damaged", None) for path in _children(root / DAMAGED)]
    for path in _children(root / SCRATCH):
        if path.name == _TOKENS:
            leftovers += [_leftover(file, _TOKENS, None) for file in _children(path)]
        elif path.is_dir():
            owner = scratch_owner(root, path.name)
            leftovers.append(_leftover(path, "checkpoints", owner if owner and lives(root, owner) else None))
    for kind in _children(root):
        if kind.name not in RESERVED and kind.is_dir():
            for path in _children(kind):
                if path.name.startswith(".") and (name := marked(path.name)):
                    leftovers.append(_leftover(path, "temporary", name[1] if lives(root, name[1]) else None))
    return leftovers


def _leftover(path: Path, sort: str, running: Process | None) -> Leftover:
    size, changed = _measure(path)
    return Leftover(path, sort, size, changed, running)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _measure(path: Path) -> tuple[int, float]:
    size, changed = 0, 0.0
    for item in [path, *(path.rglob("*") if path.is_dir() else [])]:
        with contextlib.suppress(OSError):
            stat = item.lstat()
            size += 0 if item.is_dir() else stat.st_size
            changed = max(changed, stat.st_mtime)
    return size, changed


def all_folders(root: Path, kinds: Sequence[str] = ()) -> list[Path]:
    """Return the folders of the published results of some kinds, or of all."""
    return [folder for folder in entry_folders(root) if not kinds or folder.parent.name in kinds]
