"""How cost grows: step time and memory, denoising, selection and evaluation over one size at a time.

Sizes stay small; each curve is fitted by least squares to a + b · x, where x is the term that the algorithm's count of
operations says should dominate. The relative residual (root mean square over the mean) says how well that holds.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import optimizer, select, shapes
from benchmarks.denoise import ours as denoised
from benchmarks.evaluate import Study
from benchmarks.harness import Run, alternate, amount
from benchmarks.mlm_step import CLIP
from benchmarks.shapes import SHAPES

SMALL = replace(SHAPES["mini"], batch=4, length=64, rows=24)


@dataclass
class Curve:
    """One measured curve and the line through it.

    Attributes:
        name: what was measured.
        formula: what it should follow, in words.
        sizes: the size as shown, a point each.
        x: the formula's term at each point.
        y: what was measured, in ``unit``.
        unit: ``s`` or ``bytes``.
    """

    name: str
    formula: str
    sizes: list[str]
    x: list[float]
    y: list[float]
    unit: str = "s"

    def fit(self) -> tuple[float, float, float]:
        """Least squares: a, b and the relative residual of a + b · x."""
        x, y = torch.tensor(self.x, dtype=torch.float64), torch.tensor(self.y, dtype=torch.float64)
        scale = x.abs().max()  # columns of like size: 1e9 operations beside a constant would be ill-conditioned
        columns = torch.stack([torch.ones_like(x), x / scale], dim=1)
        a, b = torch.linalg.lstsq(columns, y[:, None], driver="gelsd").solution.flatten().tolist()
        residual = (columns @ torch.tensor([a, b], dtype=torch.float64) - y).square().mean().sqrt() / y.mean().abs()
        return a, b / float(scale), float(residual)

    def law(self) -> str:
        """The fitted line in words."""
        a, b, residual = self.fit()
        return f"{amount(a, self.unit)} + {b:.3g} {self.unit} · ({self.formula}); residual {residual:.0%}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        a, b, residual = self.fit()
        return {**asdict(self), "a": a, "b": b, "residual": residual}

    def show(self, console: Console) -> None:
        """Print one line of sizes and one of what was measured."""
        console.print(f"[bold]{self.name}[/bold]: {self.law()}", highlight=False)
        table = Table()
        for size in self.sizes:
            table.add_column(size, justify="right")
        table.add_row(*(amount(value, self.unit) for value in self.y))
        console.print(table)

    def markdown(self) -> str:
        """The same for a document."""
        rows = [["", *self.sizes], ["---", *["---:"] * len(self.sizes)]]
        rows.append([self.name, *(amount(value, self.unit) for value in self.y)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{self.law()}\n"


def _timed(function: Callable[[], object], repeats: int) -> float:
    return statistics.median(alternate({"ours": function}, repeats)["ours"])


def _steps(
    run: Run, name: str, formula: str, points: Sequence[tuple[str, float, dict[str, Any]]], phase: str = "full"
) -> list[Curve]:
    """Time and peak memory of a phase's step, a fresh process a point."""
    times, peaks = [], []
    for size, _, sizes in points:
        run.say(f"{name}: {size}")
        small = replace(run, shape=replace(SMALL, **sizes), say=lambda _: None)
        found = small.peak_memory("mlm_step", "ours", phase, repeats=run.repeats)
        times.append(found["seconds"])
        peaks.append(float(found["peak"]))
    labels, x = [size for size, _, _ in points], [value for _, value, _ in points]
    return [
        Curve(f"{phase} phase's step over {name}", formula, labels, x, times),
        Curve(f"{phase} phase's peak memory over {name}", formula, labels, x, peaks, "bytes"),
    ]


def measure(run: Run) -> list[Curve]:
    """All curves; sizes do not depend on the run's shape."""
    curves = _steps(run, "layers", "layers", [(f"{n} layers", n, {"layers": n}) for n in (1, 2, 4, 8)])
    words = (4000, 8000, 16000, 32000)
    curves += _steps(run, "vocabulary", "tokens", [(f"{n:,} tokens", n, {"vocabulary": n}) for n in words])

    times, states, chosen = [], [], (0.01, 0.02, 0.04, 0.08, 0.16)
    parameters = optimizer.parameters_of(shapes.noise(shapes.parameter_shapes(SMALL), 0))
    counts = [round(share * shapes.entries(dict(parameters))) for share in chosen]
    for k in counts:
        run.say(f"optimizer step: K = {k:,}")
        selection = shapes.mask(SMALL, k)
        step, used = optimizer.ours(parameters, selection, itertools.repeat(CLIP))
        times.append(_timed(step, run.repeats))
        states.append(float(optimizer.state_bytes(used, selection)))
    labels = [f"K = {k:,}" for k in counts]
    curves += _steps(run, "K", "K", [(f"K = {k:,}", k, {"k": k}) for k in counts], "sparse")
    curves.append(Curve("sparse optimizer step over K", "K", labels, list(counts), times))
    curves.append(Curve("sparse optimizer state over K", "K", labels, list(counts), states, "bytes"))

    generator = torch.Generator().manual_seed(0)
    for name, formula, sizes in (
        ("denoising a tall matrix", "m n²", [(m, 256) for m in (2000, 4000, 8000, 16000, 32000)]),
        ("denoising a square matrix", "n³", [(n, n) for n in (128, 256, 512, 768, 1024)]),
    ):
        times = []
        for m, n in sizes:
            run.say(f"{name}: {m} × {n}")
            delta = {"matrix": shapes.changed((m, n), generator)}
            times.append(_timed(lambda delta=delta: denoised(delta, [32]), run.repeats))  # type: ignore[misc]
        labels = [f"{m} × {n}" for m, n in sizes]
        curves.append(Curve(name, formula, labels, [float(m * n * n) for m, n in sizes], times))

    times, numbers = [], [1 << power for power in (22, 23, 24, 25, 26)]
    for n in numbers:
        run.say(f"selection: N = {n:,}")
        delta = {"all": torch.randn(n, generator=generator)}
        times.append(_timed(lambda delta=delta, n=n: select.ours(delta, round(0.02764 * n)), run.repeats))  # type: ignore[misc]
    curves.append(Curve("selection of 2.764 % over N", "N", [f"N = {n:,}" for n in numbers], list(numbers), times))

    times, languages = [], (1, 2, 4, 8, 12)
    run.say("evaluation")
    with tempfile.TemporaryDirectory() as root:
        study = Study(Path(root), SMALL)
        for n in languages:
            run.say(f"evaluation: {n} languages")
            times.append(_timed(lambda n=n: study.ours(n), run.repeats))  # type: ignore[misc]
    labels = [f"{n} languages" for n in languages]
    curves.append(Curve("evaluation over languages", "languages", labels, list(languages), times))
    return curves
