"""How a size and a time are said to people, the same in every message and table; every room may use it."""

from __future__ import annotations

__all__ = ["size_text", "time_text"]


def size_text(size: float) -> str:
    """Say bytes in powers of 1024: ``512 B``, ``3.4 MiB``."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def time_text(seconds: float) -> str:
    """Say a duration or an age: ``40 s``, ``12 min``, ``3.5 h``, ``31 d``."""
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    length, unit = (3600, "h") if seconds < 172800 else (86400, "d")
    value = seconds / length
    return f"{value:.1f}".removesuffix(".0") + f" {unit}" if value < 9.95 else f"{value:.0f} {unit}"
