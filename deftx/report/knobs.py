"""Which settings of a run matter for a score, and what they are called in a table.

A score belongs to a *condition* (what was composed) under the settings that this condition reads: LT-SFT reads no rank,
so the LT-SFT scores of a rank sweep are one column however many runs hold them, and the same column as a run with
``rank=none``. The baseline of a setting is found by the same rule, in the same run or in another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Settings = dict[str, Any]

BOOKKEEPING = frozenset(
    ("study", "seed", "language", "compare", "controls", "missing_text", "method", "task", "split", "model", "only")
)
"""Names, what the sections and the rows of a table say already, and what changes no score."""

SHORT = ("rank", "residual", "k", "density", "value_dtype", "mask", "second_phase")
"""Knobs that repeat what ``lang.*`` and ``task.*`` say."""

ADDED = {
    "value_dtype": ("rank", "float32"),
    "mask": ("rank", "magnitude"),
    "second_phase": ("rank", True),
    "training.length_buckets": ("training.epochs", 0),
    "more_sources": ("source", []),
}
"""Knobs of an SFT (``lang.*``, ``task.*``, ``source.*``) that came later: what older results hold that could have had
them, and what they were computed with."""

TARGETS = "targets"
"""The targets of a run as a setting: other targets' SFTs are what ``other_language_sft`` composes."""

_DENOISING = ("rank", "residual", "exclude")
_ORDER = ("rank", "residual", "density", "k")


def score_settings(settings: Mapping[str, Any]) -> Settings:
    """The settings of a run that can change a score, each once; what older results do not say is filled in."""
    kept = {key: value for key, value in settings.items() if key not in BOOKKEEPING}
    for prefix in ("lang.", "task.", "source."):
        for key, (beside, default) in ADDED.items():
            if f"{prefix}{beside}" in kept:
                kept.setdefault(f"{prefix}{key}", default)
    for key in SHORT:
        if f"lang.{key}" in kept and f"task.{key}" in kept:
            kept.pop(key, None)
    kept = {key: value for key, value in kept.items() if value is not None}  # as good as not there
    if isinstance(targets := settings.get("language"), list):
        kept[TARGETS] = sorted(map(str, targets))
    return kept


def read_by(condition: str, settings: Mapping[str, Any]) -> Settings:
    """The part of :func:`score_settings` that a condition reads; what it ignores is left out.

    Args:
        condition: One of :data:`deftx.tracking.CONDITIONS`, or another name (which is taken to read everything).
        settings: What :func:`score_settings` gave.
    """
    dropped: tuple[str, ...] = ()
    if condition == "no_language_sft":
        dropped = ("lang.", "source.", "corpus.")
    elif condition == "source_sft":
        dropped = ("lang.",)
    kept = {key: value for key, value in settings.items() if not key.startswith(dropped)} if dropped else dict(settings)
    if condition != "other_language_sft":
        kept.pop(TARGETS, None)
    if condition == "ltsft":
        silent = {f"{prefix}{key}" for prefix in ("", "lang.", "task.") for key in _DENOISING}
        kept = {key: value for key, value in kept.items() if key not in silent}
    return kept


def canonical(settings: Mapping[str, Any]) -> str:
    """Text that equal settings share."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)


def varying(settings: Sequence[Mapping[str, Any]]) -> list[Settings]:
    """Of each, what differs between them, under the shortest names: ``lang.rank`` and ``task.rank`` that agree are
    ``rank``. Knobs stand in the order rank, residual, density, k, then by name.
    """
    keys = {key for item in settings for key in item}
    differing = {key for key in keys if len({canonical({"": item.get(key)}) for item in settings}) > 1}
    names: dict[str, str] = {}  # shown name -> key to read
    for key in differing:
        prefix, _, rest = key.partition(".")
        twin = {"lang": f"task.{rest}", "task": f"lang.{rest}"}.get(prefix)
        agree = twin in differing and all(item.get(key) == item.get(twin) for item in settings)
        names[rest if agree else key] = key
    implied = [name for name, key in names.items() if _implied(name, [item.get(key) for item in settings], names)]
    names = {name: key for name, key in names.items() if name not in implied}
    ordered = sorted(names, key=lambda name: (_place(name), name))
    return [{name: item.get(names[name]) for name in ordered} for item in settings]


def _implied(name: str, values: Sequence[Any], names: Mapping[str, str]) -> bool:
    """Whether a knob of the denoising has one value only, and none where ``rank=none`` says that there is none."""
    prefix, _, last = name.rpartition(".")
    rank = {f"{prefix}.rank" if prefix else "rank", "rank"}
    return (
        last in ("residual", "exclude")
        and bool(rank & set(names))
        and len(ordered_values(values)) <= 2
        and (None in values)
    )


def _place(name: str) -> int:
    last = name.rpartition(".")[2]
    return _ORDER.index(last) if last in _ORDER else len(_ORDER)


def knob_text(name: str, value: Any) -> str:
    """``rank=16``; empty for a mask size that the other of ``k`` and ``density`` gives."""
    last = name.rpartition(".")[2]
    if value is None and last in ("k", "density", "residual"):
        return ""
    return f"{name}={shown_value(value, name)}"


def shown_value(value: Any, name: str = "") -> str:
    """A value as a person writes it on the command line."""
    if value is None:
        return "none" if name.rpartition(".")[2] == "rank" else "null"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown_value(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def number(value: Any) -> float | None:
    """A knob's value as a number, where it is one: ``"16"`` is, ``"energy:0.9"`` is not."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words by alphabet (numbers in them by size: ``energy:0.8`` < ``energy:0.9``), none last."""
    as_number = number(value)
    if as_number is not None:
        return (0, as_number, "")
    if value is None:
        return (2, 0.0, "")
    return (1, 0.0, shown_value(value))


def ordered_values(values: Iterable[Any]) -> list[Any]:
    """Distinct values in the order of :func:`sort_key`."""
    found = {canonical({"": value}): value for value in values}
    return sorted(found.values(), key=sort_key)
