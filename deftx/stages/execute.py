"""Computes a graph's nodes, and tracks how far a run has come."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Entry, StageCache, Workspace
from deftx.errors import DeftxError
from deftx.heartbeat import Heartbeat, heartbeat_file, write_heartbeat
from deftx.stages.evaluate import Outcome, outcome
from deftx.stages.evidence import forget_module
from deftx.stages.graph import GivenSFTs, StudyGraph, graph
from deftx.stages.inputs import MEASURES, Needs, read_json, read_rows
from deftx.stages.node import InputFolder, Loggers, Node
from deftx.stages.objectives import SFT
from deftx.stages.settings import StudySettings
from deftx.tracking import Remark, print_coverage

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


class Results:
    """Results of nodes: taken from the cache, or computed.

    Args:
        cache: The cache of results.
        loggers: Loggers of training stages.

    Attributes:
        entries: Results returned so far, by key.
    """

    def __init__(self, cache: StageCache, loggers: Loggers) -> None:
        self.cache = cache
        self.loggers = loggers
        self.entries: dict[str, Entry] = {}

    def of(self, node: Node) -> Entry:
        """Return a node's result; the results it needs are computed only if it is not cached."""

        def compute(work: Workspace) -> None:
            work.inputs.update(self.all(node.needs))
            write_heartbeat(Heartbeat(str(node.stage)), heartbeat_file())
            node.compute(work, self.loggers)

        if node.key not in self.entries:
            try:
                self.entries[node.key] = self.cache.get_or_compute(node.stage, compute)
            except Exception as error:
                before = [entry.path.is_dir() for entry in self.entries.values()]
                if self.cache.root.is_dir() and (any(before) or not before):
                    raise
                raise DeftxError(
                    f"the stage cache {self.cache.root} was deleted while this run used it; run the command again: it "
                    "makes the cache anew"
                ) from error
        return self.entries[node.key]

    def all(self, needs: Mapping[str, Node]) -> dict[str, Entry]:
        """Return the results of several nodes by name, all made from the same bits of each shared input."""
        while True:
            entries = {name: self.of(need) for name, need in needs.items()}
            if self.agree(entries):
                return entries

    def agree(self, entries: Mapping[str, Entry] | None = None) -> bool:
        """Return whether ``entries`` (default: all so far) were made from the same bits; if not, all are forgotten."""
        if self.cache.agree(self.entries if entries is None else entries):
            return True
        self.entries.clear()
        return False

    def folder(self, source: InputFolder) -> Path:
        """Return the folder of a base or an SFT; computes the node that makes it if needed."""
        if source.folder is not None:
            return source.folder
        if source.node is None:
            raise RuntimeError(f"{source} was neither given nor is there a node that makes it")
        return self.of(source.node).path / source.inside


@dataclass
class StudyProgress:
    """How far a run has come; a failed run records it, too.

    Attributes:
        study: Settings of the study.
        results: Results computed or taken from the cache.
        graph: Nodes of the study; None before :meth:`open`.
        tests: Evaluated rows by target and split: ``id``, ``text``, ``text_pair`` (str or None), ``label`` (int).
        sfts: Finished SFTs, in training order.
        outcomes: Evaluated cells.
        coverage: Measures of what is read, by language and what it is (``text``, ``rows``).
        remarks: Remarks that are known before anything is computed.
    """

    study: StudySettings
    results: Results
    graph: StudyGraph | None = None
    tests: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    sfts: list[SFT] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    coverage: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    @property
    def _trains(self) -> bool:
        """Whether an SFT is still to be trained."""
        nodes = [] if self.graph is None else [sft.node for sft in self.graph.sfts if sft.node is not None]
        return any(self.results.cache.peek(item.stage) is None for item in nodes)

    def open(self, needs: Needs, given_sfts: GivenSFTs | None = None) -> StudyGraph:
        """Build the graph and compute all that the study reads before it trains, so that a bad row fails at once.

        Raises:
            DeftxError: Data or a model is missing, training and test rows are not of one form, or the tokenizer knows
                nothing of a language.
        """
        self.graph = graph(self.study, self.results.cache, needs=needs, given_sfts=given_sfts)
        inputs = self.graph.inputs
        for code, error in inputs.skipped.items():
            log.warning("%s: no unlabelled text, evaluated without a language SFT (%s)", code, error)
        for node in self.graph.opened:
            self.results.of(node)
        self.coverage = {
            key: read_json(self.results.of(item).file(MEASURES)) for key, item in self.graph.coverage.items()
        }
        _check_coverage(self.coverage, silent=not self._trains)
        self.tests = {key: rows.frame for key, rows in inputs.tests.items()}
        _refuse_mixed_forms((read_rows(self.results.of(rows), "train") for rows in inputs.rows.values()), self.tests)
        return self.graph

    def train(self, sft: SFT) -> None:
        """Train an SFT, unless its result is cached."""
        self.results.folder(sft)
        self.sfts.append(sft)

    def evaluate(self) -> None:
        """Evaluate every cell in the order of its composition, so that shared SFTs stay on the model."""
        if self.graph is None:
            raise RuntimeError("the study was not opened")
        forget_module()
        while True:
            self.outcomes.clear()
            for cell, node in self.graph.by_composition:
                self.outcomes.append(outcome(cell, self.results.of(node)))
            if self.results.agree():
                return
            for node in self.graph.required:  # computes contradicting results again, and what depends on them
                self.results.of(node)

    def so_far(self) -> None:
        """Drop SFTs without a current result, so that recording a failed run computes nothing."""
        self.sfts = [sft for sft in self.sfts if sft.folder is not None or sft.key in self.results.entries]


UNKNOWN = 0.05
"""Share of unknown pieces above which a language is warned about."""


def _check_coverage(coverage: Mapping[tuple[str, str], Mapping[str, Any]], *, silent: bool) -> None:
    """Print how the tokenizer cuts each language; warn of unknown pieces, refuse a language of nothing else.

    Args:
        coverage: Measures by language and what was measured.
        silent: Whether nothing is trained, so that the table would be noise.
    """
    shares = {key: float(facts["unknown"] or 0) for key, facts in coverage.items() if facts["words"]}
    if shares and not silent:
        print_coverage(coverage)
    named = {key: f"{share:.1%} of the pieces of the {key[1]} of {key[0]}" for key, share in shares.items()}
    if lost := [named[key] for key, share in shares.items() if share == 1.0]:
        raise DeftxError(
            f"the tokenizer knows nothing of a language: {', '.join(lost)} are unknown; choose a model that was "
            "pretrained on its script (model=xlmr_base, ...), or write the text in the script that the model knows"
        )
    for key, share in shares.items():
        if share > UNKNOWN:
            log.warning(
                "%s are unknown to the tokenizer: the model cannot tell these words apart; another model may read the "
                "script",
                named[key],
            )


def _refuse_mixed_forms(trained_on: Iterable[pd.DataFrame], tests: Mapping[tuple[str, str], pd.DataFrame]) -> None:
    """Refuse to learn from pairs and predict single sentences, or the reverse."""

    def form(rows: pd.DataFrame) -> str:
        return "pairs" if rows["text_pair"].notna().any() else "single sentences"

    learnt = sorted({form(rows) for rows in trained_on}, reverse=True)
    for (code, split), rows in tests.items():
        if learnt and learnt != [form(rows)]:
            raise DeftxError(
                f"the {split} rows of {code} are {form(rows)}, the training rows are {' and '.join(learnt)}"
            )
