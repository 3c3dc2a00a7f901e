"""What a user may choose about denoising and about the file, as text that fits on a command line.

``rank`` says how many singular directions of a weight change count as signal, ``residual`` what happens to
the rest (docs/method.md, step 2). Both are small frozen values whose text is canonical, ``parse(str(policy))
== policy``, so that the text itself can be a configuration value and part of a cache key. ``value_dtype``
says how a sparse fine-tuning's values are stored, ``MERGE_OPTIONS`` names the rules that merge several. Standard
library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deftx.errors import DeftxError, did_you_mean
from deftx.knobs import Range, between, one_of

RankKind = Literal["fixed", "fraction", "energy", "gavish_donoho", "none"]
DEFAULT_RESIDUAL = 0.05
VALUE_DTYPES = ("float32", "float16", "bfloat16")

MERGE_OPTIONS: dict[str, tuple[str, ...]] = {
    "sum": (),
    "ties": ("density", "elect"),
    "dare": ("drop",),
    "tsv": ("rank",),
    "denoised_sum": ("rank",),
}
"""Options of each rule of :mod:`deftx.core.merging` that a person sets, beside the weights."""

MERGE_RANGES: dict[str, Range] = {
    "density": between(0, 1, "(]"),
    "drop": between(0, 1, "[)"),
    "elect": one_of("mass", "count"),
}
"""What those options may be; ``rank`` is a :class:`RankPolicy`."""

_RANK_FORMS = "a whole number >= 1, fraction:F, energy:E (F and E in (0, 1]), gavish_donoho, none"
_RESIDUAL_FORMS = "prune, prune:P (P in [0, 1]), drop"


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: ``layer.0``, or the first word of its name."""
    match = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
    return f"layer.{match[1]}" if match else name.split(".")[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class RankPolicy:
    """How many singular directions of each matrix are kept as signal.

    Attributes:
        kind: ``fixed`` (``value`` = r >= 1, the same for all matrices), ``fraction`` (of min(m, n), in (0,
            1]), ``energy`` (the smallest r with at least this share of the sum of squared singular values,
            in (0, 1]), ``gavish_donoho`` (optimal hard threshold for unknown noise, no value) or ``none``
            (no denoising: LT-SFT).
        value: int for ``fixed``, float for ``fraction`` and ``energy``, otherwise None.

    Raises:
        DeftxError: the kind is unknown or the value lies outside its range.
    """

    kind: RankKind
    value: float | int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range, whichever way the policy was made."""
        if self.kind == "fixed":
            if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 1:
                raise DeftxError(
                    f"rank {self.value!r}: a fixed rank is a whole number of at least 1; "
                    f"rank=none switches denoising off (accepted: {_RANK_FORMS})"
                )
        elif self.kind in ("fraction", "energy"):
            numeric = isinstance(self.value, int | float) and not isinstance(self.value, bool)
            if not numeric or not 0 < self.value <= 1:  # type: ignore[operator]  # also refuses NaN
                raise DeftxError(
                    f"rank {self.kind}:{self.value}: {self.kind} must lie in (0, 1], as in {self.kind}:0.9"
                )
            object.__setattr__(self, "value", float(self.value))  # type: ignore[arg-type]
        elif self.kind in ("gavish_donoho", "none"):
            if self.value is not None:
                raise DeftxError(f"rank {self.kind}:{self.value}: {self.kind} takes no value")
        else:
            hint = did_you_mean(str(self.kind), ("fraction", "energy", "gavish_donoho", "none"))
            raise DeftxError(f"unknown rank policy {self.kind!r}{hint} (accepted: {_RANK_FORMS})")

    @classmethod
    def parse(cls, value: str | int | float | RankPolicy | None) -> RankPolicy:
        """Read a rank policy from a configuration value.

        Args:
            value: ``16``, ``"16"``, ``"fraction:0.25"``, ``"energy:0.9"``, ``"gavish_donoho"``, ``"none"``
                or None (= none).

        Raises:
            DeftxError: not one of these forms, or a value outside its range.
        """
        if isinstance(value, RankPolicy):
            return value
        if value is None:
            return cls("none")
        text = str(value).strip().lower()
        kind, colon, rest = text.partition(":")
        if kind in ("fraction", "energy"):
            share = _number(rest)
            if share is None:
                raise DeftxError(f"rank {text!r}: {kind} needs a number, as in {kind}:0.9 (accepted: {_RANK_FORMS})")
            return cls(kind, share)  # type: ignore[arg-type]  # mypy does not narrow str to a Literal
        if not colon and kind in ("gavish_donoho", "none"):
            return cls(kind)  # type: ignore[arg-type]
        number = _number(text)
        if number is not None and not isinstance(value, bool):
            if not number.is_integer():
                raise DeftxError(
                    f"rank {text}: a fixed rank is a whole number; a share is written fraction:{text} or energy:{text}"
                )
            return cls("fixed", int(number))
        hint = did_you_mean(kind, ("fraction", "energy", "gavish_donoho", "none"))
        raise DeftxError(f"unknown rank policy {text!r}{hint} (accepted: {_RANK_FORMS})")

    def __str__(self) -> str:
        """Canonical text: ``parse(str(policy)) == policy``."""
        if self.kind == "fixed":
            return str(self.value)
        return self.kind if self.value is None else f"{self.kind}:{self.value!r}"


@dataclass(frozen=True)
class ResidualPolicy:
    """What is added back of the residual R = Δ − L of each matrix.

    Attributes:
        keep: share of R's entries, those of largest magnitude, that are kept; 0 drops R (``drop``), 1 keeps
            all of it.

    Raises:
        DeftxError: ``keep`` lies outside [0, 1].
    """

    keep: float = DEFAULT_RESIDUAL

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1], whichever way the policy was made."""
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 <= self.keep <= 1:
            raise DeftxError(
                f"residual {self.keep!r}: the share of entries kept must lie in [0, 1] (accepted: {_RESIDUAL_FORMS})"
            )
        object.__setattr__(self, "keep", float(self.keep))

    @classmethod
    def parse(cls, value: str | float | ResidualPolicy) -> ResidualPolicy:
        """Read a residual policy: ``"prune:0.05"``, ``"prune"`` (0.05), ``"drop"`` (0) or the share itself.

        Raises:
            DeftxError: not one of these forms, or a share outside [0, 1].
        """
        if isinstance(value, ResidualPolicy):
            return value
        text = str(value).strip().lower()
        if text == "drop":
            return cls(0.0)
        if text == "prune":
            return cls(DEFAULT_RESIDUAL)
        share = None if isinstance(value, bool) else _number(text.removeprefix("prune:"))
        if share is None:
            hint = did_you_mean(text.partition(":")[0], ("prune", "drop"))
            raise DeftxError(f"unknown residual policy {text!r}{hint} (accepted: {_RESIDUAL_FORMS})")
        return cls(share)

    def __str__(self) -> str:
        """Canonical text: ``parse(str(policy)) == policy``."""
        return "drop" if self.keep == 0 else f"prune:{self.keep!r}"
