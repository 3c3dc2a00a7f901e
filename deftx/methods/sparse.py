"""What of a sparse method computes: over what its budget is shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def _global(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    from deftx.core.selection import select_topk

    return select_topk(scores, k)


BUDGETS: dict[str, Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]] = {"global": _global}
"""From scores over M, float32, and K: the sorted flat indices that are selected, int64 [count], K over all names.
``global`` takes the K largest magnitudes over all parameters together."""
