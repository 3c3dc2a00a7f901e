"""Composition and zero-shot evaluation: θ⁰ + φ_T + φ_L with the head from φ_T, cell by cell.

A cell is a target language under a condition (composed, without language SFTs, with the source's left in, ...). Each is
a cached stage of its own; the model is loaded once, when the first cell that is not in the cache needs it, and walks
from one composition to the next. Predictions are float32 whatever the precision of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Entry, Stage, StageCache, Workspace
from deftx.data.settings import LanguageSettings
from deftx.data.tasks import fingerprint_rows
from deftx.stages.inputs import Base
from deftx.stages.settings import SFTSettings, StudySettings

if TYPE_CHECKING:
    import pandas as pd

    from deftx.core.delta import Composition, SparseDelta
    from deftx.data.encode import Batch

EVAL_BATCH = 64


@dataclass(frozen=True)
class SFT:
    """A sparse fine-tuning on disk.

    Attributes:
        role: ``task`` or ``language``.
        name: For tables and logs, such as ``language qba deftx``.
        folder: Holds ``sft.safetensors`` and ``sft.json``.
        key: SHA-256 of ``sft.safetensors``.
        metrics: What its training reported.
    """

    role: str
    name: str
    folder: Path
    key: str
    metrics: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def facts(self) -> dict[str, Any]:
        """Metadata of its ``sft.json``: how it was trained."""
        return dict(json.loads((self.folder / "sft.json").read_text(encoding="utf-8"))["metadata"])

    def load(self) -> SparseDelta:
        """Read it, verified."""
        from deftx.core.delta import SparseDelta

        return SparseDelta.load(self.folder)


@dataclass(frozen=True)
class Cell:
    """One language under one condition.

    Attributes:
        language: Target language code.
        condition: ``deftx``, ``ltsft``, ``no_language_sft``, ``source_sft``, ``other_language_sft``,
            or for given SFTs ``composed`` and ``source_language_only``.
        task: φ_T; its head predicts.
        language_sft: The language SFT composed with it, if any.
        variant: Tells cells of one condition apart (whose φ_L it is), else empty.
    """

    language: str
    condition: str
    task: SFT
    language_sft: SFT | None
    variant: str = ""


@dataclass(frozen=True)
class Outcome:
    """A cell's predictions and scores."""

    cell: Cell
    metrics: dict[str, float]
    predictions: pd.DataFrame
    key: str


class Evaluator:
    """Evaluates cells of one study on one base model.

    Args:
        study: Resolved settings; the task and the accelerator are read.
        base: θ⁰.
        cache: Where cells are stages.
        max_length: Tokens a text is truncated to; what φ_T was trained with.
    """

    def __init__(self, study: StudySettings, base: Base, cache: StageCache, max_length: int) -> None:
        self.study = study
        self.base = base
        self.cache = cache
        self.max_length = max_length
        self._model: Any = None
        self._tokenizer: Any = None
        self._composition: Composition | None = None
        self._loaded: dict[str, SFT] = {}
        self._encoded: dict[str, list[tuple[list[int], Batch]]] = {}

    def stage(self, cell: Cell, rows: pd.DataFrame) -> Stage:
        """The stage of a cell."""
        inputs = {"base": self.base.key, "task": cell.task.key, "rows": fingerprint_rows(rows)}
        if cell.language_sft is not None:
            inputs["language"] = cell.language_sft.key
        return Stage(
            kind="evaluate",
            version=1,
            settings={
                "labels": list(self.study.task_spec.labels),
                "max_length": self.max_length,
                "batch": EVAL_BATCH,
            },
            inputs=inputs,
            seed=None,
            label=" ".join(part for part in (cell.language, cell.condition, cell.variant) if part),
        )

    def evaluate(self, cell: Cell, rows: pd.DataFrame) -> Outcome:
        """Predict and score one cell.

        Args:
            cell: What to compose.
            rows: Test rows of the cell's language: id, text, text_pair, label.
        """
        import pandas as pd

        stage = self.stage(cell, rows)
        entry: Entry = self.cache.get_or_compute(stage, lambda work: self._compute(cell, rows, work))
        metrics = json.loads(entry.file("metrics.json").read_text(encoding="utf-8"))
        return Outcome(cell, metrics, pd.read_parquet(entry.file("predictions.parquet")), stage.key)

    def _compute(self, cell: Cell, rows: pd.DataFrame, work: Workspace) -> None:
        from deftx.training.predict import predict, score

        labels = self.study.task_spec.labels
        self._compose(cell)
        logits = predict(self._model, self._batches(cell.language, rows), rows=len(rows))
        gold = rows["label"].tolist()
        metrics = {name: score(name, logits, gold, len(labels)) for name in ("macro_f1", "accuracy")}
        frame = rows[["id", "label"]].reset_index(drop=True)
        frame["prediction"] = logits.argmax(dim=1).tolist()
        for index, label in enumerate(labels):
            frame[f"score_{label}"] = logits[:, index].tolist()
        frame.to_parquet(work.out / "predictions.parquet")
        text = json.dumps({**metrics, "n": len(rows)}, sort_keys=True)
        (work.out / "metrics.json").write_text(text, encoding="utf-8")

    def _batches(self, language: str, rows: pd.DataFrame) -> list[tuple[list[int], Batch]]:
        """A language's rows as batches, tokenised once for all its cells."""
        from deftx.data.encode import batches_by_length, encode_texts, padding_of

        if language not in self._encoded:
            columns = encode_texts(self._tokenizer, rows["text"].tolist(), rows["text_pair"].tolist(), self.max_length)
            self._encoded[language] = batches_by_length(columns, padding_of(self._tokenizer), EVAL_BATCH)
        return self._encoded[language]

    def _compose(self, cell: Cell) -> None:
        """Bring the model to the cell's composition, touching only the terms that differ."""
        import torch

        from deftx.core.delta import Composition
        from deftx.training.encoder import (
            base_fingerprint_of,
            base_parameters,
            load_classifier,
            load_tokenizer,
        )

        if self._composition is None:
            self._model, _ = load_classifier(self.base.folder, labels=self.study.task_spec.labels, seed=0)
            if self.study.trainer.accelerator != "cpu" and torch.cuda.is_available():
                self._model.cuda()  # before the composition takes hold of the parameters
            self._tokenizer = load_tokenizer(self.base.folder)
            self._composition = Composition(
                {name: parameter.data for name, parameter in base_parameters(self._model).items()},
                base_fingerprint=base_fingerprint_of(self._model),
            )
        wanted = {"task": cell.task} | ({"language": cell.language_sft} if cell.language_sft is not None else {})
        for role, sft in list(self._loaded.items()):
            if wanted.get(role) != sft:
                self._composition.remove(role)
                del self._loaded[role]
        for role, sft in wanted.items():
            if role not in self._loaded:
                delta = sft.load()
                self._composition.add(role, delta)
                self._loaded[role] = sft
                if role == "task":
                    _load_head(self._model, delta, sft)


def _load_head(model: Any, delta: SparseDelta, sft: SFT) -> None:
    """Put φ_T's head into the classifier; every head tensor has to match."""
    import torch

    from deftx.errors import DeftxError
    from deftx.training.encoder import head_parameters

    head = head_parameters(model)
    if set(head) != set(delta.head) or any(head[name].shape != delta.head[name].shape for name in head):
        raise DeftxError(
            f"the head of {sft.folder} does not fit this model and task\nit has: {_shapes(delta.head)}\n"
            f"needed: {_shapes(head)}\nnext: give the SFT of this task, trained on this base"
        )
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(delta.head[name])


def _shapes(tensors: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"


def study_cells(
    study: StudySettings,
    texts: Container[str],
    language_sft: Callable[[str, LanguageSettings, SFTSettings, str | None], SFT],
    task_sft: Callable[[str, str, dict[str, SFT]], SFT],
) -> list[Cell]:
    """All SFTs of a study, in the order they are made, and the cells they are evaluated in.

    A run makes them, a dry run looks them up: both ask here what there is.

    Args:
        study: Resolved settings.
        texts: Languages that have unlabelled text.
        language_sft: Gives an SFT from whose it is (``source:CODE``, ``language:CODE``), the language, its settings, and
            the method (None for φ_S, which has settings of its own).
        task_sft: Gives φ_T from whose it is (``task``, ``task_alone``), the method, and φ_S by source language.
    """
    on: dict[str, SFT] = {}
    if study.source_sft is not None:
        for code, language in study.sources.items():
            on[code] = language_sft(f"source:{code}", language, study.source_sft, None)
    languages = {
        (code, method): language_sft(f"language:{code}", language, study.sft_for(method, study.language_sft), method)
        for method in study.methods
        for code, language in study.targets.items()
        if code in texts
    }
    tasks = {method: task_sft("task", method, on) for method in study.methods}
    main = study.methods[0]
    return plan_cells(
        list(study.targets),
        main,
        tasks,
        languages,
        without_language=task_sft("task_alone", main, {}) if "no_language_sft" in study.controls else None,
        source_sft=on.get(study.source.code),
        controls=study.controls,
    )


def plan_cells(
    targets: Sequence[str],
    main: str,
    tasks: dict[str, SFT],
    languages: dict[tuple[str, str], SFT],
    *,
    without_language: SFT | None,
    source_sft: SFT | None,
    controls: Sequence[str],
) -> list[Cell]:
    """All cells of a study, controls first, in the order they are shown.

    Args:
        targets: Target languages.
        main: The main method; controls use its task SFT.
        tasks: φ_T by method.
        languages: φ_L by (language, method); a missing one is a target without text.
        without_language: φ_T trained without any language SFT.
        source_sft: φ_S.
        controls: Conditions beside the composed model.
    """
    cells: list[Cell] = []
    for language in targets:
        if "no_language_sft" in controls and without_language is not None:
            cells.append(Cell(language, "no_language_sft", without_language, None))
        if "source_sft" in controls and source_sft is not None:
            cells.append(Cell(language, "source_sft", tasks[main], source_sft))
        if "other_language_sft" in controls:
            for other in targets:
                sft = languages.get((other, main))
                if other != language and sft is not None:
                    cells.append(Cell(language, "other_language_sft", tasks[main], sft, variant=other))
        cells += [Cell(language, method, task, languages.get((language, method))) for method, task in tasks.items()]
    return cells
