"""What stands between methods and evaluation: something learnt that is put on a classifier and taken off again.

Evaluation knows no method. It asks a classifier to wear some adaptations; those that it wears already stay on, so that
from one cell to the next only what differs is touched. Taking everything off restores the classifier bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deftx.errors import DeftxError

if TYPE_CHECKING:
    from torch import Tensor

    from deftx.core.composition import Composition
    from deftx.core.delta import SparseDelta


class Adaptation(Protocol):
    """Something learnt.

    Attributes:
        key: Equal for two adaptations that do the same.
    """

    key: str

    def put_on(self, role: str, classifier: AdaptedClassifier) -> None:
        """Change the classifier; one of role ``task`` brings its head."""

    def take_off(self, role: str, classifier: AdaptedClassifier) -> None:
        """Restore the bits that :meth:`put_on` changed, in the composition of what else is on."""


class AdaptedClassifier:
    """A classifier on a base, and the adaptations it wears.

    Args:
        model: From :func:`deftx.training.encoder.load_classifier`, on the device where it shall compute.

    Attributes:
        model: The transformers model.
        composition: Holds the base's parameters at θ⁰ + Σ φ.
        worn: Adaptations by role.
    """

    def __init__(self, model: Any) -> None:
        from deftx.core.composition import Composition
        from deftx.training.encoder import base_fingerprint_of, base_parameters, head_parameters

        self.model = model
        parameters = {name: parameter.data for name, parameter in base_parameters(model).items()}
        self.composition: Composition = Composition(parameters, base_fingerprint=base_fingerprint_of(model))
        self.worn: dict[str, Adaptation] = {}
        self._head = {name: parameter.data for name, parameter in head_parameters(model).items()}
        self._drawn = {name: tensor.clone() for name, tensor in self._head.items()}

    def wear(self, adaptations: Mapping[str, Adaptation]) -> None:
        """Take off what is not wanted, then put on what is not there yet.

        Args:
            adaptations: Adaptations by role: ``task``, ``language``.

        Raises:
            DeftxError: One does not fit this base or this task.
        """
        for role, adaptation in list(self.worn.items()):
            if role not in adaptations or adaptations[role].key != adaptation.key:
                adaptation.take_off(role, self)
                del self.worn[role]
        for role, adaptation in adaptations.items():
            if role not in self.worn:
                adaptation.put_on(role, self)
                self.worn[role] = adaptation

    def set_head(self, tensors: Mapping[str, Tensor] | None, source: object = "") -> None:
        """Copy a trained head into the classifier; None restores the one it was made with.

        Raises:
            DeftxError: A head tensor is missing, too many, or of another shape.
        """
        tensors = self._drawn if tensors is None else tensors
        head = self._head
        if set(head) != set(tensors) or any(head[name].shape != tensors[name].shape for name in head):
            raise DeftxError(
                f"the head of {source} does not fit this model and task\nit has: {_shapes(tensors)}\n"
                f"needed: {_shapes(head)}\nnext: give the SFT of this task, trained on this base"
            )
        for name, tensor in head.items():
            tensor.copy_(tensors[name])


class SparseAdaptation:
    """A sparse fine-tuning in a folder, read when it is put on.

    Args:
        key: Of the SFT.
        folder: Holds ``sft.safetensors`` and ``sft.json``.
    """

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.folder = folder

    def put_on(self, role: str, classifier: AdaptedClassifier) -> None:
        """Add φ to the composition; φ_T sets the head, too."""
        from deftx.core.delta import SparseDelta

        delta: SparseDelta = SparseDelta.load(self.folder)
        classifier.composition.add(role, delta)
        if role == "task":
            try:
                classifier.set_head(delta.head, self.folder)
            except DeftxError:
                classifier.composition.remove(role)
                raise

    def take_off(self, role: str, classifier: AdaptedClassifier) -> None:
        """Remove φ from the composition; without φ_T the head is the one the classifier was made with."""
        classifier.composition.remove(role)
        if role == "task":
            classifier.set_head(None)


COMPOSITIONS: dict[str, Callable[[str, Path], Adaptation]] = {"sum": SparseAdaptation}
"""How SFTs are put on a base, from key and folder: ``sum`` adds them."""


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"
