"""Knobs: fields of settings dataclasses, each declared once with all that others have to know of it.

A room declares its settings in its ``settings`` module, field by field with :func:`knob`: default, range, since when
results say it, what ignores it, how tables name it. All else reads those declarations: checks (:func:`problems`), keys
(:func:`read_settings`), what ``result.json`` shows (:func:`values`), and the table of all knobs by full name
(:func:`table`, :data:`deftx.settings.KNOBS`). One more knob is one more field, and the code that uses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Set
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from deftx.errors import DeftxError, did_you_mean

_KNOB = "knob"

# ------------------------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """The values that a knob may take; of a list each item.

    Attributes:
        sentence: What a value must be, to follow ``name=value:``.
        holds: Whether a value lies in it; NaN lies in none.
        options: Words to guess from where one is misspelt.
    """

    sentence: str
    holds: Callable[[Any], bool]
    options: tuple[str, ...] = ()

    def problem(self, name: str, value: Any) -> str | None:
        """Return one sentence where a value lies outside; null is no value."""
        wrong = [item for item in (value if isinstance(value, list | tuple) else [value]) if item is not None]
        wrong = [item for item in wrong if not self.holds(item)]
        return f"{name}={value!r}: {self.sentence}{did_you_mean(str(wrong[0]), self.options)}" if wrong else None


def at_least(least: float, more: str = "") -> Range:
    """No less than a number; ``more`` ends the sentence, such as ``, or null for each epoch``."""
    return Range(f"must be at least {least}{more}", lambda value: value >= least)


def above(limit: float) -> Range:
    """More than a number."""
    return Range(f"must be more than {limit}", lambda value: value > limit)


def between(low: float, high: float, ends: str = "()") -> Range:
    """Between two numbers; ``ends`` says which of them belong to it: ``()``, ``[)``, ``(]`` or ``[]``."""
    where = f"between {low} and {high}" if ends == "()" else f"in {ends[0]}{low}, {high}{ends[1]}"

    def holds(value: float) -> bool:
        return (low < value or (low == value and ends[0] == "[")) and (
            value < high or (value == high and ends[1] == "]")
        )

    return Range(f"must lie {where}", holds)


def one_of(*options: str) -> Range:
    """Return one of a few words."""
    listed = " or ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    return Range(f"must be {listed}", lambda value: value in options, options)


def matching(pattern: str, sentence: str) -> Range:
    """Return text that a regular expression matches in whole."""
    return Range(sentence, lambda value: re.fullmatch(pattern, value) is not None)


FINITE = Range("must be a finite number", lambda value: math.isfinite(value))

SEED = Range("must lie in [0, 2**32)", lambda value: 0 <= value < 2**32)
"""What seeds of every library may be."""


# -------------------------------------------------------------------------------------------------- declarations


@dataclass(frozen=True)
class Knob:
    """What is known of a knob beside its name and type.

    Attributes:
        default: What it is where nothing sets it.
        range: What it may be.
        since: Schema of ``result.json`` from which on every result says it. Older results were computed with its
            default, and a key says a later knob only where it has another value: what was made before stays valid.
        ignored_by: Methods, phases, kinds of SFT and conditions that it does not change.
        read_by: Of a group: what reads it after all, though its fields say otherwise.
        label: Its place in labels of tables, from 1; 0: behind these, by name.
        none: How labels write null; empty: not at all.
        commands: Of a knob or group at the top: the commands that read it.
        fixed: Of one at the top: whether a search must leave it alone, because it says what is studied or how it runs.
        bookkeeping: Of one at the top: whether tables say it elsewhere, or it changes no score.
    """

    default: Any = None
    range: Range | None = None
    since: int = 1
    ignored_by: Set[str] = frozenset()
    read_by: Set[str] = frozenset()
    label: int = 0
    none: str = "null"
    commands: tuple[str, ...] = ("run", "sft")
    fixed: bool = False
    bookkeeping: bool = False


def knob(default: Any, allowed: Range | None = None, **facts: Any) -> Any:
    """Return a field of a settings dataclass, with the facts of :class:`Knob`.

    Args:
        default: A value (copied for each instance), or the dataclass of a group.
        allowed: Its range; a group's fields have their own.
        **facts: The other facts.
    """
    declared_facts = Knob(default, allowed, **facts)
    if isinstance(default, type):
        return field(default_factory=default, metadata={_KNOB: declared_facts})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata={_KNOB: declared_facts})
    return field(default=default, metadata={_KNOB: declared_facts})


def declared(settings: Any) -> dict[str, Knob]:
    """Return the knobs of a settings dataclass, or of an instance, by field; fields that are no knobs are left out."""
    return {item.name: item.metadata[_KNOB] for item in fields(settings) if _KNOB in item.metadata}


def labelled(settings: Any) -> tuple[str, ...]:
    """Knobs with a place in labels, in their order."""
    orders = {name: facts.label for name, facts in declared(settings).items() if facts.label}
    return tuple(sorted(orders, key=orders.__getitem__))


# ------------------------------------------------------------------------------------------------------ readings


def problems(settings: Any, prefix: str = "", *, follows: Any = None) -> list[str]:
    """Return one sentence for each value out of its range, and what the settings' own ``conditions()`` find.

    Args:
        settings: A settings dataclass; groups in it are not looked into.
        prefix: What names in messages begin with, such as ``corpus.``.
        follows: Other settings with fields of the same names; a field with the other's value is theirs to report.
    """
    messages = []
    for name, facts in declared(settings).items():
        value = getattr(settings, name)
        if facts.range is not None and (follows is None or value != getattr(follows, name, value)):
            messages.append(facts.range.problem(prefix + name, value))
    conditions = settings.conditions() if hasattr(settings, "conditions") else []
    return [text for text in messages if text is not None] + [prefix + text for text in conditions]


def refuse(settings: Any, prefix: str = "") -> None:
    """Raise one error that lists every problem of some settings; silent where there is none.

    Raises:
        DeftxError: A value is out of its range.
    """
    messages = problems(settings, prefix)
    if messages:
        raise DeftxError("\n".join(messages))


def read_settings(settings: Any, *readers: str) -> dict[str, Any]:
    """Return what of some settings enters a key: nothing that the readers ignore; later knobs only if they are set.

    Args:
        settings: A settings dataclass without groups.
        readers: Methods, phases and kinds of SFT, any of which may ignore a knob.
    """
    return {
        name: getattr(settings, name)
        for name, facts in declared(settings).items()
        if not facts.ignored_by & set(readers) and (facts.since == 1 or getattr(settings, name) != facts.default)
    }


def values(settings: Any, prefix: str = "", *readers: str) -> dict[str, Any]:
    """Return every knob of some settings by full name, groups opened; None where one of the readers ignores it."""
    result: dict[str, Any] = {}
    for name, facts in declared(settings).items():
        value = getattr(settings, name)
        if is_dataclass(value) and declared(value):
            result |= values(value, f"{prefix}{name}.", *readers)
        else:
            result[prefix + name] = None if facts.ignored_by & set(readers) else value
    return result


def table(settings: type, prefix: str = "", group: Knob | None = None) -> dict[str, Knob]:
    """Return every knob and every group of a settings dataclass by full name, such as ``lang.training.epochs``.

    What ignores a group ignores its knobs, and what reads a group whatever its fields say reads them.
    """
    knobs, hints, group = {}, get_type_hints(settings), group or Knob()
    for name, facts in declared(settings).items():
        read_by = facts.read_by | group.read_by
        facts = replace(facts, ignored_by=(facts.ignored_by | group.ignored_by) - read_by, read_by=read_by)
        knobs[prefix + name] = facts
        kinds = (hints[name], *get_args(hints[name])) if get_origin(hints[name]) is not dict else ()
        for kind in kinds:
            if is_dataclass(kind) and isinstance(kind, type):
                knobs |= table(kind, f"{prefix}{name}.", facts)
    return knobs
