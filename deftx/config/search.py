"""Settings of a search over knobs: the space, the objective, and every value that has to be valid before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deftx.errors import did_you_mean

OBJECTIVES = {
    "source_validation": ("task", "maximize"),
    "target_mlm_loss": ("language", "minimize"),
}
"""Objective -> whose SFTs are judged, and which way is better."""
# fmt: off
FIXED = (
    "language", "seed", "split", "study", "logger", "launcher", "paths",
    "only", "controls", "compare", "search", "missing_text", "data", "synthetic",
    "trainer", "model", "ablate", "experiment", "corpus", "hydra",
)
# fmt: on
"""What a search must not choose: the question it is asked, where things lie, and how it runs."""


@dataclass
class SearchSettings:
    """What is searched for.

    Attributes:
        space: Knob -> its values as a list, or ``{low, high, log, step}`` of a range.
        objective: A key of :data:`OBJECTIVES`.
        trials: How many.
        sampler_seed: Decides what Optuna proposes.
    """

    space: dict[str, Any] = field(default_factory=dict)
    objective: str = "source_validation"
    trials: int = 20
    sampler_seed: int = 0

    def problems(self) -> list[str]:
        """One sentence for each value that cannot work."""
        found = []
        if self.objective not in OBJECTIVES:
            hint = did_you_mean(self.objective, OBJECTIVES)
            found.append(f"search.objective={self.objective!r}{hint}; available: {', '.join(OBJECTIVES)}")
        if self.trials < 1:
            found.append(f"search.trials={self.trials}: at least 1")
        if not 0 <= self.sampler_seed < 2**32:
            found.append(f"search.sampler_seed={self.sampler_seed}: must lie in [0, 2**32)")
        for knob, values in self.space.items():
            if knob == "task" or knob.split(".")[0] in FIXED:
                found.append(f"search.space.{knob}: it says what is studied or how it runs: no knob of the method")
            if isinstance(values, Mapping):
                found += _range_problems(knob, values)
            elif not isinstance(values, list | tuple) or not values:
                found.append(f"search.space.{knob}={values!r}: give a list of values or {{low, high}}")
        return found

    def examples(self) -> list[list[str]]:
        """Overrides that reach every value and every end of a range once, to be validated before the first trial."""
        choices = {knob: _ends(values) for knob, values in self.space.items()}
        longest = max((len(values) for values in choices.values()), default=0)
        return [
            [override(knob, values[min(place, len(values) - 1)]) for knob, values in choices.items()]
            for place in range(longest)
        ]


def _range_problems(knob: str, values: Mapping[str, Any]) -> list[str]:
    unknown = set(values) - {"low", "high", "log", "step"}
    low, high = values.get("low"), values.get("high")
    if unknown:
        return [f"search.space.{knob}: unknown {', '.join(sorted(unknown))}; a range has low, high, log, step"]
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
        return [f"search.space.{knob}: low={low!r}, high={high!r}: a range needs two numbers, low below high"]
    if values.get("log") and low <= 0:
        return [f"search.space.{knob}: low={low}: a logarithmic range begins above 0"]
    step = values.get("step")
    if step is not None and (values.get("log") or not isinstance(step, int | float) or not 0 < step <= high - low):
        return [f"search.space.{knob}: step={step!r}: between 0 and high - low, and not with log: true"]
    return []


def _ends(values: Any) -> list[Any]:
    return [values["low"], values["high"]] if isinstance(values, Mapping) else list(values)


def override(knob: str, value: Any) -> str:
    """A knob and its value as an override."""
    if isinstance(value, str):
        return f"{knob}='{value}'"
    return f"{knob}={'null' if value is None else value}"
