"""Where an SFT's coordinates lie, what denoising kept, and how two SFTs of a composition meet, as one table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.core.delta import SparseDelta, compare
from deftx.stages.evaluate import SFT, Outcome
from deftx.training.encoder import shapes_of

if TYPE_CHECKING:
    import pandas as pd


def diagnostics(sfts: Sequence[SFT], outcomes: Sequence[Outcome], base: Path) -> pd.DataFrame:
    """One row for each parameter of each SFT, and for each parameter of each composed pair.

    Args:
        sfts: SFTs of the run.
        outcomes: Evaluated cells; each distinct (φ_T, φ_L) gives overlap rows.
        base: Folder of the base model, for the parameters in which nothing was selected.

    Returns:
        Columns ``what`` (``sft`` or ``pair``), ``sft``, ``other``, ``parameter``, ``layer`` (int, -1 outside the
        layers), ``module``, ``size``, ``selected``, ``density``, ``rank``, ``energy``, ``singular_values``,
        ``overlap``, ``jaccard``, ``sign_conflicts``; missing where a column does not apply.
    """
    import pandas as pd

    loaded: dict[str, SparseDelta] = {}

    def delta(sft: SFT) -> SparseDelta:
        if sft.key not in loaded:
            loaded[sft.key] = sft.load()
        return loaded[sft.key]

    rows: list[dict[str, Any]] = []
    shapes = {role: shapes_of(base, kind=role) for role in {sft.role for sft in sfts}}
    for sft in dict.fromkeys(sfts):
        denoised = _denoising(sft)
        item = delta(sft)
        for name in sorted(shapes[sft.role]):
            size = math.prod(shapes[sft.role][name])
            selected = int(item.indices[name].numel()) if name in item.indices else 0
            rows.append(
                {
                    "what": "sft",
                    "sft": sft.name,
                    **_place(name),
                    "size": size,
                    "selected": selected,
                    "density": selected / size,
                    **denoised.get(name, {}),
                }
            )
    pairs = {(o.cell.task, o.cell.language_sft) for o in outcomes if o.cell.language_sft is not None}
    for task, language in sorted(pairs, key=lambda pair: (pair[0].name, pair[1].name if pair[1] else "")):
        if language is None:
            continue
        report = compare(delta(task), delta(language))
        for name, counts in report.parameters.items():
            rows.append(
                {
                    "what": "pair",
                    "sft": task.name,
                    "other": language.name,
                    **_place(name),
                    "overlap": counts.overlap,
                    "jaccard": counts.jaccard,
                    "sign_conflicts": counts.sign_conflicts,
                }
            )
    columns = [
        "what",
        "sft",
        "other",
        "parameter",
        "layer",
        "module",
        "size",
        "selected",
        "density",
        "rank",
        "energy",
    ]
    columns += ["singular_values", "overlap", "jaccard", "sign_conflicts"]
    return pd.DataFrame(rows, columns=columns)


def _denoising(sft: SFT) -> dict[str, dict[str, Any]]:
    """Rank, energy and spectrum by parameter; empty for an SFT that was given as a bare folder."""
    import pandas as pd

    path = sft.folder.parent / "denoising.parquet"
    if not path.is_file():
        return {}
    frame = pd.read_parquet(path)
    return {
        str(row["parameter"]): {k: row[k] for k in ("rank", "energy", "singular_values")} for _, row in frame.iterrows()
    }


def _place(name: str) -> dict[str, Any]:
    """Layer and module: ``encoder.layer.3.attention.self.query.weight`` -> 3, ``attention.self.query``."""
    found = re.search(r"\blayer\.(\d+)\.", name)
    rest = name[found.end() :] if found else name
    return {
        "parameter": name,
        "layer": int(found.group(1)) if found else -1,
        "module": rest.rsplit(".", 1)[0],
    }
