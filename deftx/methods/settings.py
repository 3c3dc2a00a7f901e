"""Settings of the methods' room: the knobs of a sparse fine-tuning, each declared once.

At the top of the configuration :class:`ShortKnobs` move language and task SFTs alike; ``lang.*`` and ``task.*``
override one kind, ``source.*`` are those of the source language's own SFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deftx.core.settings import MERGE_OPTIONS, MERGE_RANGES, VALUE_DTYPES
from deftx.knobs import FINITE, SEED, at_least, between, declared, knob, labelled, one_of
from deftx.methods.table import UNDENOISED
from deftx.training.settings import TrainingSettings


@dataclass
class PolicyKnobs:
    """How much of an SFT's change counts as signal.

    Attributes:
        rank: How many directions of each matrix are kept: a :class:`~deftx.core.settings.RankPolicy`, or its text.
        residual: What is kept of the rest: a :class:`~deftx.core.settings.ResidualPolicy`, or its text.
    """

    rank: Any = knob("energy:0.9", label=1, none="none", ignored_by=UNDENOISED)
    residual: Any = knob("prune:0.05", label=2, none="", ignored_by=UNDENOISED)


@dataclass
class DenoiseKnobs(PolicyKnobs):
    """How an SFT's change is denoised.

    Attributes:
        exclude: ``fnmatch`` patterns of parameters that are left alone.
    """

    exclude: list[str] = knob([], ignored_by=UNDENOISED)


@dataclass
class SizeKnobs:
    """How many coordinates an SFT may change: one of the two, or null to follow another setting.

    Attributes:
        k: Their number K.
        density: The same as a share of the maskable parameters.
    """

    k: int | None = knob(None, at_least(1), label=4, none="")
    density: float | None = knob(None, between(0, 1, "(]"), label=3, none="")

    def conditions(self) -> list[str]:
        """What values must have in common."""
        if self.k is None or self.density is None:
            return []
        return [f"k={self.k} and density={self.density}: give one of the two, the other null"]


@dataclass
class ShortKnobs(SizeKnobs, PolicyKnobs):
    """Knobs of an SFT that have short names at the top.

    Attributes:
        value_dtype: Dtype of the values in the SFT's file; the result is the SFT as it is read back.
        mask: ``magnitude`` (what its method scores highest) or ``random`` (drawn evenly, for ablations).
        second_phase: Whether the selected coordinates train again from the start; without it φ is Δ̂ on the mask.
    """

    value_dtype: str = knob("float32", one_of(*VALUE_DTYPES), since=2)
    mask: str = knob("magnitude", one_of("magnitude", "random"), since=2)
    second_phase: bool = knob(True, since=2)


@dataclass
class SFTKnobs(ShortKnobs, DenoiseKnobs):
    """All knobs of one kind of SFT.

    Attributes:
        training: Budget and optimisation of both phases.
    """

    training: TrainingSettings = knob(TrainingSettings)


@dataclass
class ComposeSettings:
    """How φ_T and φ_L are put on a base together, and what takes φ_L's place.

    Attributes:
        rule: A key of :data:`deftx.core.merging.RULES`. With ``sum`` and weights of 1 the SFTs are added as they are.
        task: λ_T, the weight of φ_T.
        language: λ_L, the weight of φ_L.
        task_layers: λ_T for parts of the model, in place of ``task`` there, such as ``{embeddings: 0.5}``.
        language_layers: The same for φ_L.
        density: Of ``ties``: the share of all parameters that each SFT keeps.
        elect: Of ``ties``: ``mass`` (the sign of the weighted sum) or ``count`` (of the majority).
        drop: Of ``dare``: the share of entries that are dropped.
        rank: Of ``tsv`` (of each SFT's matrix) and ``denoised_sum`` (of the sum's): a rank policy.
        average: Seeds whose φ_L are averaged, in place of the φ_L of the run's seed.
        proxy: Targets without text of their own, and whose φ_L stand in: ``{nij: {ban: 0.5, jav: 0.5}}``, or
            ``{nij: family}`` for the other targets of its language family in equal parts.
    """

    rule: str = knob("sum", one_of(*MERGE_OPTIONS), since=4, label=5)
    task: float = knob(1.0, FINITE, since=4)
    language: float = knob(1.0, FINITE, since=4)
    task_layers: dict[str, float] = knob({}, since=4)
    language_layers: dict[str, float] = knob({}, since=4)
    density: float = knob(0.2, MERGE_RANGES["density"], since=4)
    elect: str = knob("mass", MERGE_RANGES["elect"], since=4)
    drop: float = knob(0.5, MERGE_RANGES["drop"], since=4)
    rank: Any = knob("fraction:0.5", since=4)
    average: list[int] = knob([], SEED, since=4)
    proxy: dict[str, Any] = knob({}, since=4)

    @property
    def plain(self) -> bool:
        """Whether SFTs are added as they are."""
        layers = (*self.task_layers.values(), *self.language_layers.values())
        return self.rule == "sum" and {self.task, self.language, *layers} == {1.0}

    def options(self) -> dict[str, Any]:
        """Return what the rule reads of the settings, beside the weights."""
        return {name: getattr(self, name) for name in MERGE_OPTIONS[self.rule]}

    def conditions(self) -> list[str]:
        """What values must have in common."""
        messages = [
            f"{name}={getattr(self, name)}: rule={self.rule} does not read it; it is one of rule={' and '.join(rules)}"
            for name, rules in _rules_by_option().items()
            if self.rule not in rules
            and self.rule in MERGE_OPTIONS
            and getattr(self, name) != declared(self)[name].default
        ]
        for scope in ("task_layers", "language_layers"):
            for part, weight in getattr(self, scope).items():
                if not FINITE.holds(weight):
                    messages.append(f"{scope}.{part}={weight}: {FINITE.sentence}")
        if len(set(self.average)) < len(self.average):
            messages.append(f"average={self.average}: a seed is named twice")
        for code, weights in self.proxy.items():
            given = weights.values() if isinstance(weights, Mapping) else ()
            if weights != "family" and (
                not given or not all(isinstance(w, int | float) and FINITE.holds(w) for w in given)
            ):
                messages.append(
                    f"proxy.{code}={weights}: write compose.proxy.{code}=family, or a weight for each relative, as in "
                    f"compose.proxy.{code}.ban=0.5"
                )
        return messages


def _rules_by_option() -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for rule, options in MERGE_OPTIONS.items():
        for option in options:
            rules.setdefault(option, []).append(rule)
    return rules


DENOISING = tuple(declared(DenoiseKnobs))
"""Knobs that say how an SFT's change is denoised."""

LABELLED = labelled(SFTKnobs)
"""Knobs that tell SFTs apart in labels and names, in this order."""
