"""How plots look: Okabe and Ito's colours (told apart by colour-blind readers), and a marker and a dash for each, so
that a print in grey still says which is which. No pyplot: nothing global is changed and no window system is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (8, 2)), (0, (2, 2)))
REFERENCE = "#000000"
MAPS = "cividis"  # even in lightness, so it is the same scale in grey
WIDTH = 9.0  # inches of a whole page's plot

_RC: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.hashsalt": "deftx",
}


@dataclass(frozen=True)
class Drawn:
    """A figure and the sentence under it."""

    figure: Figure
    caption: str


@contextmanager
def house_style() -> Iterator[None]:
    """Drawing inside the block is in this style; matplotlib's settings are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure in this style and its axes, a 2-D array; legends stand outside of the axes.

    Args:
        width: In inches.
        height: In inches.
        rows: Of axes.
        columns: Of axes.
        **options: Of ``Figure.subplots``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def panels(count: int, *, height: float = 2.5, most: int = 4, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` axes of equal size; what is left of the last row is hidden."""
    columns = min(most, count)
    rows = -(-count // columns)
    width = {1: 5.2, 2: 7.4, 3: WIDTH}.get(columns, WIDTH + 1)
    fig, axes = figure(width, height * rows + 0.7, rows, columns, **options)
    flat = list(axes.ravel())
    for spare in flat[count:]:
        spare.set_visible(False)
    return fig, flat[:count]


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Draw one legend for all axes under the figure."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if len(unique) > 1 or (unique and next(iter(unique))):
        figure.legend(
            unique.values(), unique.keys(), loc="outside lower center", ncols=min(columns, len(unique)), frameon=False
        )


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dash of series ``number``; no two of the first dozens share all three."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def titled(axes: Axes, text: str) -> None:
    """Set a title that stays within its axes: a long one takes two lines."""
    import textwrap

    axes.set_title("\n".join(textwrap.wrap(text, 44)), fontsize=9.5)


def shades(count: int) -> list[Any]:
    """Colours from dark to light for things that have an order (layers, ranks)."""
    import matplotlib

    colours = matplotlib.colormaps[MAPS]
    return [colours(0.9 * number / max(1, count - 1)) for number in range(count)]


def heat_map(
    axes: Axes,
    values: Any,
    rows: list[str],
    columns: list[str],
    *,
    label: str,
    form: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw an annotated heat map; cells without a value stay white with a dash.

    Args:
        axes: Where.
        values: [rows, columns]; NaN where there is none.
        rows: Their labels.
        columns: Their labels.
        label: Of the colour bar.
        form: Of the numbers in the cells, such as ``.1f``; empty: none.
        limits: Of the colours; None: of the values.
    """
    import numpy as np

    low, high = limits if limits is not None else (np.nanmin(values), np.nanmax(values))
    image = axes.imshow(np.ma.masked_invalid(values), cmap=MAPS, aspect="auto", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = values[row][column]
            if not form:
                continue
            light = np.isfinite(value) and (high == low or (value - low) / (high - low) > 0.55)
            text = format(value, form) if np.isfinite(value) else "–"
            colour = "black" if light or not np.isfinite(value) else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def save(drawn: Drawn, stem: Path) -> str:
    """Write ``stem.svg`` and ``stem.png``; gives the SVG's text. The same data gives the same bytes."""
    layout = drawn.figure.get_layout_engine()
    if layout is not None:
        layout.execute(drawn.figure)
        drawn.figure.set_layout_engine("none")  # once is enough for both forms
    text = io.StringIO()
    drawn.figure.savefig(text, format="svg", metadata={"Date": None})
    drawn.figure.savefig(stem.with_name(stem.name + ".png"), dpi=160, metadata={"Software": None})
    stem.with_name(stem.name + ".svg").write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()
