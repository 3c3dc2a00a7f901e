"""Pictures of a run for W&B: where masks lie, and what spectra their denoising found; the report draws them alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deftx.tracking.results import RunRecord
from deftx.tracking.summary import own_sfts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    Pixels = npt.NDArray[np.uint8]

__all__ = ["draw_mask_density", "draw_spectra"]


def draw_mask_density(record: RunRecord, diagnostics: pd.DataFrame) -> Pixels | None:
    """Draw the share of selected coordinates, module × layer, of language and task SFTs.

    Args:
        record: The run's record.
        diagnostics: The frame of ``diagnostics.parquet``.

    Returns:
        RGBA pixels, uint8 of shape (height, width, 4); None where no SFT has layers.
    """
    from deftx.plots.inside import mask_density

    parts = _by_kind(record, diagnostics)
    return _pixels(lambda: mask_density(parts)) if parts else None


def draw_spectra(record: RunRecord, diagnostics: pd.DataFrame) -> Pixels | None:
    """Draw the singular values of the full phase's changes by layer.

    Args:
        record: The run's record.
        diagnostics: The frame of ``diagnostics.parquet``.

    Returns:
        RGBA pixels, uint8 of shape (height, width, 4); None where nothing was denoised.
    """
    from deftx.plots.inside import spectra

    parts = [(title, rows) for _, title, rows in _by_kind(record, diagnostics)]
    return _pixels(lambda: spectra(parts))


def _by_kind(record: RunRecord, diagnostics: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Return kind, title and rows of the layers of the run's own SFTs."""
    from deftx.plots.inside import KINDS

    rows = diagnostics[(diagnostics["what"] == "sft") & (diagnostics["layer"] >= 0)]
    own = own_sfts(record)
    parts = [
        (kind, title, rows[rows["key"].isin([key for key, sft in own.items() if sft.kind == kind])])
        for kind, title in KINDS.items()
    ]
    return [part for part in parts if len(part[2])]


def _pixels(draw: Any) -> Pixels | None:
    import numpy as np

    from deftx.plots.style import house_style

    with house_style():
        figure = draw()
        if figure is None:
            return None
        figure.canvas.draw()
        return np.array(figure.canvas.buffer_rgba())
