"""Keys of stages: the sha256 of canonical JSON over what changes a result."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deftx.errors import DeftxError

__all__ = ["RESERVED", "Stage", "canonical_json", "loose"]

RESERVED = frozenset({"scratch", "damaged", "locks"})
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,40}")


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a plain value: sorted keys, no whitespace, ASCII, floats by ``repr``.

    Integers and floats are distinct (``1`` and ``1.0`` give different texts, hence different keys), so are
    ``True`` and ``1``; tuples count as lists.

    Raises:
        DeftxError: a float is NaN or infinite (a user can type one).
        TypeError: a value is not plain JSON, such as a path or an object; the text says where it stands.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DeftxError(f"{where} is {float(value)!r}: a setting must be a finite number")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: only strings can be keys")
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    hint = "; give the fingerprint of what lies there" if isinstance(value, os.PathLike) else ""
    raise TypeError(f"{where} is a {type(value).__name__}, which has no place in a stage key{hint}")


def loose(value: Any) -> Any:
    """Make any value JSON: what a computation notes must not be able to spoil its result."""
    if isinstance(value, Mapping):
        return {str(key): loose(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [loose(item) for item in value]
    try:
        return _plain(value, "value")
    except (DeftxError, TypeError):
        return str(value)


@dataclass(frozen=True, eq=False)
class Stage:
    """What a stage computes, as plain values; two stages are equal when their keys are.

    Args:
        kind: lower-case name of the stage and of its folder in the cache, such as ``full`` or ``sparse``.
        version: number of the stage's code; raise it when the same settings would give another result.
        settings: the settings that change the result, plain JSON values; copied.
        inputs: name -> key of another stage, or fingerprint of data.
        seed: the run's seed where the stage draws from it.
        label: for people (logs, listings); not in the key.
        product: names of the files, or of folders with a slash behind, that are its result; empty for all of them. What
            else it writes (how long training took) may differ from one computation to the next. Not in the key.

    Raises:
        DeftxError: a setting is NaN or infinite.
        TypeError: a setting is not plain JSON.
        ValueError: ``kind`` cannot name a folder.
    """

    kind: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    label: str = ""
    product: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind) or self.kind in RESERVED:
            raise ValueError(f"{self.kind!r} cannot name a stage: use a-z, 0-9, - and _, not {sorted(RESERVED)}")
        object.__setattr__(self, "settings", _plain(self.settings, "settings"))
        object.__setattr__(self, "inputs", _plain(self.inputs, "inputs"))
        for name, value in self.inputs.items():
            if not isinstance(value, str):
                raise TypeError(f"inputs.{name} is a {type(value).__name__}: give a key or a fingerprint")

    @functools.cached_property
    def key(self) -> str:
        """64 hexadecimal digits that change when, and only when, something changes the result."""
        parts = {name: getattr(self, name) for name in ("kind", "version", "settings", "inputs", "seed")}
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return f"{self.kind} {self.label} [{self.key[:8]}]" if self.label else f"{self.kind} [{self.key[:8]}]"
