"""Settings of the methods' room: the knobs of a sparse fine-tuning, each declared once.

At the top of the configuration :class:`ShortKnobs` move language and task SFTs alike; ``lang.*`` and ``task.*``
override one kind, ``source.*`` are those of the source language's own SFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deftx.core.settings import VALUE_DTYPES
from deftx.knobs import at_least, between, declared, knob, labelled, one_of
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


DENOISING = tuple(declared(DenoiseKnobs))
"""Knobs that say how an SFT's change is denoised."""

LABELLED = labelled(SFTKnobs)
"""Knobs that tell SFTs apart in labels and names, in this order."""
