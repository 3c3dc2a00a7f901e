"""Sizes and times as every message says them."""

from __future__ import annotations

import pytest

from deftx.units import size_text, time_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_000_000, "976.6 KiB"),
        (38_600_000, "36.8 MiB"),
        (1_100_000_000, "1.0 GiB"),
        (2 << 40, "2.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes_are_powers_of_1024(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (12_600, "3.5 h"),
        (35_900, "10 h"),
        (86_400, "24 h"),
        (172_800, "2 d"),
        (31 * 86_400, "31 d"),
    ],
)
def test_times_get_coarser_as_they_get_longer(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
