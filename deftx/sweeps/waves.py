"""What a sweep runs first: stages that several of its jobs need, each part once, in waves.

A wave's parts do not need one another. After the last wave no job has to wait for another's full phase, and none holds
a device while it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deftx.stages.plan import PlannedStage, StudyPlan

FULL = {"source": 1, "language": 1, "task_alone": 1, "task": 2}
"""The wave of a full phase, by whose it is; the base's is 0."""
SFT = {"source": 1, "language": 2, "task_alone": 2, "task": 3}
"""The wave of a finished SFT. φ_S is finished with its full phase: the task's full phase waits for it."""


@dataclass
class Part:
    """A part of the study to make before the jobs.

    Attributes:
        name: As ``only`` takes it (:mod:`deftx.stages.parts`).
        level: Its wave.
        label: For people.
        jobs: Numbers of the jobs that need it.
        keys: Keys of the stages it computes.
        job: The job whose settings make it: the one that needs most of it (LT-SFT's needs no decomposition).
    """

    name: str
    level: int
    label: str
    jobs: set[int] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    job: int = 0


def shared_parts(plans: Mapping[int, StudyPlan]) -> list[list[Part]]:
    """The waves of a sweep.

    Args:
        plans: Of each job that will run.

    Returns:
        Waves in order, each with its parts; empty where nothing is shared.
    """
    found: dict[tuple[int, str], Part] = {}
    most: dict[tuple[int, str], int] = {}
    for number, plan in plans.items():
        by_part: dict[str, list[PlannedStage]] = {}
        for item in plan.missing:
            if item.part:
                by_part.setdefault(item.part, []).append(item)
        for name, items in by_part.items():
            phase, whose = [*name.split(":"), ""][:2]
            level = 0 if phase == "base" else (FULL if phase == "full" else SFT)[whose]
            # Of a full phase its first missing stage is what jobs share, of an SFT its last: rank and K come between.
            anchor = items[-1 if phase == "sft" else 0].stage
            if phase == "sft" and whose == "source":
                items = [*by_part.get(name.replace("sft:", "full:", 1), []), *items]
            keys = {item.stage.key for item in items}
            part = found.setdefault((level, anchor.key), Part(name, level, anchor.label))
            part.jobs.add(number)
            part.keys |= keys
            if len(keys) > most.get((level, anchor.key), 0):
                most[level, anchor.key], part.job = len(keys), number
    waves: dict[int, list[Part]] = {}
    claimed: set[str] = set()
    # φ_S before the full phases of its wave: the one under it is then no part of its own.
    for (_, anchor_key), part in sorted(found.items(), key=lambda item: (item[0][0], item[1].name[:3] != "sft")):
        if len(part.jobs) > 1 and anchor_key not in claimed:
            claimed |= part.keys
            waves.setdefault(part.level, []).append(part)
    return [waves[level] for level in sorted(waves)]
