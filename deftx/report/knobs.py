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

from deftx.knobs import Knob, declared
from deftx.methods.settings import DENOISING, LABELLED, SFTKnobs, ShortKnobs
from deftx.methods.table import METHODS, SCORED
from deftx.settings import KNOBS, RunConfig
from deftx.tracking import DATA_READ, CellFacts, DataRead

Settings = dict[str, Any]

BOOKKEEPING = frozenset(name for name, facts in declared(RunConfig).items() if facts.bookkeeping)
"""Names, what the sections and the rows of a table say already, and what changes no score."""

TARGETS = "targets"
"""The targets of a run as a setting: other targets' SFTs are what ``other_language_sft`` composes."""

_SFT = declared(SFTKnobs)
_SCOPES = {"language": "lang", "task": "task"}
_LATER = {name: facts.default for name, facts in KNOBS.items() if facts.since > 1 and "." in name}


def _facts(name: str) -> Knob:
    """What is known of a setting: as a knob, else as one of a group."""
    while name and name not in KNOBS:
        name = name.rpartition(".")[0]
    return KNOBS.get(name, Knob())


def score_settings(settings: Mapping[str, Any]) -> Settings:
    """The settings of a run that can change a score, each once; what older results do not say is filled in.

    What data was read is compared apart (:func:`data_behind`): a run names only the languages that it has.
    """
    kept = {key: value for key, value in settings.items() if key not in BOOKKEEPING and key != DATA_READ}
    groups = {key.rpartition(".")[0] for key in kept}
    for name, default in _LATER.items():
        if name.rpartition(".")[0] in groups:
            kept.setdefault(name, default)  # of a knob that came later: what older results were computed with
    for key in declared(ShortKnobs):
        if f"lang.{key}" in kept and f"task.{key}" in kept:
            kept.pop(key, None)
    kept = {key: value for key, value in kept.items() if value is not None}  # as good as not there
    if isinstance(targets := settings.get("language"), list):
        kept[TARGETS] = sorted(map(str, targets))
    return kept


def read_by(condition: str, settings: Mapping[str, Any], cells: Iterable[CellFacts] = ()) -> Settings:
    """The part of :func:`score_settings` that a condition reads; what it ignores is left out.

    Args:
        condition: One of :data:`deftx.tracking.CONDITIONS`, or another name (which is taken to read everything).
        settings: What :func:`score_settings` gave.
        cells: Of the run. Its settings are those of all its methods; what each makes of them, its cells' terms say.
    """

    def reads(key: str) -> bool:
        return condition not in _facts(key).ignored_by

    kept = {key: value for key, value in settings.items() if reads(key)}
    if condition != "other_language_sft":
        kept.pop(TARGETS, None)
    for term in (term for cell in cells if cell.condition == condition for term in cell.terms):
        scope = _SCOPES[term.kind]
        if term.rank is None and reads(scope):
            kept = {key: value for key, value in kept.items() if key not in {f"{scope}.{name}" for name in DENOISING}}
        for name in ("mask", "second_phase"):
            if f"{scope}.{name}" in kept:
                kept[f"{scope}.{name}"] = getattr(term, name)
    return kept


def as_method(method: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's settings as another method has them: that its own method draws the mask is no setting of the other's."""
    own = METHODS.get(str(settings.get("method")))
    if own is None or method not in METHODS or not SCORED[own.scored].drawn:
        return settings
    return {**settings, **{name: "magnitude" for name in ("mask", "lang.mask", "task.mask") if name in settings}}


def data_behind(condition: str, data: Sequence[DataRead]) -> dict[str, str]:
    """Digests of the data that a condition's scores come from, and of what filters left of it, by name.

    Where it lay makes no difference.

    Args:
        condition: As for :func:`read_by`.
        data: What a run read.
    """
    sources = {item.language for item in data if item.what == "train"}

    def is_behind(item: DataRead) -> bool:
        if item.what != "text":
            return True
        return condition != "no_language_sft" and (condition != "source_sft" or item.language in sources)

    return digests(item for item in data if is_behind(item))


def digests(data: Iterable[DataRead]) -> dict[str, str]:
    """Digests of some data, and of what filters left of it, by name."""
    known = list(data)
    kept = {f"{item.name} kept": item.kept for item in known if item.kept is not None}
    return {item.name: item.digest for item in known} | kept


def agree(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether what both know is the same; what only one of them knows is no difference."""
    return all(second.get(name, digest) == digest for name, digest in first.items())


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
    if "source.enabled" in names:  # it says already that there are no others
        implied += [name for name, key in names.items() if _is_one(name, [item.get(key) for item in settings])]
    names = {name: key for name, key in names.items() if name not in implied}
    if _count(settings, set(names.values()) - {"method"}) == _count(settings, names.values()):
        names.pop("method", None)  # the other knobs tell them apart
    ordered = sorted(names, key=lambda name: (_place(name), name))
    return [{name: item.get(names[name]) for name in ordered} for item in settings]


def _is_one(name: str, values: Sequence[Any]) -> bool:
    """Whether a knob of φ_S has one value wherever there is a φ_S."""
    there = ordered_values(value for value in values if value is not None)
    return name.startswith("source.") and name != "source.enabled" and len(there) == 1


def _count(settings: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> int:
    """How many of some settings differ in some keys."""
    return len({canonical({key: item.get(key) for key in sorted(keys)}) for item in settings})


def _implied(name: str, values: Sequence[Any], names: Mapping[str, str]) -> bool:
    """Whether a knob of the denoising has one value only, and none where ``rank=none`` says that there is none."""
    prefix, _, last = name.rpartition(".")
    rank = {f"{prefix}.rank" if prefix else "rank", "rank"}
    return (
        last in DENOISING
        and last != "rank"
        and bool(rank & set(names))
        and len(ordered_values(values)) <= 2
        and (None in values)
    )


def _place(name: str) -> int:
    last = name.rpartition(".")[2]
    return LABELLED.index(last) if last in LABELLED else len(LABELLED)


def knob_text(name: str, value: Any) -> str:
    """``rank=16``; empty for a mask size that the other of ``k`` and ``density`` gives."""
    if value is None and not _none(name):
        return ""
    return f"{name}={shown_value(value, name)}"


def shown_value(value: Any, name: str = "") -> str:
    """A value as a person writes it on the command line."""
    if value is None:
        return _none(name) or "null"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown_value(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _none(name: str) -> str:
    """What labels say where a knob is null."""
    return _SFT.get(name.rpartition(".")[2], Knob()).none


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
