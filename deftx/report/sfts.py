"""What the SFTs of a run are, and which of them its compositions consist of.

A result lists every SFT that a run made or read. φ_S, the source language's SFT under the task SFT, and the task SFT of
the control without language SFTs are in no composition of a method: they must not be averaged with those that are. What
a result does not say of an SFT is read from its name (``language ace deftx rank=16 residual=drop``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deftx.report.collect import Run

METHODS = ("deftx", "ltsft", "random_mask")
_ON_SFT = "θ⁰+"

Policy = tuple[str | None, str | None, bool, bool]
"""Rank, residual, whether the mask is random, whether there is a second phase."""


@dataclass(frozen=True)
class About:
    """One SFT.

    Attributes:
        role: ``language`` or ``task``, or what its name begins with.
        languages: Those it was trained on, or on whose SFT.
        method: One of :data:`METHODS`; empty where nothing says it.
    """

    role: str
    languages: tuple[str, ...]
    method: str


def about(name: str, said: Mapping[str, Any]) -> About:
    """What an SFT is: as its result says, else from its name."""
    words = name.split()
    languages = said.get("languages") or (words[1:2] if words[:1] == ["language"] else [])
    method = said.get("method") or next((word for word in words if word in METHODS), "")
    return About(str(said.get("role") or (words or [""])[0]), tuple(map(str, languages)), str(method))


def told(run: Run, names: Iterable[str] = ()) -> dict[str, About]:
    """The SFTs of a run's result, and others by name."""
    said = {str(sft.get("name")): sft for sft in run.record.sfts}
    return {name: about(name, said.get(name, {})) for name in dict.fromkeys([*said, *names])}


def composed(run: Run, known: Mapping[str, About], paired: Collection[str] = ()) -> set[str]:
    """Names of the SFTs that a run's methods compose.

    Args:
        run: Its settings tell a target's own SFT from φ_S of the same language.
        known: What :func:`told` gave.
        paired: SFTs that the run's diagnostics say were composed; empty where there are no diagnostics.
    """
    # Given SFTs are composed as they are, whatever trained them and on whatever language.
    if run.record.job_type == "eval":
        return set(known)
    tasks = [(name, item) for name, item in known.items() if item.role == "task"]
    in_pairs = {item.method for name, item in tasks if name in paired}
    on_sft = {item.method for name, item in tasks if _ON_SFT in name}

    def is_control(name: str, method: str) -> bool:
        if method in in_pairs:
            return name not in paired
        return method in on_sft and _ON_SFT not in name

    found = {name for name, item in tasks if not is_control(name, item.method)}
    return found | {name for name, item in known.items() if item.role == "language" and _is_targets(run, name, item)}


def under_tasks(run: Run, known: Mapping[str, About]) -> set[str]:
    """Names of the SFTs that a run's task SFTs were trained on: φ_S, also where it is a target's SFT, too."""
    if run.record.job_type == "eval":
        return set()
    targets, sources = _targets(run), _sources(run)
    policy = _policy(run.record.settings, "source")
    return {
        name
        for name, item in known.items()
        if item.role == "language"
        and item.languages
        and (
            not set(item.languages) & targets
            or (bool(set(item.languages) & sources) and _policy_of(name, item) in (policy, None))
        )
    }


def _is_targets(run: Run, name: str, item: About) -> bool:
    mine = set(item.languages)
    if not mine & _targets(run):
        return not mine  # nothing says whose it is
    if not mine & _sources(run):
        return True
    settings = run.record.settings
    own = _policy(settings, "lang")
    return _policy_of(name, item) in (own, (None, None, *own[2:]), None)


def _targets(run: Run) -> set[str]:
    return {str(code) for code in run.record.settings.get("language") or []}


def _sources(run: Run) -> set[str]:
    settings = run.record.settings
    return {str(code) for code in (settings.get("task.source"), *(settings.get("task.more_sources") or [])) if code}


def _policy(settings: Mapping[str, Any], prefix: str) -> Policy:
    rank, residual = (settings.get(f"{prefix}.{key}") for key in ("rank", "residual"))
    return (
        None if rank is None else str(rank),
        None if rank is None or residual is None else str(residual),
        settings.get(f"{prefix}.mask") == "random",
        settings.get(f"{prefix}.second_phase") is not False,
    )


def _policy_of(name: str, item: About) -> Policy | None:
    """An SFT's own policy, from its name; None where the name does not say it."""
    values = dict(word.split("=", 1) for word in name.split() if "=" in word)
    if item.method not in METHODS or (item.method == "deftx" and "rank" not in values):
        return None
    random = item.method == "random_mask" or "random mask" in name
    return values.get("rank"), values.get("residual"), random, "without second phase" not in name
