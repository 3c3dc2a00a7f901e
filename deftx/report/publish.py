"""Writes a report's folder whole or not at all: fills a sibling folder, then renames it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from deftx import atomic
from deftx.errors import DeftxError
from deftx.report.collect import MARKER


def refuse_foreign(out: Path) -> None:
    """Refuse an output path that holds anything but a report.

    Raises:
        DeftxError: The path holds something else.
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
    """Let ``fill`` write a sibling folder, then rename it to ``out``; an older report there is replaced.

    Raises:
        DeftxError: ``out`` holds something else, or cannot be written.
    """
    refuse_foreign(out)
    out = Path(os.path.abspath(out))  # noqa: PTH100 -- a link in the path stays one
    try:
        with atomic.folder(out, replace=True) as temporary:
            fill(temporary)
    except OSError as error:
        raise DeftxError(
            f"cannot write {out}: {os.strerror(error.errno) if error.errno else error}; make room or permission there, "
            "or choose another --out FOLDER"
        ) from error
