"""Files and folders that are there whole or not at all: written beside their place, synced, renamed.

Readers see the old content or the new one, whenever the writing process dies. The temporary sibling is hidden, and its
name tells its process, so that what a killed process left is known for it and removed at the next attempt. Every room
may use it; what goes wrong is an :class:`OSError`, which each room words for its user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from deftx.processes import mark, marked

__all__ = ["file", "folder", "publish", "remove_leftovers", "temporary_name", "write"]

_TEMPORARY, _REPLACED = ".tmp", ".old"
_STALE = 3600.0  # seconds after which an unchanged sibling of another host's process counts as left behind


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes the place of ``path`` when the block ends without an error.

    Parent folders are made. A device or a pipe, such as ``/dev/stdout``, cannot be replaced: it is given itself.

    Raises:
        OSError: It cannot be written; what was at ``path`` is still there.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = _begin(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        _remove(temporary)


def write(path: Path, content: bytes) -> None:
    """Write a :func:`file` of this content.

    Raises:
        OSError: It cannot be written; what was at ``path`` is still there.
    """
    with file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes ``path`` when the block ends without an error.

    Parent folders are made. The block should take minutes, not hours: other hosts take a temporary folder that has not
    changed for an hour for one that was left behind.

    Args:
        path: Must not exist, or be an empty folder, when the block ends.
        replace: A folder with something in it may be there, and is removed. Between its renaming and the new one's
            there is none; the next attempt puts it back where a process was killed there.

    Raises:
        OSError: It cannot be written, or ``path`` holds something; what was there is still there.
    """
    temporary = _begin(path)
    old = temporary.with_suffix(_REPLACED)
    try:
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        if replace and path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync_folder(path.parent)
    finally:
        _remove(temporary)
        if replace:
            _put_back(old, path)


def publish(temporary: Path, path: Path) -> None:
    """Sync a folder with all that lies in it and rename it to ``path``, which must not exist, or be an empty folder.

    For folders that take longer to fill than the block of :func:`folder` should.

    Raises:
        OSError: ``path`` holds something, or cannot be written; the temporary folder is still there.
    """
    _sync_tree(temporary)
    temporary.rename(path)
    _sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a hidden sibling that names this process: seen by no reader, and known as a leftover once that is dead."""
    return path.with_name(f".{path.name}.{mark()}{_TEMPORARY}")


def remove_leftovers(path: Path, *, stale: float | None = None) -> None:
    """Remove what killed processes left beside ``path`` while they wrote it, or put back what they were replacing.

    Args:
        path: What they wrote.
        stale: Seconds after which an unchanged sibling of another host's process, whose death cannot be proven,
            counts as left behind; None leaves those alone.
    """
    with contextlib.suppress(OSError):
        for sibling in list(path.parent.iterdir()):
            found = marked(sibling.name)
            if found is None or found[0] != f".{path.name}":
                continue
            process, age = found[1], time.time() - sibling.lstat().st_mtime
            if process.dead or (stale is not None and not process.here and age > stale):
                if sibling.suffix == _REPLACED:
                    _put_back(sibling, path)
                elif sibling.suffix == _TEMPORARY:
                    _remove(sibling)


def _begin(path: Path) -> Path:
    if not path.parent.exists():  # where it is a file, mkdir would say "File exists" and not "Not a directory"
        path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path, stale=_STALE)
    return temporary_name(path)


def _put_back(old: Path, path: Path) -> None:
    """Give what was being replaced its place again, or remove it where something new took that."""
    if path.exists():
        _remove(old)
    else:
        with contextlib.suppress(FileNotFoundError):
            old.rename(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder; the rename is atomic there all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    folders = [folder]
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.append(path)
        elif path.is_file():
            _sync(path)
    for path in reversed(folders):
        _sync_folder(path)
