"""The plots of a section: draws those with data, and gives the reason for each that is left out.

Every plot is a function that returns a figure with its caption, or the reason why it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deftx.plots.style import Drawn, house_style, save

if TYPE_CHECKING:
    from deftx.report.summary import Summary

__all__ = ["Plots", "make_plots"]


@dataclass(frozen=True)
class Plots:
    """The plots of one section.

    Attributes:
        drawn: Title, caption and SVG text of each plot.
        left_out: Title -> reason.
    """

    drawn: list[tuple[str, str, str]]
    left_out: dict[str, str]


def make_plots(summary: Summary, folder: Path) -> Plots:
    """Draw every plot that has data, as SVG and PNG files.

    Args:
        summary: The section's summary.
        folder: The folder of the files.
    """
    from deftx.report.plots import facts, layers, scores

    recipes: list[tuple[str, str, Callable[[Summary], Drawn | str]]] = [
        ("overview", "Scores at a glance", scores.overview),
        ("rank", "Score against rank", scores.against_rank),
        ("density", "Score against density", scores.against_density),
        ("rank_x_sparsity", "Rank × sparsity", scores.rank_by_sparsity),
        ("residual", "Score against the residual policy", scores.against_residual),
        ("energy", "Retained energy by layer", layers.energy),
        ("kept_rank", "Kept rank by layer", layers.kept_rank),
        ("spectra", "Singular values by layer", layers.spectra),
        ("mask", "Mask density by layer and module", layers.mask_density),
        ("overlap", "Overlap and sign conflicts against score", facts.overlap),
        ("cost", "Cost against score", facts.cost),
        ("morphology", "Best density against morphology", facts.morphology),
    ]
    drawn, left_out = [], {}
    with house_style():
        for name, title, draw in recipes:
            result = draw(summary)
            if isinstance(result, str):
                left_out[title] = result
            else:
                drawn.append((title, result.caption, save(result, folder / f"{summary.section.slug}-{name}")))
    return Plots(drawn, left_out)
