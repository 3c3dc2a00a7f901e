"""Reads entries back: checks the manifest and every file's size and sha256, and sets damaged entries aside."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from deftx.cache.entry import FORMAT_VERSION, MANIFEST, Entry
from deftx.cache.files import file_sha256, settled
from deftx.cache.keys import RESERVED
from deftx.errors import DeftxError

__all__ = ["DAMAGED", "DamageError", "OutdatedError", "Verifier", "entry_folders", "identity", "load", "set_aside"]

log = logging.getLogger(__name__)

DAMAGED = "damaged"
_KEY = re.compile("[0-9a-f]{16}")


class DamageError(Exception):
    """An entry cannot be used; the text is the reason.

    Attributes:
        what: One word for the entry's state.
    """

    what = "damaged"


class OutdatedError(DamageError):
    """An entry is intact, but one of the results it was made from now has other bits."""

    what = "outdated"


def entry_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of published results by kind and key, without reading them."""
    for kind in sorted(root.iterdir()) if root.is_dir() else []:
        if kind.name in RESERVED or kind.name.startswith(".") or not kind.is_dir():
            continue
        # Only names in the form of keys: nothing is read, moved or pruned in a folder that is no cache.
        yield from (path for path in sorted(kind.iterdir()) if _KEY.fullmatch(path.name) and path.is_dir())


def load(folder: Path) -> Entry:
    """Read an entry's manifest, but none of its files.

    Raises:
        DamageError: The manifest is missing or malformed.
        DeftxError: It cannot be read, or has a newer format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DeftxError(
                f"{folder} was written in cache format {version}, this deftx reads up to "
                f"{FORMAT_VERSION}: update deftx or choose another folder for the cache"
            )
        entry = Entry(folder, manifest)
        sound = all(isinstance(text, str) for text in (manifest["key"], manifest["kind"], manifest["label"]))
        sound &= isinstance(manifest["notes"], dict) and isinstance(entry.size, int)
        for item in entry.lineage:
            sound &= isinstance(item.key, str) and isinstance(item.digest, str) and isinstance(item.provenance, dict)
            sound &= isinstance(item.provenance.get("versions", {}), dict)
        for name, record in manifest["files"].items():
            sound &= isinstance(record["sha256"], str) and ".." not in Path(name).parts
            sound &= not Path(name).is_absolute()
    except PermissionError as error:
        raise DeftxError(f"cannot read the cache entry {folder}: {error.strerror}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamageError(f"{MANIFEST} is missing or broken ({type(error).__name__})") from error
    if not sound:
        raise DamageError(f"{MANIFEST} does not have the form of one")
    return entry


class Verifier:
    """Checks entries; hashes an unchanged file once per process."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def check(self, entry: Entry) -> None:
        """Compare every file with the manifest.

        Raises:
            DamageError: A file is missing, or has another size or sha256.
            DeftxError: A file may not be read.
        """
        for name, record in entry.manifest["files"].items():
            path, now = entry.path / name, time.time_ns()
            try:
                stat = path.stat()
                if stat.st_size != record["size"]:
                    raise DamageError(f"{name} has {stat.st_size} bytes, not {record['size']}")
                mark = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                digest = self._known.get(mark) or file_sha256(path)
                if settled(stat, now):
                    self._known[mark] = digest
            except PermissionError as error:
                raise DeftxError(f"cannot read {path}: {error.strerror}") from error
            except OSError as error:
                raise DamageError(f"{name} cannot be read ({error.strerror})") from error
            if digest != record["sha256"]:
                raise DamageError(f"the sha256 of {name} differs")


def identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what tells an entry's folder from a later one of the same name; None if there is no folder."""
    try:
        stat = os.lstat(folder)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def set_aside(
    root: Path, folder: Path, reason: str | DamageError, judged: tuple[int, int, int] | None = None
) -> Path | None:
    """Move an unusable entry to ``damaged/`` with a warning; return its new folder, or None if it was gone.

    Args:
        root: The cache's folder.
        folder: The entry.
        reason: Why it is unusable; a text means that it is damaged.
        judged: Its :func:`identity` when it was checked; another entry in its place stays there.

    Raises:
        DeftxError: It cannot be moved.
    """
    state = reason.what if isinstance(reason, DamageError) else DamageError.what
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    target = root / DAMAGED / f"{folder.parent.name}-{folder.name}-{stamp}-{os.urandom(2).hex()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        moved = identity(target)
        if judged is not None and moved is not None and moved[:2] != judged[:2]:  # renaming changes the third
            with contextlib.suppress(OSError):
                target.rename(folder)
                return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeftxError(
            f"the cache entry {folder} is {state} ({reason}) and cannot be moved aside: {error.strerror}"
        ) from error
    log.warning("the cache entry %s is %s (%s); it was set aside as %s", folder, state, reason, target)
    return target
