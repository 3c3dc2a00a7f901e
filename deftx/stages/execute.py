"""Making a graph's nodes, and how far a run has come with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Entry, StageCache, Workspace
from deftx.errors import DeftxError
from deftx.stages.base import Base
from deftx.stages.evaluate import Outcome, outcome
from deftx.stages.evidence import forget_module
from deftx.stages.graph import GivenSFTs, StudyGraph, graph
from deftx.stages.inputs import Needs, read_rows
from deftx.stages.learn import METRICS
from deftx.stages.node import Loggers, Node
from deftx.stages.objectives import SFT, SFT_FOLDER
from deftx.stages.settings import StudySettings

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


class Results:
    """Results of nodes, from the cache where they are there, else computed.

    Args:
        cache: Where results are.
        loggers: Of training stages.

    Attributes:
        entries: What was asked for so far, by key.
    """

    def __init__(self, cache: StageCache, loggers: Loggers) -> None:
        self.cache = cache
        self.loggers = loggers
        self.entries: dict[str, Entry] = {}

    def of(self, item: Node) -> Entry:
        """A node's result; what it needs is asked for only where it has to be computed."""

        def compute(work: Workspace) -> None:
            work.inputs.update(self.all(item.needs))
            item.compute(work, self.loggers)

        if item.key not in self.entries:
            self.entries[item.key] = self.cache.get_or_compute(item.stage, compute)
        return self.entries[item.key]

    def all(self, needs: Mapping[str, Node]) -> dict[str, Entry]:
        """The results of several nodes by name, none of which was made from other bits of the same thing."""
        while True:
            found = {name: self.of(need) for name, need in needs.items()}
            if self.agree(found):
                return found

    def agree(self, found: Mapping[str, Entry] | None = None) -> bool:
        """Whether some results, or all so far, were made from the same bits; else they have to be asked for again."""
        if self.cache.agree(self.entries if found is None else found):
            return True
        self.entries.clear()
        return False

    def base_folder(self, base: Base) -> Path:
        """The model folder of θ⁰."""
        if base.folder is not None or base.node is None:
            return base.folder or Path()
        return base.made(self.of(base.node))


@dataclass
class Progress:
    """How far a run has come, so that a failed one can say.

    Attributes:
        study: Its settings.
        results: What was made or found.
        graph: Its nodes; None until data and model have been found.
        tests: Test rows by target.
        sfts: SFTs that are there, in the order they were made.
        outcomes: Evaluated cells.
    """

    study: StudySettings
    results: Results
    graph: StudyGraph | None = None
    tests: dict[str, pd.DataFrame] = field(default_factory=dict)
    sfts: list[SFT] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def cache(self) -> StageCache:
        """The stage cache."""
        return self.results.cache

    def open(self, needs: Needs, given: GivenSFTs | None = None) -> StudyGraph:
        """Find or make all that the study reads before anything trains: no bad row is found hours later."""
        self.graph = graph(self.study, self.cache, needs=needs, given=given)
        inputs = self.graph.inputs
        for code, error in inputs.skipped.items():
            log.warning("%s: no unlabelled text, evaluated without a language SFT (%s)", code, error)
        for item in self.graph.opened:
            self.results.of(item)
        self.tests = {code: rows.frame for code, rows in inputs.tests.items()}
        self._refuse_mixed_forms()
        return self.graph

    def folder(self, sft: SFT) -> Path:
        """Where an SFT that is there lies."""
        return sft.folder if sft.folder is not None else self._made(sft).path / SFT_FOLDER

    def _made(self, sft: SFT) -> Entry:
        if sft.node is None:
            raise RuntimeError(f"{sft.name} was neither given nor is it made")
        return self.results.of(sft.node)

    def train(self, sft: SFT) -> Path:
        """Make an SFT; its folder."""
        if sft.node is not None:
            self.results.of(sft.node)
        self.sfts.append(sft)
        return self.folder(sft)

    def metrics(self, sft: SFT) -> dict[str, Any]:
        """What the training of an SFT reported; of a given one what its ``sft.json`` says."""
        if sft.folder is not None:
            return dict(self.facts(sft).get("metrics") or {})
        return dict(json.loads(self._made(sft).file(METRICS).read_text(encoding="utf-8")))

    def facts(self, sft: SFT) -> dict[str, Any]:
        """Metadata of its ``sft.json``: how it was trained."""
        return dict(json.loads((self.folder(sft) / "sft.json").read_text(encoding="utf-8"))["metadata"])

    def evaluate(self) -> None:
        """Evaluate every cell; what one composition has in common with the last stays on the model."""
        if self.graph is None:
            raise RuntimeError("the study was not opened")
        forget_module()
        while True:
            self.outcomes.clear()
            for cell, item in self.graph.by_composition:
                self.outcomes.append(outcome(cell, self.results.of(item)))
            if self.results.agree():
                return
            for item in self.graph.wanted:  # what contradicted the rest is made again, and what stands on it
                self.results.of(item)

    def so_far(self) -> None:
        """Leave out SFTs that are no more, so that a run that fails makes nothing again to say how far it came."""
        self.sfts = [sft for sft in self.sfts if sft.folder is not None or sft.key in self.results.entries]

    def _refuse_mixed_forms(self) -> None:
        """Pairs to learn from and single sentences to predict, or the reverse, are two tasks."""
        learnt = set()
        for rows in self.graph.inputs.rows.values() if self.graph is not None else ():
            learnt.add(bool(read_rows(self.results.of(rows), "train")["text_pair"].notna().any()))
        form = {True: "pairs", False: "single sentences"}
        for code, frame in self.tests.items():
            pairs = bool(frame["text_pair"].notna().any())
            if learnt and learnt != {pairs}:
                raise DeftxError(
                    f"the test rows of {code} are {form[pairs]}, the training rows are "
                    f"{' and '.join(form[pair] for pair in sorted(learnt))}"
                )
