"""What stands between methods and evaluation: something learnt that is put on a classifier and taken off again.

Evaluation knows no method. It asks a classifier to wear some adaptations; those that it wears already stay on, so that
from one cell to the next only what differs is touched. Taking everything off restores the classifier bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deftx.errors import DeftxError

if TYPE_CHECKING:
    from torch import Tensor

    from deftx.core.composition import Composition
    from deftx.core.delta import SparseDelta
    from deftx.methods.settings import ComposeSettings


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

    @property
    def size(self) -> int:
        """Parameters of the base."""
        return sum(parameter.numel() for parameter in self.composition.parameters.values())


class SparseAdaptation:
    """A sparse fine-tuning in a folder, read when it is put on.

    Args:
        key: Of the SFT.
        folder: Holds ``sft.safetensors`` and ``sft.json``.
    """

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.folder = folder

    def change(self) -> SparseDelta:
        """Return what it changes."""
        from deftx.core.delta import SparseDelta

        delta: SparseDelta = SparseDelta.load(self.folder)
        return delta

    def put_on(self, role: str, classifier: AdaptedClassifier) -> None:
        """Add φ to the composition; φ_T sets the head, too."""
        _add(role, self.change(), self.folder, classifier, with_head=role == "task")

    def take_off(self, role: str, classifier: AdaptedClassifier) -> None:
        """Remove φ from the composition; without φ_T the head is the one the classifier was made with."""
        _remove(role, classifier, with_head=role == "task")


class MergedAdaptation:
    """Several changes of weights, merged by a rule (:mod:`deftx.core.merging`); the head is φ_T's.

    Args:
        parts: What is merged, by role: ``task``, ``language``.
        settings: Rule, weights and options.
        seed: Of what the rule draws.
    """

    def __init__(self, parts: Mapping[str, SparseAdaptation], settings: ComposeSettings, seed: int) -> None:
        self.parts = parts
        self.settings = settings
        self.seed = seed
        self.key = repr(({role: part.key for role, part in parts.items()}, settings, seed))

    def put_on(self, role: str, classifier: AdaptedClassifier) -> None:
        """Add the merged change to the composition, and set the head."""
        from deftx.core.merging import RULES, Term, merge
        from deftx.core.settings import RankPolicy

        settings, weights = self.settings, vars(self.settings)
        changes = {name: part.change() for name, part in self.parts.items()}
        # The head of a language SFT predicts tokens; it never reaches a classifier.
        changes = {name: change if name == "task" else replace(change, head={}) for name, change in changes.items()}
        terms = [Term(name, changes[name], weights[name], weights[f"{name}_layers"]) for name in changes]
        options = settings.options()
        if "rank" in options:
            options["rank"] = RankPolicy.parse(options["rank"])
        computed = {"seed": self.seed, "parameters": classifier.size}
        options |= {name: computed[name] for name in RULES[settings.rule].computed}
        _add(role, merge(settings.rule, terms, **options), self.parts["task"].folder, classifier, with_head=True)

    def take_off(self, role: str, classifier: AdaptedClassifier) -> None:
        """Restore the base and the head that the classifier was made with."""
        _remove(role, classifier, with_head=True)


def _add(role: str, delta: SparseDelta, source: Path, classifier: AdaptedClassifier, *, with_head: bool) -> None:
    classifier.composition.add(role, delta)
    if with_head:
        try:
            classifier.set_head(delta.head, source)
        except DeftxError:
            classifier.composition.remove(role)
            raise


def _remove(role: str, classifier: AdaptedClassifier, *, with_head: bool) -> None:
    classifier.composition.remove(role)
    if with_head:
        classifier.set_head(None)


COMPOSITIONS: dict[str, Callable[[str, Path], Adaptation]] = {"sum": SparseAdaptation}
"""How SFTs are put on a base, from key and folder: ``sum`` adds them."""


def composed(parts: Mapping[str, Adaptation], settings: ComposeSettings, seed: int) -> dict[str, Adaptation]:
    """Return what a classifier wears of φ_T and φ_L: both as they are, or merged.

    Raises:
        DeftxError: A rule is to merge what is no change of weights.
    """
    if settings.plain or "language" not in parts:
        return dict(parts)
    changes = {role: part for role, part in parts.items() if isinstance(part, SparseAdaptation)}
    if len(changes) < len(parts):
        others = ", ".join(role for role in parts if role not in changes)
        raise DeftxError(f"compose={settings.rule} merges changes of weights; the {others} module is none: compose=sum")
    return {"merged": MergedAdaptation(changes, settings, seed)}


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"
