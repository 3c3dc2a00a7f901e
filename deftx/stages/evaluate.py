"""Composes SFTs and evaluates them, a node for each cell: task SFT, language SFT, test rows of one language.

A cell's result depends on its SFTs and rows, not on the rest of the study. Evaluations of one study share one model: an
SFT that two consecutive cells compose stays on it. Predictions are float32 whatever the precision of training was.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Entry, Workspace
from deftx.core.folder import FACTS
from deftx.errors import DeftxError
from deftx.methods import BY_PROXY, WITHOUT_LANGUAGE_SFT
from deftx.methods.adaptation import COMPOSITIONS, AdaptedClassifier, composed
from deftx.stages.base import Base
from deftx.stages.inputs import TestRows, read_json
from deftx.stages.node import Node, node
from deftx.stages.objectives import SFT
from deftx.stages.settings import StudySettings

if TYPE_CHECKING:
    import pandas as pd

    from deftx.data.encode import Batch

EVAL_BATCH = 64
METRICS = "metrics.json"
PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True)
class Cell:
    """One language under one condition.

    Attributes:
        language: Target language code.
        condition: One of :data:`deftx.tracking.CONDITIONS`: a method (or that without φ_L), a control, or for given
            SFTs ``composed`` and ``source_language_only``.
        task: φ_T; its head predicts.
        language_sft: The language SFT composed with it, if any.
        variant: Language of φ_L where a condition has several cells, else empty.
        split: Split of the language's rows.
    """

    language: str
    condition: str
    task: SFT
    language_sft: SFT | None
    variant: str = ""
    split: str = "test"

    @property
    def name(self) -> str:
        """Language, condition, variant, and the split unless it is ``test``."""
        split = "" if self.split == "test" else self.split
        return " ".join(filter(None, (self.language, self.condition, self.variant, split)))

    @property
    def sfts(self) -> list[SFT]:
        """The SFTs that the cell composes: φ_T, then the language SFT."""
        return [self.task, *([] if self.language_sft is None else [self.language_sft])]


@dataclass(frozen=True)
class Outcome:
    """A cell's scores and predictions.

    Attributes:
        cell: The evaluated cell.
        metrics: Score by metric, and ``n``, the number of rows.
        predictions: Columns ``id`` (str), ``label`` and ``prediction`` (int), ``score_<label>`` (float logits).
        key: Key of the cell's node.
    """

    cell: Cell
    metrics: dict[str, float]
    predictions: pd.DataFrame
    key: str


def outcome(cell: Cell, entry: Entry) -> Outcome:
    """Read a cell's outcome from its cache entry."""
    import pandas as pd

    return Outcome(cell, read_json(entry.file(METRICS)), pd.read_parquet(entry.file(PREDICTIONS)), entry.key)


class Evaluator:
    """Builds the nodes of a study's cells, and computes them on one model.

    Args:
        study: Resolved settings; the task and the accelerator are read.
        base: θ⁰.
        tests: Evaluated rows by target and split.
        max_length: Tokens a text is truncated to, the same as when φ_T was trained.
    """

    def __init__(
        self, study: StudySettings, base: Base, tests: Mapping[tuple[str, str], TestRows], max_length: int
    ) -> None:
        self.study = study
        self.base = base
        self.tests = tests
        self.max_length = max_length
        self._classifier: AdaptedClassifier | None = None
        self._opened_on = ""
        self._tokenizer: Any = None
        self._batches: dict[tuple[str, str], list[tuple[list[int], Batch]]] = {}

    def node(self, cell: Cell) -> Node:
        """Return the node of a cell."""
        rows = self.tests[cell.language, cell.split]
        needs, content = {**self.base.needs, **rows.needs}, {**self.base.content, **rows.content}
        for sft in cell.sfts:
            needs, content = needs | sft.needs, content | sft.content
        settings: dict[str, Any] = {
            "labels": list(self.study.task_spec.labels),
            "max_length": self.max_length,
            "batch": EVAL_BATCH,
            "composition": {sft.kind: sft.composition for sft in cell.sfts},
        }
        if cell.language_sft is not None and not (compose := self.study.compose).plain:
            weights = {name: getattr(compose, name) for name in ("task", "language", "task_layers", "language_layers")}
            settings["compose"] = {"rule": compose.rule, **weights, **compose.options()}
            settings["compose"] |= {"seed": self.study.seed} if compose.rule == "dare" else {}
        return node(
            "evaluate",
            3,
            settings,
            lambda work, loggers: self._compute(cell, work),
            needs=needs,
            content=content,
            label=cell.name,
        )

    def _compute(self, cell: Cell, work: Workspace) -> None:
        from deftx.training.metrics import TASK_METRICS
        from deftx.training.predict import predict, score

        labels, rows = self.study.task_spec.labels, self.tests[cell.language, cell.split].frame
        classifier = self._opened(work)
        for sft in cell.sfts:
            self._check_tokenizer(sft, sft.found_in(work))
        # By digest, not by key: an SFT that was computed again may have other bits.
        parts = {sft.kind: COMPOSITIONS[sft.composition](sft.digest(work), sft.found_in(work)) for sft in cell.sfts}
        classifier.wear(composed(parts, self.study.compose, self.study.seed))
        logits = predict(classifier.model, self._encoded((cell.language, cell.split), rows), rows=len(rows))
        gold = rows["label"].tolist()
        metrics = {name: score(name, logits, gold, len(labels)) for name in TASK_METRICS}
        frame = rows[["id", "label"]].reset_index(drop=True)
        frame["prediction"] = logits.argmax(dim=1).tolist()
        for index, label in enumerate(labels):
            frame[f"score_{label}"] = logits[:, index].tolist()
        frame.to_parquet(work.out / PREDICTIONS)
        (work.out / METRICS).write_text(json.dumps({**metrics, "n": len(rows)}, sort_keys=True), encoding="utf-8")

    def _check_tokenizer(self, sft: SFT, folder: Path) -> None:
        """Refuse an SFT that was trained on other tokens; files of older versions and others' do not tell.

        Raises:
            DeftxError: The base's tokenizer is not the one that the SFT was trained with.
        """
        from deftx.data.encode import tokenizer_identity

        stated = read_json(folder / FACTS)["metadata"].get("tokenizer")
        if stated is not None and stated != (own := tokenizer_identity(self._tokenizer)):
            raise DeftxError(
                f"{sft.name} was trained with another tokenizer (digest {stated[:12]}) than that of {self.base.name} "
                f"({own[:12]}): the same weights would read other tokens; give the model folder that it was trained on"
            )

    def _encoded(self, key: tuple[str, str], rows: pd.DataFrame) -> list[tuple[list[int], Batch]]:
        """Return the rows of a language and split as batches with their row numbers, tokenised once for all cells."""
        from deftx.data.encode import batches_by_length, encode_texts, padding_of

        if key not in self._batches:
            columns = encode_texts(self._tokenizer, rows["text"].tolist(), rows["text_pair"].tolist(), self.max_length)
            self._batches[key] = batches_by_length(columns, padding_of(self._tokenizer), EVAL_BATCH)
        return self._batches[key]

    def _opened(self, work: Workspace) -> AdaptedClassifier:
        """Return the classifier on θ⁰, loaded for the first cell."""
        import torch

        from deftx.training.encoder import HEADS, load_tokenizer

        folder, digest = self.base.found_in(work), self.base.digest(work)
        if self._classifier is None or self._opened_on != digest:
            self._batches.clear()
            self._opened_on = digest
            task = self.study.task_spec
            model, _ = HEADS[task.head](folder, labels=task.labels, seed=0)
            if self.study.trainer.accelerator != "cpu" and torch.cuda.is_available():
                model.cuda()  # before the composition takes hold of the parameters
            self._tokenizer = load_tokenizer(folder)
            self._classifier = AdaptedClassifier(model)
        return self._classifier


def cells_of(
    targets: Sequence[str],
    methods: Sequence[str],
    controls: Sequence[str],
    source: str,
    sfts: Mapping[tuple[str, str, str], SFT],
    proxied: Collection[str] = (),
) -> list[Cell]:
    """List the cells of a study in the order of the tables: by target, controls first.

    Args:
        targets: Target languages.
        methods: The main method, whose SFTs the controls compose, then the others.
        controls: Conditions beside the composed model.
        source: The source language, whose φ_S a control composes.
        sfts: The SFTs by role, language and method, as :func:`deftx.stages.graph.trained` lists them; a target
            without text has no language SFT.
        proxied: Targets whose language SFT is a proxy.
    """
    main = methods[0]
    by_proxy = {method: condition for condition, method in BY_PROXY.items()}
    without = {method: condition for condition, method in WITHOUT_LANGUAGE_SFT.items()}
    tasks = {method: sfts["task", "", method] for method in methods}
    alone, source_sft = (
        sfts.get(("task_alone", "", main)),
        sfts.get(("source", source, main), sfts.get(("source", source, ""))),
    )
    cells: list[Cell] = []
    for language in targets:
        if "no_language_sft" in controls and alone is not None:
            cells.append(Cell(language, "no_language_sft", alone, None))
        if "source_sft" in controls and source_sft is not None:
            cells.append(Cell(language, "source_sft", tasks[main], source_sft))
        for other in targets if "other_language_sft" in controls else ():
            sft = sfts.get(("language", other, main))
            if other != language and other not in proxied and sft is not None:
                cells.append(Cell(language, "other_language_sft", tasks[main], sft, variant=other))
        for method, task in tasks.items():
            sft = sfts.get(("language", language, method))
            own = by_proxy[method] if language in proxied else method
            cells.append(Cell(language, own if sft is not None else without[method], task, sft))
    return cells
