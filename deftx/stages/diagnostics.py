"""Where an SFT's coordinates lie, what denoising kept, and how two SFTs of a composition meet, as one table.

SFTs are read as numpy arrays, so that a run whose results are all cached does not import torch.
Overlaps are those of :func:`deftx.core.composition.compare`.
"""

from __future__ import annotations

import math
import re
import zlib
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
    """Build one row for each parameter of each SFT, and for each parameter of each composed pair.

    Args:
        folders: Folders of the run's SFTs.
        composed: φ_T and φ_L of the evaluated cells; each distinct pair gives overlap rows.
        base: Folder of the base model, for the parameters in which nothing was selected.

    Returns:
        Columns ``what`` (``sft`` or ``pair``), ``sft``, ``other``, ``key``, ``other_key``, ``parameter``, ``layer``
        (int, -1 outside the layers), ``module``, ``size``, ``selected``, ``density``, ``rank``, ``energy``,
        ``singular_values``, ``sample`` (:func:`sample`), ``overlap``, ``jaccard``, ``sign_conflicts``; missing where
        a column does not apply.
    """
    import pandas as pd

    loaded = {sft.key: _coordinates(folder) for sft, folder in folders.items()}
    shapes = {kind: shapes_of(base, kind=kind) for kind in {sft.kind for sft in folders}}
    rates = {kind: sampling_rate(sum(map(math.prod, of.values()))) for kind, of in shapes.items()}
    rows: list[dict[str, Any]] = []
    for sft, folder in folders.items():
        denoised = _denoising(folder)
        coordinates = loaded[sft.key]
        for name in sorted(shapes[sft.kind]):
            size = math.prod(shapes[sft.kind][name])
            selected = len(coordinates[name][0]) if name in coordinates else 0
            rows.append(
                {
                    "what": "sft",
                    "sft": sft.name,
                    "key": sft.key,
                    **_location(name),
                    "size": size,
                    "selected": selected,
                    "density": selected / size,
                    "sample": sample(name, *coordinates[name], rates[sft.kind]) if selected else None,
                    **denoised.get(name, {}),
                }
            )
    for task, language in sorted(set(composed), key=lambda pair: (pair[0].name, pair[1].name)):
        about = {"sft": task.name, "other": language.name, "key": task.key, "other_key": language.key}
        for name, counts in _overlaps(loaded[task.key], loaded[language.key]).items():
            rows.append({"what": "pair", **about, **_location(name), **counts})
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
    columns += ["singular_values", "sample", "overlap", "jaccard", "sign_conflicts"]
    return pd.DataFrame(rows, columns=columns)


def _coordinates(folder: Path) -> Coordinates:
    """Return indices (int64, sorted) and float32 values of an SFT by parameter, verified as ``SparseDelta.load``."""
    facts = read_facts(folder)
    tensors = dict(deserialize((folder / TENSORS).read_bytes()))  # type: ignore[no-untyped-call]

    def array(name: str) -> npt.NDArray[Any]:
        kind, data = tensors[name]["dtype"], tensors[name]["data"]
        if kind == "BF16":  # numpy has none: the upper half of a float32
            return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
        return np.frombuffer(data, dtype=_NUMPY[kind])

    def indices(name: str) -> npt.NDArray[np.int64]:
        if f"{name}.gaps" in tensors:
            return from_gaps(array(f"{name}.gaps"))
        return array(f"{name}.indices").astype(np.int64)  # format version 1

    return {name: (indices(name), array(f"{name}.values").astype(np.float32)) for name in sorted(facts["parameters"])}


_NUMPY = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


def from_gaps(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Unpack the bytes of :func:`deftx.core.gaps.pack` (uint8) into indices (int64); does not check them."""
    last = np.flatnonzero(data < 128)
    first = np.concatenate([[0], last[:-1] + 1])
    digit = np.arange(len(data)) - np.repeat(first, last - first + 1)
    gaps = np.add.reduceat((data & 127).astype(np.int64) << 7 * digit, first)
    return np.cumsum(gaps + 1) - 1


SAMPLED = 1 << 18
"""How many of a base's coordinates a sample looks at, on average: all of a small base's, one in a thousand of XLM-R's.

Of two masks of density 0.05 it then holds 13,000 coordinates each, and an overlap of 0.3 is known to 0.4 points.
"""


def sampling_rate(parameters: int) -> float:
    """Return the share of a base's coordinates that samples look at."""
    return min(1.0, SAMPLED / parameters)


def sample(
    parameter: str, indices: npt.NDArray[np.int64], values: npt.NDArray[np.float32], rate: float
) -> npt.NDArray[np.int64]:
    """Return some of an SFT's coordinates in one parameter, the same ones of the parameter for every SFT.

    A coordinate is looked at if a hash of its name and number is small enough. So the samples of two SFTs, of two runs
    on two machines, overlap as the SFTs do, whatever their size, and no SFT has to be at hand to compare them.

    Args:
        parameter: Name of the parameter.
        indices: Flat coordinates, int64 [k], sorted.
        values: Their values, float32 [k].
        rate: Share of the coordinates that is looked at.

    Returns:
        int64, sorted by coordinate: coordinate + 1, negative where the value is.
    """
    if rate < 1:
        mixed = indices.astype(np.uint64) + np.uint64(zlib.crc32(parameter.encode()) << 32)
        # The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every other.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        kept = (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(rate * 2**64))
        indices, values = indices[kept], values[kept]
    return np.where(values < 0, -(indices + 1), indices + 1)


def _overlaps(first: Coordinates, second: Coordinates) -> dict[str, dict[str, float]]:
    """Compare two SFTs by parameter: shared coordinates, their Jaccard index, and those of opposite sign."""
    none = (np.empty(0, np.int64), np.empty(0, np.float32))
    overlaps = {}
    for name in sorted({*first, *second}):
        (indices, values), (other_indices, other_values) = first.get(name, none), second.get(name, none)
        shared, left, right = np.intersect1d(indices, other_indices, assume_unique=True, return_indices=True)
        union = len(indices) + len(other_indices) - len(shared)
        overlaps[name] = {
            "overlap": len(shared),
            "jaccard": len(shared) / union if union else 0.0,
            "sign_conflicts": int((np.sign(values[left]) * np.sign(other_values[right]) < 0).sum()),
        }
    return overlaps


def _denoising(folder: Path) -> dict[str, dict[str, Any]]:
    """Rank, energy and singular values by parameter; empty for an SFT that was given as a bare folder."""
    import pandas as pd

    path = folder.parent / "denoising.parquet"
    if not path.is_file():
        return {}
    frame = pd.read_parquet(path)
    return {
        str(row["parameter"]): {k: row[k] for k in ("rank", "energy", "singular_values")} for _, row in frame.iterrows()
    }


def _location(name: str) -> dict[str, Any]:
    """Layer and module: ``encoder.layer.3.attention.self.query.weight`` -> 3, ``attention.self.query``."""
    layer = re.search(r"\blayer\.(\d+)\.", name)
    rest = name[layer.end() :] if layer else name
    return {
        "parameter": name,
        "layer": int(layer.group(1)) if layer else -1,
        "module": rest.rsplit(".", 1)[0],
    }
