"""What an SFT is trained for: masked language modelling on text, or classification of labelled rows.

An objective names the nodes it reads and loads nothing before one of them is computed, so that a graph can be made of
it.

Shapes: M is the maskable parameters, a mapping from the base model's own names to float32 tensors of any shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Workspace
from deftx.core.folder import FACTS, TENSORS
from deftx.data.settings import LanguageSettings
from deftx.stages.base import Base
from deftx.stages.inputs import REPORT, read_json, read_rows, read_text
from deftx.stages.node import ExternalInput, InputFolder, Node, stage_seed
from deftx.stages.settings import SFTSettings, StudySettings

if TYPE_CHECKING:
    import pandas as pd

    from deftx.training.encoder import LoadReport
    from deftx.training.modules import Encoder

SFT_FOLDER = "sft"


@dataclass(frozen=True)
class SFT(InputFolder):
    """A sparse fine-tuning of a study: one that the study trains, or one that the user gave. Two are equal by key.

    Its folder holds ``sft.safetensors`` and ``sft.json`` (:class:`deftx.core.delta.SparseDelta`).

    Attributes:
        kind: ``task`` or ``language``.
        name: For tables and logs, such as ``language qba deftx``.
        key: Of the node that makes it; of a given one the sha256 of its tensors.
        node: Makes it; None for a given one.
        external: A given one's tensors; None for one that is made.
        folder: Of a given one; None for one that is made.
        on: Keys of the φ_S that it is trained on; empty on θ⁰.
        composition: How it is put on a model, a key of :data:`deftx.methods.adaptation.COMPOSITIONS`.
    """

    kind: str = field(compare=False)
    name: str = field(compare=False)
    key: str
    node: Node | None = field(default=None, compare=False)
    external: ExternalInput | None = field(default=None, compare=False)
    folder: Path | None = field(default=None, compare=False)
    on: tuple[str, ...] = field(default=(), compare=False)
    composition: str = "sum"

    inside = SFT_FOLDER


class Objective(ABC):
    """What an SFT is trained for: masked language modelling on text, or classification of labelled rows.

    Nothing is loaded before a node is computed.

    Attributes:
        kind: ``language`` or ``task``.
        language: Language the text or the rows are in; several sources are joined by ``+``.
        label: How logs name it: ``language qba``, ``task on θ⁰+qaa``, ``task on θ⁰``.
        slug: A stable name for training curves: ``language-qba``, ``task-on-qaa``, ``task``.
        base: θ⁰.
        data: Nodes of the text or the rows it learns from, by input name.
        start: Nodes of what training starts from, by input name: the base, φ_S of the source languages.
        source_sfts: φ_S that training starts on, by source language.
    """

    kind: str
    language: str
    label: str
    slug: str
    source_sfts: Mapping[str, SFT] = {}

    def __init__(self, study: StudySettings, base: Base, data: Mapping[str, Node], start: Mapping[str, Node]) -> None:
        self.study = study
        self.base = base
        self.data = dict(data)
        self.start = {**base.needs, **start}

    @abstractmethod
    def model(self, work: Workspace) -> tuple[Any, LoadReport]:
        """θ⁰ with the head that is trained, drawn from the seed where the base has none."""

    @abstractmethod
    def load(self, sft: SFTSettings, work: Workspace) -> tuple[Encoder, str, list[str]]:
        """Return a freshly loaded module at the start of training, θ⁰'s fingerprint and names of drawn head tensors."""

    @abstractmethod
    def data_module(self, sft: SFTSettings, work: Workspace) -> Any:
        """Batches of the text or the rows."""

    @abstractmethod
    def facts(self, work: Workspace) -> dict[str, Any]:
        """Return what the SFT's ``sft.json`` says of it."""

    def of_seed(self, seed: int) -> Objective:
        """Return the same objective with everything that training draws taken from another seed."""
        if seed == self.study.seed:
            return self
        other = copy(self)
        other.study = replace(self.study, seed=seed)
        other.label, other.slug = f"{self.label} seed {seed}", f"{self.slug}-seed-{seed}"
        return other

    def key_settings(self) -> dict[str, Any]:
        """Return what of it, beside its inputs, changes what is trained."""
        return {"objective": self.kind, "language": self.language}


class LanguageObjective(Objective):
    """Masked language modelling on unlabelled text of one language."""

    kind = "language"

    def __init__(self, study: StudySettings, base: Base, language: LanguageSettings, text: Node, tokens: Path) -> None:
        """See :class:`Objective`.

        Args:
            study: Resolved settings.
            base: θ⁰.
            language: Whose text it is.
            text: Its text.
            tokens: Folder for tokenised text, which several stages read.
        """
        super().__init__(study, base, {"data": text}, {})
        self.language = language.code
        self.label, self.slug = f"language {language.code}", f"language-{language.code}"
        self.tokens = tokens

    def model(self, work: Workspace) -> tuple[Any, LoadReport]:
        """θ⁰ with its MLM head."""
        from deftx.training.encoder import load_masked_lm

        return load_masked_lm(self.base.found_in(work), seed=stage_seed(self.study.seed, "head", "mlm"))

    def load(self, sft: SFTSettings, work: Workspace) -> tuple[Encoder, str, list[str]]:
        """θ⁰ with its MLM head."""
        from deftx.training.encoder import base_fingerprint_of
        from deftx.training.modules import MaskedLM

        model, report = self.model(work)
        return MaskedLM(model, sft.training), base_fingerprint_of(model), report.drawn

    def data_module(self, sft: SFTSettings, work: Workspace) -> Any:
        """Return the blocks of text, masked anew in each epoch."""
        from deftx.data.module import TextDataModule
        from deftx.training.encoder import load_tokenizer

        text = work.inputs["data"]
        return TextDataModule.for_language(
            read_text(text, "train"),
            read_text(text, "valid"),
            load_tokenizer(self.base.found_in(work)),
            block_length=sft.training.max_length,
            seed=stage_seed(self.study.seed, "validation masks", self.language),
            mlm_probability=sft.training.mlm_probability,
            cache_dir=self.tokens,
        )

    def facts(self, work: Workspace) -> dict[str, Any]:
        """Return language and text."""
        return {"languages": [self.language], "task": None, "text": read_json(work.inputs["data"].file(REPORT))}


class TaskObjective(Objective):
    """Classification of labelled rows of one or several source languages.

    With one source language the model holds θ⁰ + φ_S. With several it holds θ⁰, and each batch is computed on θ⁰ + its
    own φ_S (docs/method.md, multi-source). Without φ_S it is θ⁰.
    """

    kind = "task"

    def __init__(
        self, study: StudySettings, base: Base, rows: Mapping[str, Node], on: Mapping[str, SFT], method: str = ""
    ) -> None:
        """See :class:`Objective`.

        Args:
            study: Resolved settings.
            base: θ⁰.
            rows: Labelled rows by source language.
            on: φ_S by source language; empty trains on θ⁰.
            method: The method, for names, where it is beside the main one and has a φ_S of its own.
        """
        self.several = len(rows) > 1

        def name(kind: str, code: str) -> str:
            return f"{kind}.{code}" if self.several else kind

        self.rows = {code: name("data", code) for code in rows}
        self.on = {code: name("source_sft", code) for code in rows if on}
        self.source_sfts = dict(on)
        super().__init__(
            study,
            base,
            {name("data", code): item for code, item in rows.items()},
            {name("source_sft", code): item.node for code, item in on.items() if item.node is not None},
        )
        self.language = "+".join(rows)
        if on:
            self.label, self.slug = f"task on θ⁰+{self.language}", f"task-on-{self.language}"
            if method and not study.source_shared:
                self.slug += f"-{method}"
        else:
            self.label, self.slug = f"task {self.language} on θ⁰" if self.several else "task on θ⁰", "task"

    def model(self, work: Workspace) -> tuple[Any, LoadReport]:
        """θ⁰ with a classifier drawn from the seed."""
        from deftx.training.encoder import HEADS

        # What it learns from decides the head, not what it is evaluated on: AmericasNLI and XNLI share one.
        task, seed = self.study.task_spec, stage_seed(self.study.seed, "head", self.study.train)
        return HEADS[task.head](self.base.found_in(work), labels=task.labels, seed=seed)

    def load(self, sft: SFTSettings, work: Workspace) -> tuple[Encoder, str, list[str]]:
        """θ⁰ + φ_S with a classifier drawn from the seed."""
        from deftx.core.composition import Composition
        from deftx.core.delta import SparseDelta
        from deftx.training.encoder import base_fingerprint_of, base_parameters
        from deftx.training.modules import SequenceClassifier

        model, report = self.model(work)
        fingerprint = base_fingerprint_of(model)
        deltas = [SparseDelta.load(work.inputs[name].path / SFT_FOLDER) for name in self.on.values()]
        if not self.several:
            parameters = {name: parameter.data for name, parameter in base_parameters(model).items()}
            composition = Composition(parameters, base_fingerprint=fingerprint)
            for delta in deltas:
                composition.add("source", delta)
        shifts = deltas if self.several else []
        module = SequenceClassifier(model, sft.training, metric=self.study.task_spec.metric, source_sfts=shifts)
        return module, fingerprint, report.drawn

    def data_module(self, sft: SFTSettings, work: Workspace) -> Any:
        """Batches of rows; several sources are mixed, each row knows its own."""
        import pandas as pd

        from deftx.data.module import TextDataModule
        from deftx.training.encoder import load_tokenizer

        def split(name: str) -> pd.DataFrame:
            frames = [read_rows(work.inputs[of], name) for of in self.rows.values()]
            if not self.several:
                return frames[0]
            return pd.concat([frame.assign(source=n) for n, frame in enumerate(frames)], ignore_index=True)

        tokenizer = load_tokenizer(self.base.found_in(work))
        return TextDataModule.for_task(split("train"), split("valid"), tokenizer, max_length=sft.training.max_length)

    def facts(self, work: Workspace) -> dict[str, Any]:
        """Task, labels, rows, and the sha256 of the φ_S it was trained on."""
        stated = {code: read_json(work.inputs[name].path / SFT_FOLDER / FACTS) for code, name in self.on.items()}
        return {
            "languages": list(self.rows),
            "task": self.study.train,
            "labels": list(self.study.task_spec.labels),
            "trained_on": {code: content["sha256"][TENSORS] for code, content in stated.items()} or None,
            "rows": {code: read_json(work.inputs[name].file(REPORT)) for code, name in self.rows.items()},
        }

    def key_settings(self) -> dict[str, Any]:
        """Also what labels mean and what chooses the checkpoint."""
        task = self.study.task_spec
        # Version 2 of macro-F1 is the mean over the labels that the gold rows hold.
        return {**super().key_settings(), "labels": list(task.labels), "metric": task.metric, "metric_version": 2}
