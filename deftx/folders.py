"""Folders that the environment decides; every room may ask."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> str:
    """Return the default folder of the stage cache.

    ``$DEFTX_CACHE``, else ``deftx`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``. A variable that is empty counts as
    none. Empty where there is no home folder either: nothing may land in the current one by chance.
    """
    if own := os.environ.get("DEFTX_CACHE", "").strip():
        return own
    if around := os.environ.get("XDG_CACHE_HOME", "").strip():
        return str(Path(around) / "deftx")
    try:
        return str(Path.home() / ".cache" / "deftx") if os.environ.get("HOME", "-").strip() else ""
    except RuntimeError:
        return ""
