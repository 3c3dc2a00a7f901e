"""Settings of a search over knobs: the space, the objective, and every value that has to be valid before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deftx.knobs import SEED, at_least, knob, one_of

OBJECTIVES = {
    "source_validation": ("task", "maximize"),
    "target_mlm_loss": ("language", "minimize"),
}
"""Objective -> whose SFTs are judged, and which way is better."""


@dataclass
class SearchSettings:
    """What is searched for.

    Attributes:
        space: Knob -> its values as a list, or ``{low, high, log, step}`` of a range.
        objective: A key of :data:`OBJECTIVES`.
        trials: How many.
        sampler_seed: Decides what Optuna proposes.
    """

    space: dict[str, Any] = knob({})
    objective: str = knob("source_validation", one_of(*OBJECTIVES))
    trials: int = knob(20, at_least(1))
    sampler_seed: int = knob(0, SEED)

    def conditions(self) -> list[str]:
        """What is wrong with the space."""
        messages = []
        for name, values in self.space.items():
            if isinstance(values, Mapping):
                messages += _range_problems(name, values)
            elif not isinstance(values, list | tuple) or not values:
                messages.append(f"space.{name}={values!r}: give a list of values or {{low, high}}")
        return messages

    def examples(self) -> list[list[str]]:
        """Overrides that reach every value and every end of a range once, to be validated before the first trial."""
        choices = {name: _ends(values) for name, values in self.space.items()}
        longest = max((len(values) for values in choices.values()), default=0)
        return [
            [override(name, values[min(position, len(values) - 1)]) for name, values in choices.items()]
            for position in range(longest)
        ]


def _range_problems(name: str, values: Mapping[str, Any]) -> list[str]:
    unknown = set(values) - {"low", "high", "log", "step"}
    low, high = values.get("low"), values.get("high")
    if unknown:
        return [f"space.{name}: unknown {', '.join(sorted(unknown))}; a range has low, high, log, step"]
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
        return [f"space.{name}: low={low!r}, high={high!r}: a range needs two numbers, low below high"]
    if values.get("log") and low <= 0:
        return [f"space.{name}: low={low}: a logarithmic range begins above 0"]
    step = values.get("step")
    if step is not None and (values.get("log") or not isinstance(step, int | float) or not 0 < step <= high - low):
        return [f"space.{name}: step={step!r}: between 0 and high - low, and not with log: true"]
    return []


def _ends(values: Any) -> list[Any]:
    return [values["low"], values["high"]] if isinstance(values, Mapping) else list(values)


def override(name: str, value: Any) -> str:
    """Return a knob and its value as an override."""
    if isinstance(value, str):
        return f"{name}='{value}'"
    return f"{name}={'null' if value is None else value}"


def knob_and_value(text: str) -> tuple[str, str]:
    """Return an override's knob and its value as it is written, without the backslashes of Hydra's grammar."""
    name, _, value = text.partition("=")
    return name, value.replace("\\", "")
