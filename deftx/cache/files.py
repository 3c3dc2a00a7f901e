"""Contents of files: fingerprints, with a memo of files that have not changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deftx import atomic
from deftx.errors import DeftxError

__all__ = [
    "file_sha256",
    "fingerprint_files",
    "settled",
]

_RACY_NS = 2_000_000_000


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_files(
    paths: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None = None,
    *,
    memo: Path | None = None,
    remember: bool = True,
    hashes_by_path: dict[str, list[Any]] | None = None,
) -> str:
    """Return one sha256 for the contents of files, wherever they lie.

    Args:
        paths: files or folders. A folder stands for its files, recursively and by sorted relative name, which
            then counts too; names that start with a dot are left out.
        root: when given, each file's name relative to it counts and the order of ``paths`` does not. When
            not, only contents and their order count: moving or renaming a file keeps the fingerprint.
        memo: a JSON file that remembers hashes of unchanged files (path, inode, size, times); may be absent.
        remember: whether new hashes are written into it.
        hashes_by_path: the same in memory, to be read and added to.

    Raises:
        DeftxError: a path does not exist or cannot be read.
    """
    named: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
            inside = [(name, file) for name, file in inside if not any(p.startswith(".") for p in name.split("/"))]
            if not inside:
                raise DeftxError(f"{path} has no files")
        elif path.is_file():
            inside = [("", path)]
        else:
            raise DeftxError(f"{path} does not exist (or is neither a file nor a folder)")
        named += inside
    if root is not None:
        named = sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for _, path in named)
    hashes_by_path = {} if hashes_by_path is None else hashes_by_path
    hashes = {**_read_memo(memo), **hashes_by_path}
    total = hashlib.sha256()
    fresh: dict[str, list[Any]] = {}
    for name, path in named:
        try:
            now, identity, stat = time.time_ns(), os.path.realpath(path), path.stat()
            mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            digest = hashes[identity][-1] if hashes.get(identity, [None])[:-1] == mark else file_sha256(path)
        except OSError as error:
            raise DeftxError(f"cannot read {path}: {error.strerror}") from error
        if settled(stat, now) and hashes.get(identity) != [*mark, digest]:
            fresh[identity] = [*mark, digest]
        total.update(json.dumps([name, digest]).encode())
    hashes_by_path |= fresh
    if memo is not None and fresh and remember:
        # Losing this file costs time only: a cache that cannot be written is not an error here.
        with contextlib.suppress(OSError):
            atomic.write(memo, json.dumps({**_read_memo(memo), **fresh}, indent=0).encode())
    return total.hexdigest()


def _read_memo(memo: Path | None) -> dict[str, list[Any]]:
    if memo is None:
        return {}
    try:
        content = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        return {}
    return {path: mark for path, mark in content.items() if isinstance(mark, list) and len(mark) == 5}


def settled(stat: os.stat_result, now: int) -> bool:
    """Return whether another change would surely show in the time stamps (they tick: git's "racy" entries)."""
    return now - max(stat.st_mtime_ns, stat.st_ctime_ns) > _RACY_NS
