"""What a process does when it is asked to end; every room may use it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems send, ends the block as Ctrl-C does: what it started can be ended, too.

    Outside of the main thread, which alone may handle signals, nothing changes.

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
