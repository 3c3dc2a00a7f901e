"""Plots of what happened inside an SFT: where its mask lies, and the spectra of its weight changes.

They read rows of ``diagnostics.parquet``; a layer below 0 stands for what lies outside of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from deftx.plots.style import DASHES, MARKERS, heat_map, legend, panels, shades, titled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = {"language": "language SFTs", "task": "task SFTs"}
_ORDER = ("embeddings", "attention.self", "attention.output", "intermediate", "output")
_SHORT = {"attention.self.": "att.", "attention.output.": "att.out.", "embeddings.": "emb. "}
_FLOOR = 1e-6  # of singular values: zero has no logarithm


def mask_density(parts: Sequence[tuple[str, str, pd.DataFrame]]) -> Figure:
    """Draw the share of selected coordinates as a heat map, module × layer, for each part.

    Args:
        parts: Kind of SFT, title, and rows (columns ``module``, ``layer``, ``selected``, ``size``); parts of one kind
            share one scale of colours.
    """
    drawn = []
    for kind, title, rows in parts:
        counts = rows.groupby(["module", "layer"])[["selected", "size"]].sum()
        drawn.append((kind, title, 100 * (counts["selected"] / counts["size"]).unstack()))
    modules = sorted({str(module) for _, _, table in drawn for module in table.index}, key=_in_order)
    figure, axes = panels(len(drawn), height=1.1 + 0.22 * len(modules), most=2)
    for axis, (kind, title, table) in zip(axes, drawn, strict=True):
        table = table.reindex([module for module in modules if module in table.index])
        same = [other.to_numpy() for other_kind, _, other in drawn if other_kind == kind]
        limits = (min(float(np.nanmin(shares)) for shares in same), max(float(np.nanmax(shares)) for shares in same))
        names, layers = [_short(name) for name in table.index], layer_names(table.columns)
        heat_map(axis, table.to_numpy(), names, layers, label="selected (%)", limits=limits)
        axis.tick_params(axis="y", labelsize=8)
        axis.tick_params(axis="x", labelsize=7)
        titled(axis, title)
        axis.set_xlabel("layer")
    return figure


def spectra(parts: Sequence[tuple[str, pd.DataFrame]]) -> Figure | None:
    """Draw singular values relative to the largest: the median over each layer's matrices, a line a layer.

    Args:
        parts: Title and rows (columns ``layer``, ``singular_values``) of each panel.

    Returns:
        None where no row holds two singular values.
    """
    held = [(title, rows[rows["singular_values"].map(_has_spectrum)]) for title, rows in parts]
    held = [(title, rows) for title, rows in held if len(rows)]
    if not held:
        return None
    layers = sorted({layer for _, rows in held for layer in rows["layer"]})
    figure, axes = panels(len(held), height=3.2, most=3, sharey=True)
    for axis, (title, rows) in zip(axes, held, strict=True):
        for order, (layer, colour) in enumerate(zip(layers, shades(len(layers)), strict=True)):
            values = [np.asarray(item, dtype=float) for item in rows.loc[rows["layer"] == layer, "singular_values"]]
            if not values:
                continue
            shortest = min(map(len, values))  # beyond it the median would be of fewer matrices, and jump
            median = np.median([item[:shortest] / item[0] for item in values], axis=0)
            axis.plot(
                np.arange(1, shortest + 1),
                np.maximum(median, _FLOOR),
                color=colour,
                linestyle=DASHES[order % len(DASHES)],
                marker=MARKERS[order % len(MARKERS)],
                markevery=(order % 5, max(1, shortest // 6)),
                markersize=4,
                linewidth=1.2,
                label=f"layer {layer}" if layer >= 0 else "emb.",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(title)
        axis.set_xlabel("index of the singular value")
    axes[0].set_ylabel("σᵢ / σ₁")
    legend(figure, axes[0], 7)
    return figure


def layer_names(layers: Sequence[int] | pd.Index) -> list[str]:
    """Return the labels of layers on an axis."""
    return ["emb." if layer < 0 else str(layer) for layer in layers]


def _has_spectrum(values: Any) -> bool:
    return np.ndim(values) == 1 and len(values) > 1 and values[0] > 0  # NaN or None where nothing was denoised


def _in_order(module: str) -> tuple[int, str]:
    """Modules in the order a text passes them."""
    passed = next((order for order, start in enumerate(_ORDER) if module.startswith(start)), len(_ORDER))
    return passed, module


def _short(module: str) -> str:
    for long, short in _SHORT.items():
        module = module.replace(long, short)
    return module
