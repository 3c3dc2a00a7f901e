"""A study as a value: all of its results as nodes, their keys known before anything runs.

::

    base ─┬─ text(L) ── full(L) ── decompose(L) ── select(L) ── sparse(L) ──► φ_L ─┐
          └─ rows(T) ── full(T | φ_S) ── decompose ── select ── sparse(T) ──► φ_T ─┴─ cell(target, condition)

Runs, dry runs, the first jobs of a sweep, ``only=``, the look-up of finished runs, and the estimate of time and disk
all read this one graph.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from deftx.cache import Stage, StageCache
from deftx.errors import DeftxError, did_you_mean, listed
from deftx.stages.base import Base
from deftx.stages.evaluate import Cell, Evaluator, cells_of
from deftx.stages.inputs import NEEDS, Inputs, Needs, TestRows, inputs_of, measures
from deftx.stages.knobs import flat_knobs
from deftx.stages.learn import sft_nodes
from deftx.stages.merge import merged_sft
from deftx.stages.node import Node, ordered
from deftx.stages.objectives import SFT, LanguageObjective, Objective, TaskObjective
from deftx.stages.settings import StudySettings
from deftx.tracking import SCHEMA_VERSION


class GivenSFTs(NamedTuple):
    """SFTs that the user gave, evaluated in place of trained ones.

    Attributes:
        task: φ_T.
        languages: φ_L by target; a target may have none.
        max_length: Tokens that φ_T was trained with.
    """

    task: SFT
    languages: Mapping[str, SFT]
    max_length: int


@dataclass
class Part:
    """A named part of a study that a sweep's jobs may share; ``only=`` takes its name.

    Attributes:
        phase: ``base`` (the encoder), ``full`` (a full phase with its decomposition, which all ranks and mask sizes
            share) or ``sft`` (a finished SFT).
        whose: ``source:CODE`` (φ_S), ``language:CODE`` (a target's φ_L), ``task`` (φ_T on the φ_S) or ``task_alone``
            (φ_T on θ⁰).
        method: Method of a finished SFT; empty for φ_S, which has settings of its own.
        nodes: Nodes of the part; computing the last one computes all. Empty if there is nothing to make.
    """

    phase: str
    whose: str = ""
    method: str = ""
    nodes: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name for ``only=``, such as ``sft:language:ace:deftx``."""
        return ":".join(filter(None, (self.phase, self.whose, self.method)))

    def add(self, nodes: Iterable[Node]) -> None:
        """Add nodes that the part does not have yet."""
        keys = {node.key for node in self.nodes}
        self.nodes += [node for node in nodes if node.key not in keys]


@dataclass
class StudyGraph:
    """The nodes of one study by their role.

    Attributes:
        study: Settings of the study.
        base: θ⁰.
        inputs: Generated family, text by language, labelled rows by source, test rows by target.
        measures: Nodes that measure the targets' text, by language.
        coverage: Nodes that measure all that is read, by language and what it is (``text``, ``rows``).
        sfts: Every SFT, in training order.
        cells: Evaluated cells with their nodes, in the order of the tables.
        parts: Named parts of the study, for later runs.
    """

    study: StudySettings
    base: Base
    inputs: Inputs
    measures: dict[str, Node] = field(default_factory=dict)
    coverage: dict[tuple[str, str], Node] = field(default_factory=dict)
    sfts: list[SFT] = field(default_factory=list)
    cells: list[tuple[Cell, Node]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def opened(self) -> list[Node]:
        """Nodes that are computed before anything trains, so that a bad row fails the run at once."""
        return [*self.inputs.nodes, *self.base.needs.values(), *self.coverage.values()]

    @property
    def required(self) -> list[Node]:
        """Nodes whose results a run needs, in this order."""
        return [*self.opened, *(sft.node for sft in self.sfts if sft.node is not None), *self.evaluations]

    @property
    def by_composition(self) -> list[tuple[Cell, Node]]:
        """The cells in the order they are computed: cells that compose the same SFTs follow each other."""
        return sorted(self.cells, key=lambda pair: [sft.key for sft in pair[0].sfts])

    @property
    def evaluations(self) -> list[Node]:
        """Nodes of :attr:`by_composition`; two cells that compose the same SFTs share one node."""
        return [node for _, node in self.by_composition]

    @property
    def results(self) -> list[Node]:
        """Nodes that the files of a finished run are made from."""
        return [*self.measures.values(), *self.evaluations]

    @property
    def nodes(self) -> list[Node]:
        """Every node, each after all that it needs."""
        return ordered(self.required)

    @property
    def finished(self) -> Stage:
        """The finished run as a stage whose inputs are :attr:`results`."""
        study = self.study
        languages = {
            code: [language.name, language.family, language.script] for code, language in study.targets.items()
        }
        cells = {cell.name: node.key for cell, node in self.cells}
        text_measures = {f"measures {code}": node.key for code, node in self.measures.items()}
        return Stage(
            kind="run",
            version=2,
            settings={"knobs": flat_knobs(study), "languages": languages, "schema": SCHEMA_VERSION},
            inputs={**cells, **text_measures},
            seed=study.seed,
            label=study.name,
        )

    def named(self, name: str) -> list[Node]:
        """Return the nodes of a part, if any; a finished SFT's name without a method means the main method."""
        return next((p.nodes for p in self.parts if name in _names(p, self.study)), [])


def _names(part: Part, study: StudySettings) -> list[str]:
    """Return every name that ``only=`` accepts for a part."""
    short = [f"{part.phase}:{part.whose}"] if part.method == study.methods[0] else []
    return [part.name, *short]


def trained(study: StudySettings, needs: Needs = NEEDS["run"]) -> list[tuple[str, str, str]]:
    """List the SFTs that a command trains, in training order; reads no file.

    Returns:
        For each SFT its role (``source``, ``language``, ``task``, ``task_alone``), the language of a source or language
        SFT (else empty), and its method (empty for a φ_S that all methods share, which has settings of its own).
    """
    main, *beside = study.methods
    methods = [main, *(beside if needs.lang and needs.task else ())]
    sfts = []
    if needs.task and study.source_sft is not None:
        owners = [""] if study.source_shared else methods
        sfts += [("source", code, method) for method in owners for code in study.sources]
    sfts += [("language", code, method) for method in methods for code in study.targets if needs.lang]
    sfts += [("task", "", method) for method in methods if needs.task]
    if needs.task and needs.lang and "no_language_sft" in study.controls:
        sfts.append(("task_alone", "", main))
    return sfts


def _whose(role: str, code: str) -> str:
    return ":".join(filter(None, (role, code)))


def parts_of(study: StudySettings) -> list[Part]:
    """List the parts of a study, without their nodes."""
    sfts = [(_whose(role, code), method) for role, code, method in trained(study)]
    full = [Part("full", whose) for whose in dict.fromkeys(whose for whose, _ in sfts)]
    return [Part("base"), *full, *(Part("sft", whose, method) for whose, method in sfts)]


def check_parts(study: StudySettings) -> None:
    """Refuse names in ``only`` that are no parts of the study.

    Raises:
        DeftxError: One line for each unknown name.
    """
    parts = parts_of(study)
    accepted = {name for part in parts for name in _names(part, study)}
    listed = ", ".join(part.name for part in parts)
    errors = [
        f"only={name!r} is no part of this study{did_you_mean(name, accepted)}; its parts are {listed}"
        for name in study.only
        if name not in accepted
    ]
    if errors:
        raise DeftxError("\n".join(errors))


def graph(
    study: StudySettings,
    cache: StageCache | None = None,
    *,
    needs: Needs = NEEDS["run"],
    given_sfts: GivenSFTs | None = None,
) -> StudyGraph:
    """Build the graph of a study: a function of its settings and of the contents of the files it names.

    Args:
        study: Resolved settings.
        cache: Remembers files' digests; ``None``: the study's own cache.
        needs: What the command reads and makes.
        given_sfts: SFTs to evaluate in place of trained ones.

    Raises:
        DeftxError: Data or a model is missing.
    """
    cache = cache or StageCache(study.cache_root)
    inputs = inputs_of(study, cache, needs)
    base = inputs.base
    sfts, parts = _sfts_of(study, inputs, needs, cache.root / "scratch" / "tokens")
    all_sfts, length = list(sfts.values()), study.task_sft.training.max_length
    cells: list[Cell] = []
    if given_sfts is not None:
        all_sfts, length = [given_sfts.task, *given_sfts.languages.values()], given_sfts.max_length
        condition = "source_language_only" if given_sfts.task.on else "no_language_sft"
        composed = {code: given_sfts.languages[code] for code in study.targets if code in given_sfts.languages}
        cells = [Cell(code, "composed", given_sfts.task, sft) for code, sft in composed.items()]
        cells += [Cell(code, condition, given_sfts.task, None) for code in study.targets]
    elif needs.tests:
        cells = cells_of(
            list(study.targets), study.methods, study.controls, study.source.code, sfts, study.compose.proxy
        )
    cells = [replace(cell, split=split) for split in study.splits for cell in cells]
    tested = {code: rows for (code, split), rows in inputs.tests.items() if split == study.splits[0]}
    rows: dict[str, Node | TestRows] = {**tested, **inputs.rows}
    coverage = {(code, "text"): measures(code, node, base) for code, node in inputs.texts.items()}
    coverage |= {(code, "rows"): measures(code, source, base) for code, source in rows.items()}
    evaluator = Evaluator(study, base, inputs.tests, length)
    return StudyGraph(
        study,
        base,
        inputs,
        measures={code: coverage[code, "text"] for code in study.targets if code in inputs.texts},
        coverage=coverage,
        sfts=all_sfts,
        cells=[(cell, evaluator.node(cell)) for cell in cells],
        parts=parts,
    )


def _sfts_of(
    study: StudySettings, inputs: Inputs, needs: Needs, tokens: Path
) -> tuple[dict[tuple[str, str, str], SFT], list[Part]]:
    """Build the SFTs that a command trains, keyed by the tuples of :func:`trained`, and the parts of the study."""
    base = inputs.base
    parts = {"base": Part("base", nodes=list(base.needs.values()))}
    settings = {"source": study.source_sft, "language": study.language_sft}
    sfts: dict[tuple[str, str, str], SFT] = {}
    on: dict[str, dict[str, SFT]] = {}
    for role, code, method in trained(study, needs):
        if code and code not in inputs.texts:
            continue  # a target without text
        objective: Objective
        if code:
            objective = LanguageObjective(study, base, study.languages[code], inputs.texts[code], tokens)
        else:
            under = on.get("" if study.source_shared else method, {}) if role == "task" else {}
            objective = TaskObjective(study, base, inputs.rows, under, method if method != study.methods[0] else "")
        how = settings.get(role, study.task_sft)
        if how is None:
            raise RuntimeError(f"{role}: a study without φ_S trains none")
        how = how.by(method) if method else how
        seeds = sorted(study.compose.average) if role == "language" else []
        members = [sft_nodes(objective.of_seed(seed), how) for seed in seeds] or [sft_nodes(objective, how)]
        made = [item for member in members for item in (member.select, member.final)]
        sft = members[0].sft
        if seeds:
            name = f"language {code} {how.description} mean of seeds {listed([str(seed) for seed in seeds])}"
            sft = merged_sft(code, name, [(each.sft, 1 / len(seeds)) for each in members], {"seeds": seeds})
            made += [] if sft.node is None else [sft.node]
        sfts[role, code, method] = sft
        if role == "source":
            on.setdefault(method, {})[code] = sft
        whose, shared = _whose(role, code), [item for member in members for item in member.shared]
        for part in (Part("full", whose, nodes=shared), Part("sft", whose, method, made)):
            parts.setdefault(part.name, part).add(part.nodes)
    for code, weights in study.proxies.items() if needs.lang else ():
        for method in study.methods:
            lent = [(sfts["language", other, method], weight) for other, weight in weights.items()]
            proxy = merged_sft(code, f"language {code} {method} by proxy", lent, {"proxy": weights})
            sfts["language", code, method] = proxy
            part = parts.setdefault(f"sft:language:{code}:{method}", Part("sft", f"language:{code}", method))
            part.add([] if proxy.node is None else [proxy.node])
    return sfts, list(parts.values())


# ------------------------------------------------------------------------------------------------------- looking


class Look:
    """Looks nodes of several graphs up in a cache, each node once."""

    def __init__(self, cache: StageCache) -> None:
        self.cache = cache
        self._cached: dict[str, bool] = {}

    def cached(self, node: Node) -> bool:
        """Return whether a node's result is in the cache."""
        if node.key not in self._cached:
            self._cached[node.key] = self.cache.peek(node.stage) is not None
        return self._cached[node.key]

    def required_nodes(self, nodes: Iterable[Node]) -> list[tuple[Node, bool]]:
        """List the nodes that computing ``nodes`` reads or computes, in order, and whether each is cached.

        The inputs of a cached result are not visited.
        """
        visited: dict[str, tuple[Node, bool]] = {}

        def visit(node: Node) -> None:
            if node.key in visited:
                return
            cached = self.cached(node)
            if not cached:
                for need in node.needs.values():
                    visit(need)
            visited[node.key] = (node, cached)

        for node in nodes:
            visit(node)
        return list(visited.values())


class History:
    """Durations of the stages in a cache, to estimate stages that have not run."""

    def __init__(self, cache: StageCache) -> None:
        self._seconds: dict[str, list[float]] = {}
        for entry in cache.entries():
            manifest = entry.manifest
            likeness = _likeness(entry.kind, manifest["settings"], manifest["inputs"])
            self._seconds.setdefault(likeness, []).append(float(manifest["seconds"]))

    def seconds(self, node: Node) -> float | None:
        """Return median seconds of stages of the same kind, budget and base in any language; ``None`` if none ran."""
        stage = node.stage
        durations = self._seconds.get(_likeness(stage.kind, stage.settings, stage.inputs))
        return statistics.median(durations) if durations else None

    def totals(self, nodes: Sequence[Node]) -> tuple[float, int, int]:
        """Estimated seconds, bytes, and the number of nodes without an estimate of seconds."""
        estimates = [seconds for node in nodes if (seconds := self.seconds(node)) is not None]
        return math.fsum(estimates), sum(node.size for node in nodes), len(nodes) - len(estimates)


def _likeness(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return a text that is equal for stages that take about as long."""
    training = settings.get("training") or {}
    budget = {name: value for name, value in training.items() if not name.startswith("l1_")}
    base = inputs.get("base", "") if kind not in ("profile", "run") else ""
    return repr((kind, settings.get("objective"), sorted(budget.items(), key=str), base))
