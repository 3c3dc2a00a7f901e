"""A study as a value: all of its results as nodes, their keys known before anything runs.

::

    base ─┬─ text(L) ── full(L) ── decompose(L) ── select(L) ── sparse(L) ──► φ_L ─┐
          └─ rows(T) ── full(T | φ_S) ── decompose ── select ── sparse(T) ──► φ_T ─┴─ cell(target, condition)

Running a study, a dry run, what a sweep makes first, ``only=``, looking a finished run up, and the estimate of time and
disk are readings of this one graph.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deftx.cache import Stage, StageCache
from deftx.errors import DeftxError, did_you_mean
from deftx.stages.base import Base
from deftx.stages.evaluate import Cell, Evaluator, cells_of
from deftx.stages.inputs import NEEDS, Inputs, Needs, inputs_of, measures
from deftx.stages.knobs import flat_knobs
from deftx.stages.learn import sft_nodes
from deftx.stages.node import Node, ordered
from deftx.stages.objectives import SFT, LanguageObjective, Objective, TaskObjective
from deftx.stages.settings import StudySettings
from deftx.tracking import SCHEMA_VERSION


class GivenSFTs(NamedTuple):
    """SFTs that the user gave, to be evaluated in place of trained ones.

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
    """A named part of a study, which a sweep's jobs may share: ``only=`` takes its name.

    Attributes:
        phase: ``base`` (the encoder), ``full`` (a full phase with its decomposition, which all ranks and mask sizes
            share) or ``sft`` (a finished SFT).
        whose: ``source:CODE`` (φ_S), ``language:CODE`` (a target's φ_L), ``task`` (φ_T on the φ_S) or ``task_alone``
            (φ_T on θ⁰).
        method: Of a finished SFT, but for φ_S, which has settings of its own.
        nodes: What belongs to it; asking for the last one makes all of them. Empty where there is nothing to make.
    """

    phase: str
    whose: str = ""
    method: str = ""
    nodes: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Such as ``sft:language:ace:deftx``."""
        return ":".join(filter(None, (self.phase, self.whose, self.method)))

    def add(self, nodes: Iterable[Node]) -> None:
        """Add nodes that are not there yet."""
        known = {item.key for item in self.nodes}
        self.nodes += [item for item in nodes if item.key not in known]


@dataclass
class StudyGraph:
    """The nodes of one study, and what each is to it.

    Attributes:
        study: Its settings.
        base: θ⁰.
        inputs: What it reads: the generated family, text by language, labelled rows by source, test rows by target.
        measures: Nodes of the measures of the targets' text, by language.
        sfts: Every SFT, in the order they are made.
        cells: What is evaluated, in the order it is shown, with its node.
        parts: Named parts of the study, for later runs.
    """

    study: StudySettings
    base: Base
    inputs: Inputs
    measures: dict[str, Node] = field(default_factory=dict)
    sfts: list[SFT] = field(default_factory=list)
    cells: list[tuple[Cell, Node]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def opened(self) -> list[Node]:
        """What is made before anything trains, so that no bad row is found hours later."""
        return [*self.inputs.nodes, *self.base.needs.values(), *self.measures.values()]

    @property
    def wanted(self) -> list[Node]:
        """What a run asks for, in this order."""
        return [*self.opened, *(sft.node for sft in self.sfts if sft.node is not None), *self.evaluations]

    @property
    def by_composition(self) -> list[tuple[Cell, Node]]:
        """The cells in the order they are computed: those that compose the same follow each other."""
        return sorted(self.cells, key=lambda item: [sft.key for sft in item[0].sfts])

    @property
    def evaluations(self) -> list[Node]:
        """The cells' nodes in that order; two cells that compose the same have one node."""
        return [item for _, item in self.by_composition]

    @property
    def results(self) -> list[Node]:
        """What the files of a finished run are made from."""
        return [*self.measures.values(), *self.evaluations]

    @property
    def nodes(self) -> list[Node]:
        """Every node, each after all that it needs."""
        return ordered(self.wanted)

    @property
    def finished(self) -> Stage:
        """The finished run as a stage: all that its files are made from."""
        study = self.study
        about = {code: [item.name, item.family, item.script] for code, item in study.targets.items()}
        cells = {cell.name: item.key for cell, item in self.cells}
        return Stage(
            kind="run",
            version=2,
            settings={"knobs": flat_knobs(study), "languages": about, "schema": SCHEMA_VERSION},
            inputs={**cells, **{f"measures {code}": item.key for code, item in self.measures.items()}},
            seed=study.seed,
            label=study.name,
        )

    def named(self, name: str) -> list[Node]:
        """The nodes of a part; that of a finished SFT may be named without its method, which then is the main one."""
        return next((p.nodes for p in self.parts if name in _names(p, self.study)), [])


def _names(part: Part, study: StudySettings) -> list[str]:
    short = [f"{part.phase}:{part.whose}"] if part.method == study.methods[0] else []
    return [part.name, *short]


def trained(study: StudySettings, needs: Needs = NEEDS["run"]) -> list[tuple[str, str, str]]:
    """The SFTs that a command trains, in the order in which they are made; known without looking at any file.

    Returns:
        For each its role (``source``, ``language``, ``task``, ``task_alone``), the language of a language SFT, and its
        method. φ_S has settings of its own, and so no method of the study's.
    """
    main, *beside = study.methods
    methods = [main, *(beside if needs.lang and needs.task else ())]
    found = [("source", code, "") for code in study.sources if needs.task and study.source_sft is not None]
    found += [("language", code, method) for method in methods for code in study.targets if needs.lang]
    found += [("task", "", method) for method in methods if needs.task]
    if needs.task and needs.lang and "no_language_sft" in study.controls:
        found.append(("task_alone", "", main))
    return found


def _whose(role: str, code: str) -> str:
    return ":".join(filter(None, (role, code)))


def parts_of(study: StudySettings) -> list[Part]:
    """The parts of a study without their nodes."""
    whose = [(_whose(role, code), method) for role, code, method in trained(study)]
    full = [Part("full", item) for item in dict.fromkeys(item for item, _ in whose)]
    return [Part("base"), *full, *(Part("sft", item, method) for item, method in whose)]


def check_parts(study: StudySettings) -> None:
    """Refuse names in ``only`` that are no parts of the study.

    Raises:
        DeftxError: One line for each.
    """
    parts = parts_of(study)
    known = {name for part in parts for name in _names(part, study)}
    wrong = [name for name in study.only if name not in known]
    if wrong:
        names = [part.name for part in parts]
        raise DeftxError(
            "\n".join(
                f"only={name!r} is no part of this study{did_you_mean(name, known)}; its parts are {', '.join(names)}"
                for name in wrong
            )
        )


def graph(
    study: StudySettings,
    cache: StageCache | None = None,
    *,
    needs: Needs = NEEDS["run"],
    given: GivenSFTs | None = None,
) -> StudyGraph:
    """The nodes of a study; a function of its settings and of the contents of the files it names.

    Args:
        study: Resolved settings.
        cache: Remembers files' digests; None: that of the study.
        needs: What the command reads and makes.
        given: SFTs to evaluate in place of trained ones.

    Raises:
        DeftxError: Data or a model that is not there.
    """
    cache = cache or StageCache(study.cache_root)
    inputs = inputs_of(study, cache, needs)
    base = inputs.base
    sfts, parts = _sfts_of(study, inputs, needs, cache.root / "scratch" / "tokens")
    all_sfts, length = list(sfts.values()), study.task_sft.training.max_length
    cells: list[Cell] = []
    if given is not None:
        all_sfts, length = [given.task, *given.languages.values()], given.max_length
        condition = "source_language_only" if given.task.on else "no_language_sft"
        composed = {code: given.languages[code] for code in study.targets if code in given.languages}
        cells = [Cell(code, "composed", given.task, sft) for code, sft in composed.items()]
        cells += [Cell(code, condition, given.task, None) for code in study.targets]
    elif needs.tests:
        cells = cells_of(list(study.targets), study.methods, study.controls, study.source.code, sfts)
    evaluator = Evaluator(study, base, inputs.tests, length)
    return StudyGraph(
        study,
        base,
        inputs,
        measures={code: measures(code, inputs.texts[code], base) for code in study.targets if code in inputs.texts},
        sfts=all_sfts,
        cells=[(cell, evaluator.node(cell)) for cell in cells],
        parts=parts,
    )


def _sfts_of(
    study: StudySettings, inputs: Inputs, needs: Needs, tokens: Path
) -> tuple[dict[tuple[str, str, str], SFT], list[Part]]:
    """The SFTs that a command trains, by what :func:`trained` says of each, and the parts of the study."""
    base = inputs.base
    parts = {"base": Part("base", nodes=list(base.needs.values()))}
    settings = {"source": study.source_sft, "language": study.language_sft}
    sfts: dict[tuple[str, str, str], SFT] = {}
    on: dict[str, SFT] = {}
    for role, code, method in trained(study, needs):
        if code and code not in inputs.texts:
            continue  # a target without text
        objective: Objective
        if code:
            objective = LanguageObjective(study, base, study.languages[code], inputs.texts[code], tokens)
        else:
            objective = TaskObjective(study, base, inputs.rows, on if role == "task" else {})
        how = settings.get(role, study.task_sft)
        if how is None:
            raise RuntimeError(f"{role}: a study without φ_S trains none")
        nodes = sft_nodes(objective, how.by(method) if method else how)
        sfts[role, code, method] = nodes.sft
        if role == "source":
            on[code] = nodes.sft
        whose = _whose(role, code)
        for part in (Part("full", whose, nodes=nodes.shared), Part("sft", whose, method, [nodes.select, nodes.final])):
            parts.setdefault(part.name, part).add(part.nodes)
    return sfts, list(parts.values())


# ------------------------------------------------------------------------------------------------------- looking


class Look:
    """What of some graphs is in a cache; nodes that several of them share are looked up once."""

    def __init__(self, cache: StageCache) -> None:
        self.cache = cache
        self._cached: dict[str, bool] = {}

    def cached(self, item: Node) -> bool:
        """Whether a node's result is there."""
        if item.key not in self._cached:
            self._cached[item.key] = self.cache.peek(item.stage) is not None
        return self._cached[item.key]

    def asked(self, wanted: Iterable[Node]) -> list[tuple[Node, bool]]:
        """The nodes that making some results asks for, in order, and whether each is there.

        What made a result that is there is not asked for.
        """
        found: dict[str, tuple[Node, bool]] = {}

        def visit(item: Node) -> None:
            if item.key in found:
                return
            there = self.cached(item)
            if not there:
                for need in item.needs.values():
                    visit(need)
            found[item.key] = (item, there)

        for item in wanted:
            visit(item)
        return list(found.values())


class History:
    """How long stages took that are in a cache, as a guess at those that are not."""

    def __init__(self, cache: StageCache) -> None:
        self._seconds: dict[str, list[float]] = {}
        for entry in cache.entries():
            item = entry.manifest
            likeness = _likeness(entry.kind, item["settings"], item["inputs"])
            self._seconds.setdefault(likeness, []).append(float(item["seconds"]))

    def seconds(self, item: Node) -> float | None:
        """The median of stages of the same kind, budget and base, whatever their language; None where none ran."""
        stage = item.stage
        found = self._seconds.get(_likeness(stage.kind, stage.settings, stage.inputs))
        return statistics.median(found) if found else None

    def totals(self, nodes: Sequence[Node]) -> tuple[float, int, int]:
        """Seconds, bytes, and how many of the nodes have no seconds to go by."""
        guesses = [self.seconds(item) for item in nodes]
        known = [value for value in guesses if value is not None]
        return math.fsum(known), sum(item.size for item in nodes), len(guesses) - len(known)


def _likeness(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What stages that take about as long have in common."""
    training = settings.get("training") or {}
    told = {name: value for name, value in training.items() if not name.startswith("l1_")}
    base = inputs.get("base", "") if kind not in ("profile", "run") else ""
    return repr((kind, settings.get("objective"), sorted(told.items(), key=str), base))
