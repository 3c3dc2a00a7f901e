"""What the jobs of a sweep consist of, and what of it runs first: parts that several jobs share, each once, in waves.

A wave's parts do not need one another. After the last wave no job has to wait for another's full phase, and none holds
a device while it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter

from deftx.cache import Entry, StageCache
from deftx.stages.graph import Look, StudyGraph, graph
from deftx.stages.node import Node
from deftx.stages.settings import StudySettings

_TRAINS = ("pretrain", "full", "sparse", "direct")


@dataclass
class JobPlan:
    """One job of ``deftx run``, looked at before it runs.

    Attributes:
        graph: Its nodes.
        nodes: The nodes that it would read or compute, and whether each is in the cache.
        finished: The very same run, if it was finished before.
    """

    graph: StudyGraph
    nodes: list[tuple[Node, bool]]
    finished: Entry | None

    @property
    def missing(self) -> list[Node]:
        """The nodes that it would compute."""
        return [item for item, is_cached in self.nodes if not is_cached]


def plan_jobs(studies: Sequence[StudySettings]) -> dict[int, JobPlan]:
    """Look at every job of a sweep; nothing is computed and nothing written.

    Args:
        studies: Resolved settings of each job, checked by :func:`~deftx.stages.preflight.preflight`.

    Raises:
        DeftxError: Data that cannot be read.
    """
    looks: dict[str, Look] = {}
    plans = {}
    for number, study in enumerate(studies):
        look = looks.setdefault(study.cache_root, Look(StageCache(study.cache_root, remember=False)))
        study_graph = graph(study, look.cache)
        nodes = look.required_nodes(study_graph.required)
        # Parts of a study are no result: they are made, whatever was finished before.
        whole = not study.only and all(look.cached(item) for item in study_graph.results)
        plans[number] = JobPlan(study_graph, nodes, look.cache.peek(study_graph.finished) if whole else None)
    return plans


@dataclass
class SharedPart:
    """A part that is made before the jobs.

    Attributes:
        key: Of the node that its jobs share.
        names: As ``only`` takes it (:class:`deftx.stages.graph.Part`), by job: methods may share an SFT.
        whose: Whose full phase or SFT it is.
        label: What messages call it.
        own: Keys of its own nodes that are missing.
        closure: Keys of all nodes that making it computes.
        job: The job whose settings make it: the one that needs most of it (LT-SFT's needs no decomposition).
    """

    key: str
    whose: str
    label: str
    names: dict[int, str] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    closure: set[str] = field(default_factory=set)
    job: int = 0

    @property
    def name(self) -> str:
        """What it is called in the job that makes it."""
        return self.names[self.job]

    @property
    def jobs(self) -> set[int]:
        """Numbers of the jobs that need it."""
        return set(self.names)

    def needs(self, other: SharedPart) -> bool:
        """Return whether making it makes what the jobs of the other share.

        That two parts have a node in common is not enough: SFTs with one random mask share its selection.
        """
        return other is not self and other.key in self.closure


def shared_parts(plans: Mapping[int, JobPlan]) -> list[list[SharedPart]]:
    """Return the waves of a sweep.

    Args:
        plans: Of each job that will run.

    Returns:
        Waves in order, each with its parts; empty where nothing is shared.
    """
    parts: dict[str, SharedPart] = {}
    for number, plan in plans.items():
        missing = {item.key: item for item in plan.missing}
        for part in plan.graph.parts:
            own = [item for item in part.nodes if item.key in missing]
            if not own:
                continue
            # Jobs share a part when they share what trains in it; rank and K stand between a full phase and the SFTs.
            anchor = next((item for item in own if item.stage.kind in _TRAINS), own[-1])
            shared = parts.setdefault(anchor.key, SharedPart(anchor.key, part.whose, anchor.stage.label))
            shared.names.setdefault(number, part.name)
            keys = {item.key for item in own}
            if len(keys) > len(shared.own):
                shared.whose, shared.own, shared.job = part.whose, keys, number
                shared.names[number] = part.name
                shared.closure = _closure(own[-1], missing)
    shared_ones = [item for item in parts.values() if len(item.jobs) > 1]
    parts = {item.key: item for item in shared_ones if not _made_with_its_sft(item, shared_ones)}
    order = TopologicalSorter(
        {item.key: [other.key for other in parts.values() if item.needs(other)] for item in parts.values()}
    )
    order.prepare()
    waves = []
    while ready := set(order.get_ready()):
        waves.append([item for item in parts.values() if item.key in ready])
        order.done(*ready)
    return waves


def _made_with_its_sft(part: SharedPart, parts: Sequence[SharedPart]) -> bool:
    """Return whether the same jobs share the one SFT that a full phase is for: then that one is the part."""
    readers = [other for other in parts if other.needs(part) and other.whose == part.whose]
    return len(readers) == 1 and readers[0].jobs == part.jobs and part.own <= readers[0].closure


def _closure(item: Node, missing: Mapping[str, Node]) -> set[str]:
    """Return the keys of the missing nodes that making one computes, itself included."""
    keys: set[str] = set()

    def visit(node: Node) -> None:
        if node.key in missing and node.key not in keys:
            keys.add(node.key)
            for need in node.needs.values():
                visit(need)

    visit(item)
    return keys
