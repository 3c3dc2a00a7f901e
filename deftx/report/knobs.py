"""Which settings of a run matter for a score, and what they are called in a table.

A score belongs to a *condition* (what was composed) under the settings that this condition reads: LT-SFT reads no rank,
so the LT-SFT scores of a rank sweep are one column however many runs hold them, and the same column as a run with
``rank=none``. The same rule finds the baseline of a setting, in the same run or in another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deftx.knobs import Knob, declared
from deftx.methods.settings import DENOISING, LABELLED, SFTKnobs, ShortKnobs
from deftx.methods.table import BY_PROXY, METHODS, SCORED, WITHOUT_LANGUAGE_SFT
from deftx.settings import KNOBS, RunConfig
from deftx.tracking import DATA_READ, CellFacts, DataRead, Term

Settings = dict[str, Any]

BOOKKEEPING = frozenset(name for name, facts in declared(RunConfig).items() if facts.bookkeeping)
"""Settings that change no score, or that the sections and the rows of a table already name."""

TARGETS = "targets"
"""The setting that holds a run's targets: ``other_language_sft`` composes the SFTs of other targets."""

_SFT = declared(SFTKnobs)
_SCOPES = {"language": "lang", "task": "task"}
_LATER = {name: facts.default for name, facts in KNOBS.items() if facts.since > 1 and "." in name}


def _facts(name: str) -> Knob:
    """Return the facts of a setting: its own as a knob, else those of its group."""
    while name and name not in KNOBS:
        name = name.rpartition(".")[0]
    return KNOBS.get(name, Knob())


def score_settings(settings: Mapping[str, Any]) -> Settings:
    """Return the settings of a run that can change a score, each once; fills in what older results do not say.

    The data is compared by :func:`data_behind`, because a run names only the languages that it has.
    """
    result = {key: value for key, value in settings.items() if key not in BOOKKEEPING and key != DATA_READ}
    groups = {key.rpartition(".")[0] for key in result}
    for name, default in _LATER.items():
        if name.rpartition(".")[0] in groups:
            result.setdefault(name, default)  # a later knob: older results were computed with its default
    for key in declared(ShortKnobs):
        if f"lang.{key}" in result and f"task.{key}" in result:
            result.pop(key, None)
    result = {key: value for key, value in result.items() if value is not None}  # null is as good as absent
    if isinstance(targets := settings.get("language"), list):
        result[TARGETS] = sorted(map(str, targets))
    return result


def read_by(condition: str, settings: Mapping[str, Any], cells: Iterable[CellFacts] = ()) -> Settings:
    """Return the settings that a condition reads.

    Args:
        condition: One of :data:`deftx.tracking.CONDITIONS`, or another name (which is taken to read everything).
        settings: The result of :func:`score_settings`.
        cells: The run's cells. Its settings are those of all its methods; the terms of the cells say which of them a
            method used.
    """
    names = {condition, {**WITHOUT_LANGUAGE_SFT, **BY_PROXY}.get(condition, condition)}

    def reads(key: str) -> bool:
        return not names & _facts(key).ignored_by

    result = {key: value for key, value in settings.items() if reads(key)}
    if condition != "other_language_sft":
        result.pop(TARGETS, None)
    for cell in (cell for cell in cells if cell.condition == condition):
        for term in cell.terms:
            scope = _SCOPES[term.kind]
            result = _as_term(term, scope, result) if reads(scope) else result
        # φ_S is as the language SFTs are, of which φ_T alone has none.
        if settings.get("source.shared") is False and reads("source") and cell.terms:
            result = _as_term(cell.terms[-1], "source", result)
    return result


def _as_term(term: Term, scope: str, settings: Settings) -> Settings:
    """Return settings with the knobs of one kind of SFT as a composed SFT has them."""
    result = dict(settings)
    if term.rank is None:
        for name in DENOISING:
            result.pop(f"{scope}.{name}", None)
    result |= {
        f"{scope}.{name}": getattr(term, name) for name in ("mask", "second_phase") if f"{scope}.{name}" in result
    }
    return result


def as_method(method: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's settings as another method has them: a mask that only its own method draws is undone."""
    own = METHODS.get(str(settings.get("method")))
    if own is None or method not in METHODS or not SCORED[own.scored].drawn:
        return settings
    drawn = ["mask", "lang.mask", "task.mask", *(["source.mask"] if settings.get("source.shared") is False else [])]
    return {**settings, **{name: "magnitude" for name in drawn if name in settings}}


def data_behind(condition: str, data: Sequence[DataRead]) -> dict[str, str]:
    """Return digests of the data that a condition's scores come from, and of what filters left of it, by name.

    The path of the data makes no difference.

    Args:
        condition: As for :func:`read_by`.
        data: The data that a run read.
    """
    sources = {piece.language for piece in data if piece.what == "train"}

    def is_behind(piece: DataRead) -> bool:
        if piece.what != "text":
            return True
        return condition != "no_language_sft" and (condition != "source_sft" or piece.language in sources)

    return digests(piece for piece in data if is_behind(piece))


def digests(data: Iterable[DataRead]) -> dict[str, str]:
    """Return digests of some data, and of what filters left of it, by name."""
    pieces = list(data)
    kept_rows = {f"{piece.name} kept": piece.kept for piece in pieces if piece.kept is not None}
    return {piece.name: piece.digest for piece in pieces} | kept_rows


def agree(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Return whether two mappings have equal values under every name that both hold."""
    return all(second.get(name, digest) == digest for name, digest in first.items())


def canonical(settings: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal settings."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)


def varying(settings: Sequence[Mapping[str, Any]]) -> list[Settings]:
    """Return, of each group of settings, those that differ between the groups, under the shortest names.

    ``lang.rank`` and ``task.rank`` that agree are ``rank``. Knobs stand in the order rank, residual, density, k, then
    by name.
    """
    keys = {key for group in settings for key in group}
    differing = {key for key in keys if len({canonical({"": group.get(key)}) for group in settings}) > 1}
    names: dict[str, str] = {}  # shown name -> key to read
    for key in differing:
        prefix, _, rest = key.partition(".")
        if prefix == "source" and all(_follows(group, rest) for group in settings):
            continue  # φ_S is as the language SFTs are
        twin = {"lang": f"task.{rest}", "task": f"lang.{rest}"}.get(prefix)
        agree = twin in differing and all(group.get(key) == group.get(twin) for group in settings)
        names[rest if agree else key] = key
    implied = [name for name, key in names.items() if _implied(name, [group.get(key) for group in settings], names)]
    if "source.enabled" in names:  # it already says where the others do not apply
        implied += [name for name, key in names.items() if _is_one(name, [group.get(key) for group in settings])]
    names = {name: key for name, key in names.items() if name not in implied}
    if _count(settings, set(names.values()) - {"method"}) == _count(settings, names.values()):
        names.pop("method", None)  # the other knobs tell them apart
    ordered = sorted(names, key=lambda name: (_order_of(name), name))
    return [{name: group.get(names[name]) for name in ordered} for group in settings]


def _follows(group: Mapping[str, Any], name: str) -> bool:
    """Return whether φ_S has a knob from the language SFTs of its column."""
    return group.get("source.shared") is False and group.get(f"source.{name}") == group.get(f"lang.{name}")


def _is_one(name: str, values: Sequence[Any]) -> bool:
    """Return whether a knob of φ_S has one value wherever there is a φ_S."""
    distinct = ordered_values(value for value in values if value is not None)
    return name.startswith("source.") and name != "source.enabled" and len(distinct) == 1


def _count(settings: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> int:
    """Count the distinct groups of values under some keys."""
    return len({canonical({key: values.get(key) for key in sorted(keys)}) for values in settings})


def _implied(name: str, values: Sequence[Any], names: Mapping[str, str]) -> bool:
    """Return whether a knob of the denoising has one value, besides null where ``rank=none`` turns denoising off."""
    prefix, _, last = name.rpartition(".")
    rank = {f"{prefix}.rank" if prefix else "rank", "rank"}
    return (
        last in DENOISING
        and last != "rank"
        and bool(rank & set(names))
        and len(ordered_values(values)) <= 2
        and (None in values)
    )


def _order_of(name: str) -> int:
    last = name.rpartition(".")[2]
    return LABELLED.index(last) if last in LABELLED else len(LABELLED)


def knob_text(name: str, value: Any) -> str:
    """Return a knob with its value (``rank=16``), or an empty text for null where labels have no word for it."""
    if value is None and not _none(name):
        return ""
    return f"{name}={shown_value(value, name)}"


def shown_value(value: Any, name: str = "") -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return _none(name) or "null"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown_value(element) for element in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _none(name: str) -> str:
    """Return the word that labels use where a knob is null."""
    return _SFT.get(name.rpartition(".")[2], Knob()).none


def number(value: Any) -> float | None:
    """Return a knob's value as a number (``"16"``), or None if it is not a finite one (``"energy:0.9"``)."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return None
    return as_float if math.isfinite(as_float) else None


def sort_key(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts numbers by size, then words by alphabet, and null last."""
    as_number = number(value)
    if as_number is not None:
        return (0, as_number, "")
    if value is None:
        return (2, 0.0, "")
    return (1, 0.0, shown_value(value))


def ordered_values(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values in the order of :func:`sort_key`."""
    by_text = {canonical({"": value}): value for value in values}
    return sorted(by_text.values(), key=sort_key)
