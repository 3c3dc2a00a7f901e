"""Writes files and folders whole or not at all: under a temporary name, synced, then renamed.

Readers see the old content or the new one, whenever the writing process dies. The temporary sibling is hidden, and its
name tells which process owns it, so that the next attempt removes what a killed process left. Every room may use this
module; errors are :class:`OSError`, which each room words for its user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deftx.processes import mark, marked

__all__ = ["file", "folder", "publish", "remove_leftovers", "temporary_name", "write"]

_TEMPORARY, _REPLACED = ".tmp", ".old"
_STALE = 3600.0  # seconds after which an unchanged sibling of another host's process counts as left behind


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes the place of ``path`` when the block ends without an error.

    Creates parent folders. A device or a pipe, such as ``/dev/stdout``, cannot be replaced, so the block writes to it.

    Raises:
        OSError: The file cannot be written; what was at ``path`` is still there.
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
    """Write this content to a :func:`file`.

    Raises:
        OSError: The file cannot be written; what was at ``path`` is still there.
    """
    with file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes ``path`` when the block ends without an error.

    Creates parent folders. The block should take minutes, not hours: another host treats a temporary folder that has
    not changed for an hour as left behind.

    Args:
        path: Must not exist, or be an empty folder, when the block ends.
        replace: Replaces a folder that holds something. For a moment between two renames there is none; if the process
            is killed there, the next attempt puts the old one back.

    Raises:
        OSError: The folder cannot be written, or ``path`` holds something; what was there is still there.
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
    """Sync a folder with its content and rename it to ``path``, which must not exist, or be an empty folder.

    Use it for folders that take too long to fill for the block of :func:`folder`.

    Raises:
        OSError: ``path`` holds something, or cannot be written; the temporary folder is still there.
    """
    _sync_tree(temporary)
    temporary.rename(path)
    _sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Return the name of a hidden sibling that this process owns; once the process is gone, it counts as a leftover."""
    return path.with_name(f".{path.name}.{mark()}{_TEMPORARY}")


def remove_leftovers(path: Path, *, patience: float | None = None) -> None:
    """Remove what killed processes left beside ``path`` while they wrote it, or put back what they were replacing.

    Args:
        path: What they wrote.
        patience: Seconds after which an unchanged sibling of another host's process counts as left behind; None leaves
            those alone.
    """
    with contextlib.suppress(OSError):
        for sibling in list(path.parent.iterdir()):
            name, process = marked(sibling.name) or ("", None)
            if name != f".{path.name}" or process is None or process.lives(sibling, patience):
                continue
            if sibling.suffix == _REPLACED:
                _put_back(sibling, path)
            elif sibling.suffix == _TEMPORARY:
                _remove(sibling)


def _begin(path: Path) -> Path:
    if not path.parent.exists():  # if it is a file, mkdir would say "File exists" and not "Not a directory"
        path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path, patience=_STALE)
    return temporary_name(path)


def _put_back(old: Path, path: Path) -> None:
    """Put the replaced folder back, or remove it if a new one has taken its place."""
    if path.exists():
        _remove(old)
    else:
        with contextlib.suppress(FileNotFoundError):
            old.rename(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder; ignores errors."""
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
