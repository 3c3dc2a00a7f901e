"""Keeps a job going whatever happens to the terminal it speaks to; every room may use it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast


class _LastingStream:
    """A text stream whose writes never fail.

    What its encoding lacks is written as an escape. Once nothing can be written (the reader has gone, the disk is
    full), it is silent.

    Attributes:
        lost: Why something was not written; null while everything was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._silence(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or do nothing."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._silence(error)

    def _silence(self, error: Exception) -> None:
        self.lost = self.lost or error
        # The file beneath takes what is still buffered, and what the interpreter flushes at its end.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[Callable[[], Exception | None]]:
    """Let nothing that is printed within the block stop it: not an encoding, a closed pipe or a full disk.

    Yields:
        Says why some of standard output was lost; null where all of it was written.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        # A stream that was closed when the interpreter began is None.
        streams = [stream or stack.enter_context(Path(os.devnull).open("w", encoding="utf-8")) for stream in before]
        out, err = map(_LastingStream, streams)

        def lost() -> Exception | None:
            out.flush()
            return out.lost

        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield lost
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
