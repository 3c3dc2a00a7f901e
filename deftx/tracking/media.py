"""Pictures of a run for W&B: where masks lie, and what spectra their denoising found.

Drawn without pyplot: no window system, no global state, and nothing left open. The palette is one lightness scale, so
that it reads in grey and with any colour vision.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from deftx.tracking.results import RunRecord
from deftx.tracking.summary import own_sfts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    Pixels = npt.NDArray[np.uint8]

__all__ = ["draw_mask_density", "draw_spectra"]

_TITLES = {"language": "language SFTs", "task": "task SFT"}


def draw_mask_density(record: RunRecord, diagnostics: pd.DataFrame) -> Pixels | None:
    """Heat map of the share of selected coordinates, layer × module, for language and task SFTs.

    Args:
        record: The run's record.
        diagnostics: The frame of ``diagnostics.parquet``.

    Returns:
        RGBA pixels, uint8 of shape (height, width, 4); None where no SFT has layers.
    """
    parts = _by_kind(record, diagnostics[(diagnostics["what"] == "sft") & (diagnostics["layer"] >= 0)])
    if not parts:
        return None
    figure, axes = _figure(len(parts), width=4.6, left=0.32)
    for place, (kind, rows) in zip(axes, parts.items(), strict=True):
        counts = rows.groupby(["module", "layer"])[["selected", "size"]].sum()
        grid = (counts["selected"] / counts["size"]).unstack("layer")
        picture = place.imshow(grid.to_numpy(), aspect="auto", cmap="viridis", vmin=0)
        place.set_xticks(range(len(grid.columns)), grid.columns)
        place.set_yticks(range(len(grid.index)), grid.index, fontsize=7)
        place.set_xlabel("layer")
        place.set_title(f"{_TITLES[kind]}: share selected", fontsize=9)
        figure.colorbar(picture, ax=place)
    return _pixels(figure)


def draw_spectra(record: RunRecord, diagnostics: pd.DataFrame) -> Pixels | None:
    """Singular values of the full phase's changes by layer: each over its matrix's largest, mean over the modules.

    Args:
        record: The run's record.
        diagnostics: The frame of ``diagnostics.parquet``.

    Returns:
        RGBA pixels, uint8 of shape (height, width, 4); None where nothing was denoised.
    """
    import matplotlib
    import numpy as np

    rows = diagnostics[(diagnostics["what"] == "sft") & (diagnostics["layer"] >= 0)]
    parts = _by_kind(record, rows[rows["singular_values"].notna()])
    if not parts:
        return None
    figure, axes = _figure(len(parts), width=4.2, left=0.16)
    colours = matplotlib.colormaps["viridis"]
    for place, (kind, part) in zip(axes, parts.items(), strict=True):
        last = max(int(part["layer"].max()), 1)
        for layer, matrices in part.groupby("layer"):
            curves = [np.asarray(values, dtype=float) for values in matrices["singular_values"]]
            curves = [values / values[0] for values in curves if len(values) and values[0] > 0]
            if not curves:
                continue
            # Matrices differ in size: the mean ends where the shortest does.
            length = min(map(len, curves))
            mean = np.mean([values[:length] for values in curves], axis=0)
            mean[mean <= 0] = np.nan  # no logarithm: a gap in the curve
            colour = colours(0.9 * int(str(layer)) / last)
            place.plot(np.arange(1, length + 1), np.log10(mean), color=colour, linewidth=1, label=f"layer {layer}")
        place.set_xlabel("direction")
        place.set_ylabel("log₁₀ of singular value / largest")
        place.set_title(_TITLES[kind], fontsize=9)
    axes[-1].legend(fontsize=6, ncols=2)
    return _pixels(figure)


def _by_kind(record: RunRecord, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    own = own_sfts(record)
    parts = {kind: rows[rows["key"].isin([key for key, sft in own.items() if sft.kind == kind])] for kind in _TITLES}
    return {kind: part for kind, part in parts.items() if len(part)}


def _figure(count: int, *, width: float, left: float) -> tuple[Any, list[Any]]:
    """A figure with one panel for each kind; ``left`` is the share of a panel's width that its labels take."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)  # it tells of the fonts it finds, once
    from matplotlib.figure import Figure

    # Places by hand: an automatic layout draws everything twice, and each of a sweep's jobs has these pictures.
    figure = Figure(figsize=(width * count, 3.2), dpi=100)
    size = ((0.96 - left) / count, 0.74)
    return figure, [figure.add_axes(((number + left) / count, 0.15, *size)) for number in range(count)]


def _pixels(figure: Any) -> Pixels:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())
