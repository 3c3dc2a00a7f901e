"""Where an SFT's coordinates lie, what denoising kept, and how two SFTs of a composition meet, as one table.

SFTs are read as numpy arrays: every run ends here, and one that found everything in the cache loads no torch for it.
Overlaps are those of :func:`deftx.core.composition.compare`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import deserialize

from deftx.core.folder import TENSORS, read_facts
from deftx.stages.objectives import SFT
from deftx.training.shapes import shapes_of

if TYPE_CHECKING:
    import pandas as pd

Coordinates = dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]


def diagnostics(folders: Mapping[SFT, Path], composed: Sequence[tuple[SFT, SFT]], base: Path) -> pd.DataFrame:
    """One row for each parameter of each SFT, and for each parameter of each composed pair.

    Args:
        folders: SFTs of the run, and where they lie.
        composed: φ_T and φ_L of the evaluated cells; each distinct pair gives overlap rows.
        base: Folder of the base model, for the parameters in which nothing was selected.

    Returns:
        Columns ``what`` (``sft`` or ``pair``), ``sft``, ``other``, ``key``, ``other_key``, ``parameter``, ``layer``
        (int, -1 outside the layers), ``module``, ``size``, ``selected``, ``density``, ``rank``, ``energy``,
        ``singular_values``, ``overlap``, ``jaccard``, ``sign_conflicts``; missing where a column does not apply.
    """
    import pandas as pd

    loaded = {sft.key: _coordinates(folder) for sft, folder in folders.items()}
    shapes = {kind: shapes_of(base, kind=kind) for kind in {sft.kind for sft in folders}}
    rows: list[dict[str, Any]] = []
    for sft, folder in folders.items():
        denoised = _denoising(folder)
        item = loaded[sft.key]
        for name in sorted(shapes[sft.kind]):
            size = math.prod(shapes[sft.kind][name])
            selected = len(item[name][0]) if name in item else 0
            rows.append(
                {
                    "what": "sft",
                    "sft": sft.name,
                    "key": sft.key,
                    **_place(name),
                    "size": size,
                    "selected": selected,
                    "density": selected / size,
                    **denoised.get(name, {}),
                }
            )
    for task, language in sorted(set(composed), key=lambda pair: (pair[0].name, pair[1].name)):
        about = {"sft": task.name, "other": language.name, "key": task.key, "other_key": language.key}
        for name, counts in _overlaps(loaded[task.key], loaded[language.key]).items():
            rows.append({"what": "pair", **about, **_place(name), **counts})
    columns = [
        "what",
        "sft",
        "other",
        "key",
        "other_key",
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


def _coordinates(folder: Path) -> Coordinates:
    """Indices (int64, sorted) and values (float32) of an SFT by parameter, verified as ``SparseDelta.load`` does."""
    facts = read_facts(folder)
    found = dict(deserialize((folder / TENSORS).read_bytes()))  # type: ignore[no-untyped-call]

    def array(name: str) -> npt.NDArray[Any]:
        kind, data = found[name]["dtype"], found[name]["data"]
        if kind == "BF16":  # numpy has none: the upper half of a float32
            return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
        return np.frombuffer(data, dtype=_NUMPY[kind])

    def indices(name: str) -> npt.NDArray[np.int64]:
        if f"{name}.gaps" in found:
            return from_gaps(array(f"{name}.gaps"))
        return array(f"{name}.indices").astype(np.int64)  # format version 1

    return {name: (indices(name), array(f"{name}.values").astype(np.float32)) for name in sorted(facts["parameters"])}


_NUMPY = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


def from_gaps(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Indices from their bytes as :func:`deftx.core.gaps.pack` wrote them; the file's sha256 has been checked."""
    last = np.flatnonzero(data < 128)
    first = np.concatenate([[0], last[:-1] + 1])
    digit = np.arange(len(data)) - np.repeat(first, last - first + 1)
    gaps = np.add.reduceat((data & 127).astype(np.int64) << 7 * digit, first)
    return np.cumsum(gaps + 1) - 1


def _overlaps(first: Coordinates, second: Coordinates) -> dict[str, dict[str, float]]:
    """How two SFTs meet, by parameter: shared coordinates, their share of all, and those that move apart."""
    none = (np.empty(0, np.int64), np.empty(0, np.float32))
    found = {}
    for name in sorted({*first, *second}):
        (here, change), (there, other) = first.get(name, none), second.get(name, none)
        shared, left, right = np.intersect1d(here, there, assume_unique=True, return_indices=True)
        union = len(here) + len(there) - len(shared)
        found[name] = {
            "overlap": len(shared),
            "jaccard": len(shared) / union if union else 0.0,
            "sign_conflicts": int((np.sign(change[left]) * np.sign(other[right]) < 0).sum()),
        }
    return found


def _denoising(folder: Path) -> dict[str, dict[str, Any]]:
    """Rank, energy and spectrum by parameter; empty for an SFT that was given as a bare folder."""
    import pandas as pd

    path = folder.parent / "denoising.parquet"
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
