"""What a selection may look at, and the module that training starts from.

Results of earlier nodes are read on demand. One module is kept: the next phase of the same SFT starts from the module
that the last phase has rewound, so that a process loads each base once.

Shapes: M is the maskable parameters, a mapping from the base model's own names to float32 tensors of any shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

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
    """The :class:`deftx.methods.Evidence` of a node that selects.

    Args:
        objective: What the SFT is trained for.
        sft: Settings of the SFT.
        work: Workspace of the node that selects, with the results that it reads.

    Attributes:
        reports: Reports of the denoised matrices; empty before :meth:`denoised_change`, and without a rank.
    """

    def __init__(self, objective: Objective, sft: SFTSettings, work: Workspace) -> None:
        self._objective = objective
        self._sft = sft
        self._work = work
        self.reports: list[MatrixReport] = []

    def loaded(self) -> tuple[Encoder, str, list[str]]:
        """Return the module at the start of training, θ⁰'s fingerprint, drawn head tensors' names; do not train it."""
        with at_start(self._objective, self._sft, self._work) as loaded:
            return loaded

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return names and shapes of M, from the base's own folder."""
        from deftx.training.shapes import shapes_of

        return shapes_of(self._objective.base.found_in(self._work), kind=self._objective.kind)

    def random(self) -> Mapping[str, Tensor]:
        """Return scores drawn from [0, 1) over M, float32."""
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
        return {name: parameter.detach() for name, parameter in self.loaded()[0].maskable.items()}

    def full(self) -> dict[str, Tensor]:
        """θ¹ over M by name, and its head under ``head.<name>``; float32."""
        from safetensors.torch import load_file

        return dict(load_file(self._work.inputs["full"].file(FULL)))

    def change(self) -> dict[str, Tensor]:
        """Δ = θ¹ − θ⁰ over M, float32."""
        from deftx.training.callback import change_of

        return change_of(self.full(), self.loaded()[0])

    def denoised_change(self) -> Mapping[str, Tensor]:
        """Δ̂ over M; without a rank Δ itself."""
        from safetensors.torch import load_file

        from deftx.core.denoise import unpack_decompositions

        if self._sft.rank is None or self._sft.residual is None:
            return self.change()
        decompositions = unpack_decompositions(load_file(self._work.inputs["decompose"].file(DECOMPOSITIONS)))
        callback = self._sft.callback()
        denoised = callback.denoised(self.change(), decompositions=decompositions)
        self.reports = callback.reports
        return denoised


@contextlib.contextmanager
def at_start(objective: Objective, sft: SFTSettings, work: Workspace) -> Iterator[tuple[Encoder, str, list[str]]]:
    """Give the module at the start of training: the last phase's rewound module, or a newly loaded one.

    The caller rewinds a module that it trains before the block ends. After an error the module is not used again.

    Yields:
        The module on (θ⁰ or θ⁰ + φ_S, h⁰); θ⁰'s fingerprint; names of head tensors that were drawn.
    """
    inputs = {name: work.inputs[name].digest for name in objective.start}
    key = (objective.key_settings(), objective.base.content, inputs, objective.study.seed, sft.training)
    kept_key, loaded = _KEPT.pop() if _KEPT else (None, None)
    if loaded is None or kept_key != key:
        loaded = None  # let go of one model before another is loaded
        loaded = objective.load(sft, work)
    yield loaded
    loaded[0].trainer = None  # which holds the optimizer's state
    _KEPT.append((key, loaded))


def forget_module() -> None:
    """Free the module that is kept for the next phase."""
    _KEPT.clear()


_KEPT: list[tuple[Any, tuple[Encoder, str, list[str]]]] = []
"""The module of the last phase and what it is a start of; empty while it is in use."""
