"""What each command reads: what it is asked to read beyond that is refused, and its help shows no more."""

from __future__ import annotations

from collections.abc import Sequence

OWN = {
    "run": (),
    "sft": ("kind", "out"),
    "eval": ("task_sft", "language_sft"),
    "pretrain": ("text", "out"),
}
"""Knobs of one command alone."""

_POLICIES = (
    "rank",
    "residual",
    "k",
    "density",
    "value_dtype",
    "mask",
    "second_phase",
    "ablate",
    "method",
    "denoise",
    "sparsity",
)
_TRAINING = (*_POLICIES, "seed", "missing_text", "source", "budget", "lang", "corpus")
_STUDY = ("study", "task", "language", "logger", "launcher", "paths")
_BASE = ("model", "trainer", "data", "synthetic")
READS = {
    "run": (*_TRAINING, *_STUDY, *_BASE, "compare", "controls", "split", "only", "search"),
    "sft": (*_TRAINING, *_STUDY, *_BASE),
    "eval": (*_STUDY, *_BASE, "split"),
    "pretrain": (*_BASE, "launcher", "paths"),
}
"""Top-level keys and groups of ``conf/run.yaml`` by command."""


def unread(name: str, keys: Sequence[str]) -> list[str]:
    """One message for each key that a command would ignore.

    Args:
        name: The command.
        keys: Keys and groups of overrides, such as ``rank`` or ``lang.training.epochs``.
    """
    problems = []
    every = {*READS["run"], *(knob for knobs in OWN.values() for knob in knobs)}
    for key in keys:
        top = key.split(".")[0].split("@")[0]
        if top in every and top not in READS[name] and top not in OWN[name]:
            homes = [command for command in OWN if top in READS[command] or top in OWN[command]]
            problems.append(f"{key} is not read by deftx {name}; it belongs to deftx {', '.join(homes)}")
    return problems
