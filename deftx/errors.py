"""The one exception a user's mistake becomes.

Every room may import this leaf. ``deftx.cli`` prints the message of a :class:`DeftxError` without a traceback and
exits with status 1; anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class DeftxError(Exception):
    """A mistake the user can correct; the message names the value, the limit, what is available and what to do next."""


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add what a :class:`DeftxError` in the block says to ``problems``, a line each, instead of raising it."""
    try:
        yield
    except DeftxError as error:
        problems += str(error).splitlines()


def did_you_mean(value: str, available: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest available name, or an empty string when none is close."""
    close = difflib.get_close_matches(value, sorted(available), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str], shown: int = 8) -> str:
    """Return the first names of a list and how many follow: ``"a, b and 3 more"``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
