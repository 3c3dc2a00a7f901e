"""How long Python took to load modules: torch, transformers and their like cost seconds, and no stage should be blamed.

Loading is timed where it happens, in the two loaders that read a module's file. A module loaded from within another
counts once, as part of the outermost; what other threads load is left out, since the run does not wait for it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from typing import Any

__all__ = ["clock_imports", "import_seconds"]

_seconds: float | None = None
_loading = False


def clock_imports() -> None:
    """Time every module that is loaded from here on; a second call changes nothing."""
    global _seconds
    if _seconds is not None:
        return
    _seconds = 0.0
    for loader, step in (
        (SourceFileLoader, "exec_module"),
        (ExtensionFileLoader, "create_module"),
        (ExtensionFileLoader, "exec_module"),
    ):
        setattr(loader, step, _timed(getattr(loader, step)))


def import_seconds() -> float | None:
    """Seconds spent loading modules since the last call, which each run makes once; None where nothing is timed."""
    global _seconds
    seconds = _seconds
    if seconds is not None:
        _seconds = 0.0
    return seconds


def _timed(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def timed(*arguments: Any) -> Any:
        global _seconds, _loading
        if _loading or threading.current_thread() is not threading.main_thread():
            return load(*arguments)
        _loading, started = True, time.perf_counter()
        try:
            return load(*arguments)
        finally:
            _loading = False
            _seconds = (_seconds or 0.0) + time.perf_counter() - started

    return timed
