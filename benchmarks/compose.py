"""Applying an SFT, to the base and beside a task SFT, and switching language SFTs beside it.

Plain adds dense differences of state dicts; to switch, it copies the base's parameters back (from memory, not from a
file) and adds the task's and the next language's differences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Goal, Row, Run, timed_row
from benchmarks.shapes import Shape
from deftx.core.composition import Composition


class Models:
    """Two models, one for each side, at θ⁰ + φ_T until asked otherwise; a task SFT and two language SFTs."""

    def __init__(self, shape: Shape) -> None:
        self.base = shapes.noise(shapes.parameter_shapes(shape), 0)
        self.task = shapes.sparse_delta(shape, shape.k_task, 10)
        self.languages = [shapes.sparse_delta(shape, shape.k, 20 + number) for number in range(2)]
        self.ours = {name: tensor.clone() for name, tensor in self.base.items()}
        self.plain = {name: tensor.clone() for name, tensor in self.base.items()}
        self.composition = Composition(self.ours, base_fingerprint="0" * 64)
        self.composition.add("task", self.task)
        self.dense_task = shapes.dense(self.task)
        self.dense_languages = [shapes.dense(delta) for delta in self.languages]
        self.turn = {"ours": 0, "plain": 0}
        self.reset()

    def bare(self) -> None:
        """Both models at θ⁰."""
        self.composition.clear()
        _reload(self.plain, self.base)

    def reset(self) -> None:
        """Both models at θ⁰ + φ_T."""
        if "language" in self.composition.terms:
            self.composition.remove("language")
        if "task" not in self.composition.terms:
            self.composition.add("task", self.task)
        _reload(self.plain, self.base)
        _add(self.plain, self.dense_task)

    def apply_ours(self) -> None:
        """Add the first language SFT."""
        self.composition.add("language", self.languages[0])

    def apply_plain(self) -> None:
        """Add its dense differences."""
        _add(self.plain, self.dense_languages[0])

    def switch_ours(self) -> None:
        """Remove the language SFT, add the other one."""
        self.turn["ours"] = 1 - self.turn["ours"]
        self.composition.remove("language")
        self.composition.add("language", self.languages[self.turn["ours"]])

    def switch_plain(self) -> None:
        """Copy the base back and add both differences."""
        self.turn["plain"] = 1 - self.turn["plain"]
        _reload(self.plain, self.base)
        _add(self.plain, self.dense_task)
        _add(self.plain, self.dense_languages[self.turn["plain"]])

    def distance(self) -> float:
        """Largest difference between the two models."""
        return max(float((self.ours[name] - self.plain[name]).abs().max()) for name in self.base)


def _add(model: Mapping[str, Tensor], difference: Mapping[str, Tensor]) -> None:
    for name, tensor in difference.items():
        model[name].add_(tensor)


def _reload(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in base.items():
            model[name].copy_(tensor)


def measure(run: Run) -> list[Row]:
    """Seconds to apply, and to switch."""
    run.say("making three SFTs")
    models = Models(run.shape)
    sides = {"ours": models.apply_ours, "plain": models.apply_plain}
    apply = run.alternate("apply", sides, models.bare)
    beside = run.alternate("apply beside a task SFT", sides, models.reset)
    models.reset()
    models.apply_ours()
    models.apply_plain()
    switch = run.alternate("switch", {"ours": models.switch_ours, "plain": models.switch_plain})
    k = run.shape.k
    return [
        timed_row(
            f"apply a language SFT, K = {k:,}",
            apply,
            goals=(Goal("value", 0.1),),
            quoted="0.093 s",
            note="to the base; plain: add dense differences",
        ),
        timed_row(
            "apply it beside a task SFT",
            beside,
            note=f"whose {run.shape.k_task:,} coordinates it meets in part",
        ),
        timed_row(
            "switch the language SFT",
            switch,
            goals=(Goal("value", 0.2),),
            note="remove and add; plain: copy the base back from memory, add two dense differences",
            facts={"largest_difference": models.distance()},
        ),
    ]
