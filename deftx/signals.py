"""Turns requests to end a process into exceptions; every room may use it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, end the block as Ctrl-C does, so that it can clean up.

    Does nothing outside the main thread, because only that thread may handle signals.

    Raises:
        KeyboardInterrupt: At SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
