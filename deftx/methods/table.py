"""Sparse methods as a table: each is four choices.

What is *scored* decides which coordinates an SFT may change, the *budget* how many of them where, the *second phase*
what their values are, and *composition* how SFTs are put on a base. DeFT-X scores the denoised change Δ̂ of the full
phase (Simon & Jyothi 2025), LT-SFT the change Δ itself (Ansell et al. 2022). A further method is one entry of
:data:`METHODS`, with one of :data:`SCORED` where it scores something new, and one file in ``conf/method``.

Light, and on the ground: configuration, results and reports read it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

Tensors = Mapping[str, Any]
"""Tensors by name over M, float32; the ground does not know torch."""


class Evidence(Protocol):
    """What a selection may look at; each is loaded when it is asked for."""

    def random(self) -> Tensors:
        """Independent scores on [0, 1), drawn from the run's seed."""

    def base(self) -> Tensors:
        """θ⁰."""

    def start(self) -> Tensors:
        """Return what training starts from: θ⁰, or θ⁰ + φ_S."""

    def change(self) -> Tensors:
        """Δ: what the full phase changed."""

    def denoised_change(self) -> Tensors:
        """Δ̂: what denoising keeps of Δ."""


@dataclass(frozen=True)
class Scored:
    """A tensor whose largest magnitudes are selected.

    Attributes:
        scores: Gives the tensors.
        reads: What it looks at: ``base``, ``start``, and the results ``full`` and ``decompose``. It is given no more.
        drawn: Whether it draws from the run's seed.
        undenoised: Of one that denoises: what the same is without, a key of :data:`SCORED`.
    """

    scores: Callable[[Evidence], Tensors]
    reads: tuple[str, ...] = ()
    drawn: bool = False
    undenoised: str = ""


SCORED: dict[str, Scored] = {
    "denoised_change": Scored(lambda it: it.denoised_change(), ("full", "decompose"), undenoised="change"),
    "change": Scored(lambda it: it.change(), ("full",)),
    "random": Scored(lambda it: it.random(), drawn=True),
}
"""What can be scored."""

SECOND_PHASES: dict[str, tuple[str, ...]] = {"sparse": (), "direct": ("full", "decompose")}
"""Where the values come from, and what that reads: ``sparse`` trains the selected coordinates again from the start,
``direct`` takes Δ̂ (without denoising Δ) on the mask as it is."""


@dataclass(frozen=True)
class SparseMethod:
    """One method.

    Attributes:
        title: What tables call it.
        scored: A key of :data:`SCORED`.
        denoised: Whether ``rank``, ``residual`` and ``exclude`` apply where it reads the full phase's change.
        budget: A key of :data:`deftx.methods.sparse.BUDGETS`.
        second_phase: A key of :data:`SECOND_PHASES`; ``second_phase=false`` makes it ``direct``.
        composition: A key of :data:`deftx.methods.adaptation.COMPOSITIONS`.
    """

    title: str
    scored: str
    denoised: bool = True
    budget: str = "global"
    second_phase: str = "sparse"
    composition: str = "sum"

    def chooses(self, other: SparseMethod) -> bool:
        """Return whether it makes the choices of another; its name and what it ignores are none."""
        return replace(self, title=other.title, denoised=other.denoised) == other


METHODS: dict[str, SparseMethod] = {
    "deftx": SparseMethod("DeFT-X", "denoised_change"),
    "ltsft": SparseMethod("LT-SFT", "change", denoised=False),
    "random_mask": SparseMethod("random mask", "random"),
}
"""The methods that a study can train, by the name that ``method=`` and ``compare=`` take. In tables, the first one's
column is the last."""

WITHOUT_LANGUAGE_SFT = {f"{name}_without_language_sft": name for name in METHODS}
"""Conditions of targets that have no language SFT: φ_T of a method, alone. They are not that method, and no part of its
mean."""

BY_PROXY = {f"{name}_by_proxy": name for name in METHODS}
"""Conditions of targets for which other languages' φ_L of a method stand in. No part of that method's mean, either."""

UNDENOISED = frozenset(name for name, method in METHODS.items() if not method.denoised)
"""Methods that ignore the knobs of denoising."""
