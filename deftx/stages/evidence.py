"""What a selection may look at, read from the results of earlier nodes when it is asked for.

Shapes: M is the maskable parameters, a mapping from the base model's own names to float32 tensors of any shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from deftx.cache import Workspace
from deftx.stages.node import stage_seed
from deftx.stages.objectives import Objective
from deftx.stages.settings import SFTSettings

if TYPE_CHECKING:
    from torch import Tensor

    from deftx.core.denoise import MatrixReport
    from deftx.training.modules import Encoder

FULL = "full.safetensors"
DECOMPOSITIONS = "decompositions.safetensors"


class StageEvidence:
    """What a selection looks at: a :class:`deftx.methods.Evidence`.

    Args:
        objective: What the SFT is trained for.
        sft: How.
        work: Of the node that selects, with the results that it reads.

    Attributes:
        reports: Of each matrix that was denoised; empty before :meth:`denoised_change`, and without a rank.
    """

    def __init__(self, objective: Objective, sft: SFTSettings, work: Workspace) -> None:
        self._objective = objective
        self._sft = sft
        self._work = work
        self.reports: list[MatrixReport] = []

    @cached_property
    def loaded(self) -> tuple[Encoder, str, list[str]]:
        """The module at the start of training, θ⁰'s fingerprint, names of drawn head tensors."""
        return self._objective.load(self._sft, self._work)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of M, of the base that is there."""
        from deftx.training.shapes import shapes_of

        return shapes_of(self._objective.base.found_in(self._work), kind=self._objective.kind)

    def random(self) -> Mapping[str, Tensor]:
        """Scores on [0, 1) over M."""
        from deftx.core.selection import random_scores

        objective = self._objective
        seed = stage_seed(objective.study.seed, f"mask {objective.kind}", objective.language)
        return random_scores(self.shapes(), seed)

    def base(self) -> dict[str, Tensor]:
        """θ⁰ over M, float32."""
        from deftx.training.encoder import maskable_parameters

        model, _ = self._objective.model(self._work)
        return {name: parameter.detach() for name, parameter in maskable_parameters(model).items()}

    def start(self) -> dict[str, Tensor]:
        """θ⁰, or θ⁰ + φ_S, over M; float32."""
        return {name: parameter.detach() for name, parameter in self.loaded[0].maskable.items()}

    def full(self) -> dict[str, Tensor]:
        """θ¹ over M by name, and its head under ``head.<name>``; float32."""
        from safetensors.torch import load_file

        return dict(load_file(self._work.inputs["full"].file(FULL)))

    def change(self) -> dict[str, Tensor]:
        """Δ = θ¹ − θ⁰ over M, float32."""
        from deftx.training.callback import change_of

        return change_of(self.full(), self.loaded[0])

    def denoised_change(self) -> Mapping[str, Tensor]:
        """Δ̂ over M; without a rank Δ itself."""
        from safetensors.torch import load_file

        from deftx.core.denoise import denoise, unpack_decompositions

        sft = self._sft
        if sft.rank is None or sft.residual is None:
            return self.change()
        known = unpack_decompositions(load_file(self._work.inputs["decompose"].file(DECOMPOSITIONS)))
        denoised, self.reports = denoise(
            self.change(), sft.rank, sft.residual, exclude=sft.exclude, decompositions=known
        )
        return denoised
