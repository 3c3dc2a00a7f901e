"""Making a graph's nodes, and how far a run has come with them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deftx.cache import Entry, StageCache, Workspace
from deftx.errors import DeftxError
from deftx.stages.evaluate import Outcome, outcome
from deftx.stages.evidence import forget_module
from deftx.stages.graph import GivenSFTs, StudyGraph, graph
from deftx.stages.inputs import Needs, read_rows
from deftx.stages.node import InputFolder, Loggers, Node
from deftx.stages.objectives import SFT
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

    def of(self, node: Node) -> Entry:
        """A node's result; what it needs is asked for only where it has to be computed."""

        def compute(work: Workspace) -> None:
            work.inputs.update(self.all(node.needs))
            node.compute(work, self.loggers)

        if node.key not in self.entries:
            self.entries[node.key] = self.cache.get_or_compute(node.stage, compute)
        return self.entries[node.key]

    def all(self, needs: Mapping[str, Node]) -> dict[str, Entry]:
        """The results of several nodes by name, none of which was made from other bits of the same thing."""
        while True:
            entries = {name: self.of(need) for name, need in needs.items()}
            if self.agree(entries):
                return entries

    def agree(self, entries: Mapping[str, Entry] | None = None) -> bool:
        """Whether some results, or all so far, were made from the same bits; else they have to be asked for again."""
        if self.cache.agree(self.entries if entries is None else entries):
            return True
        self.entries.clear()
        return False

    def folder(self, item: InputFolder) -> Path:
        """The folder of a base or an SFT; one that a node makes is made if it is not there."""
        if item.folder is not None:
            return item.folder
        if item.node is None:
            raise RuntimeError(f"{item} was neither given nor is there a node that makes it")
        return self.of(item.node).path / item.inside


@dataclass
class StudyProgress:
    """How far a run has come, so that a failed one can say.

    Attributes:
        study: Its settings.
        results: What was made or found.
        graph: Its nodes; None until data and model have been found.
        tests: Test rows by target: columns ``id``, ``text``, ``text_pair`` (str or None) and ``label`` (int).
        sfts: SFTs that are there, in the order they were made.
        outcomes: Evaluated cells.
    """

    study: StudySettings
    results: Results
    graph: StudyGraph | None = None
    tests: dict[str, pd.DataFrame] = field(default_factory=dict)
    sfts: list[SFT] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def open(self, needs: Needs, given: GivenSFTs | None = None) -> StudyGraph:
        """Find or make all that the study reads before anything trains: no bad row is found hours later.

        Raises:
            DeftxError: Data or a model is not there, or training and test rows are not of one form.
        """
        self.graph = graph(self.study, self.results.cache, needs=needs, given=given)
        inputs = self.graph.inputs
        for code, error in inputs.skipped.items():
            log.warning("%s: no unlabelled text, evaluated without a language SFT (%s)", code, error)
        for node in self.graph.opened:
            self.results.of(node)
        self.tests = {code: rows.frame for code, rows in inputs.tests.items()}
        _refuse_mixed_forms((read_rows(self.results.of(rows), "train") for rows in inputs.rows.values()), self.tests)
        return self.graph

    def train(self, sft: SFT) -> None:
        """Make an SFT."""
        self.results.folder(sft)
        self.sfts.append(sft)

    def evaluate(self) -> None:
        """Evaluate every cell; what one composition has in common with the last stays on the model."""
        if self.graph is None:
            raise RuntimeError("the study was not opened")
        forget_module()
        while True:
            self.outcomes.clear()
            for cell, node in self.graph.by_composition:
                self.outcomes.append(outcome(cell, self.results.of(node)))
            if self.results.agree():
                return
            for node in self.graph.wanted:  # what contradicted the rest is made again, and what stands on it
                self.results.of(node)

    def so_far(self) -> None:
        """Leave out SFTs that are no more, so that a run that fails makes nothing again to say how far it came."""
        self.sfts = [sft for sft in self.sfts if sft.folder is not None or sft.key in self.results.entries]


def _refuse_mixed_forms(trained_on: Iterable[pd.DataFrame], tests: Mapping[str, pd.DataFrame]) -> None:
    """Pairs to learn from and single sentences to predict, or the reverse, are two tasks."""

    def form(rows: pd.DataFrame) -> str:
        return "pairs" if rows["text_pair"].notna().any() else "single sentences"

    learnt = sorted({form(rows) for rows in trained_on}, reverse=True)
    for code, rows in tests.items():
        if learnt and learnt != [form(rows)]:
            raise DeftxError(f"the test rows of {code} are {form(rows)}, the training rows are {' and '.join(learnt)}")
