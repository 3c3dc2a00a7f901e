"""A report's folder, written whole or not at all: built beside its place, then renamed; nobody sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from deftx.errors import DeftxError
from deftx.report.collect import MARKER

STALE = 3600  # seconds after which an unfinished sibling belongs to a report that was killed


def refuse_foreign(out: Path) -> None:
    """Refuse a place that holds anything but a report.

    Raises:
        DeftxError: It does.
    """
    if out.is_symlink() and not out.exists():
        raise DeftxError(f"{out} is a link to nothing; choose another --out FOLDER")
    if not out.exists():
        return
    if not out.is_dir():
        raise DeftxError(f"{out} is a file; choose another --out FOLDER")
    if (out / MARKER).is_file():
        try:
            kind = json.loads((out / MARKER).read_text(encoding="utf-8")).get("kind")
        except (OSError, ValueError, AttributeError):
            kind = None
        if kind == "deftx report":
            return
    if any(out.iterdir()):
        raise DeftxError(
            f"{out} holds something that is not a report of deftx, and stays as it is; choose another --out FOLDER"
        )


def publish(out: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a sibling folder, then put it in the place of an older report.

    Raises:
        DeftxError: The place holds something else, or cannot be written.
    """
    refuse_foreign(out)
    out = Path(os.path.abspath(out))  # noqa: PTH100 -- a link in the path stays one
    parent = out.parent
    partial = parent / f".{out.name}.{os.urandom(4).hex()}.partial"
    old = partial.with_suffix(".old")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clean(parent, out.name)
        partial.mkdir()
        fill(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if out.exists():
            # Two renames: a folder that holds something cannot be replaced in one.
            out.rename(old)
        partial.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise DeftxError(
            f"cannot write {out}: {os.strerror(error.errno) if error.errno else error}; make room or permission there, "
            "or choose another --out FOLDER"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _clean(parent: Path, name: str) -> None:
    """Take away what killed reports left, and put back one that was killed between the two renames."""
    for path in sorted(parent.glob(f".{name}.*")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < STALE:
                continue
            if path.suffix == ".old" and not (parent / name).exists():
                path.rename(parent / name)
            elif path.suffix in (".partial", ".old"):
                shutil.rmtree(path)
