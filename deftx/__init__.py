"""deftx: composable sparse fine-tuning with SVD denoising for cross-lingual transfer.

The public names are imported lazily, so that ``import deftx`` (and ``deftx --help``) does not pay for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Composition", "SparseDelta", "SparseFineTuning", "__version__", "denoise", "select_topk"]

if TYPE_CHECKING:
    from deftx.core.composition import Composition
    from deftx.core.delta import SparseDelta
    from deftx.core.denoise import denoise
    from deftx.core.selection import select_topk
    from deftx.training.callback import SparseFineTuning

_HOMES = {
    "SparseDelta": "deftx.core.delta",
    "Composition": "deftx.core.composition",
    "denoise": "deftx.core.denoise",
    "select_topk": "deftx.core.selection",
    "SparseFineTuning": "deftx.training.callback",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deftx' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
