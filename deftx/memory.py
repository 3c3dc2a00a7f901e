"""Measures the memory of this process; every room may use it."""

from __future__ import annotations

import sys

__all__ = ["peak_memory"]


def peak_memory() -> int | None:
    """Return the largest resident set of this process so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
