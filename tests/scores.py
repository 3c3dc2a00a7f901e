"""Scores of a run for tests: two targets, three conditions, one that failed, unequal numbers of examples."""

from __future__ import annotations

from deftx.tracking import Metric

SCORES = [
    Metric("ace", "ltsft", "macro_f1", 0.612, 400),
    Metric("ace", "no_language_sft", "macro_f1", 0.5, 400),
    Metric("ace", "deftx", "macro_f1", 0.6304, 400),
    Metric("ban", "no_language_sft", "macro_f1", 0.4, 399),
    Metric("ban", "deftx", "macro_f1", None, 399),
    Metric("ban", "ltsft", "macro_f1", 0.55, 399),
]
