"""Compares the masks of language SFTs: of two methods under one seed, beside those of two seeds of one method.

Two methods whose masks differ as two seeds do have chosen no other weights than chance did: the overlap of two seeds of
the baseline is the noise floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deftx.errors import DeftxError
from deftx.report.collect import Run, read_diagnostics
from deftx.report.sections import MEAN, Column
from deftx.report.summary import Summary
from deftx.report.tables import Table, Text, laid_out

if TYPE_CHECKING:
    import pandas as pd

Mask = Mapping[str, npt.NDArray[np.int64]]
"""Sampled coordinates + 1 of an SFT by parameter, sorted."""


@dataclass(frozen=True)
class Pairing:
    """Which masks a column of the table compares.

    Attributes:
        label: Its title.
        condition: The method, to tell groups of rows apart.
        columns: The settings whose masks meet: two of one seed, or one of two seeds.
    """

    label: str
    condition: str
    columns: tuple[Column, ...]


def jaccard(first: Mask, second: Mask) -> float:
    """Return the Jaccard index of two masks over all parameters: shared coordinates by those of either."""
    nothing = np.empty(0, dtype=np.int64)
    shared = sum(
        len(np.intersect1d(first.get(name, nothing), second.get(name, nothing), assume_unique=True))
        for name in {*first, *second}
    )
    union = sum(map(len, first.values())) + sum(map(len, second.values())) - shared
    return shared / union if union else 0.0


def mask_table(summary: Summary) -> Table | None:
    """Lay out the overlap of language SFTs' masks; None where no run says it or nothing can be compared."""
    section, masks = summary.section, _masks(summary)
    own = section.named(section.methods)
    pairings = [
        Pairing(f"{column.label} and {base.label}", column.condition, (column, base))
        for column in own
        if (base := summary.baselines.get(column)) in own and base is not None
    ]
    pairings += [Pairing(f"two seeds of {column.label}", f"seeds of {column.condition}", (column,)) for column in own]
    values: dict[tuple[Pairing, str], float] = {}
    for pairing in pairings:
        for language in section.languages:
            if met := _overlaps(masks, pairing, language, summary.seeds):
                values[pairing, language] = float(np.mean(met))
        scored = [values[pairing, language] for language in section.languages if (pairing, language) in values]
        if scored and len(scored) == len(section.languages):
            values[pairing, MEAN] = float(np.mean(scored))
    pairings = [pairing for pairing in pairings if any(of is pairing for of, _ in values)]
    if not any(len(pairing.columns) == 2 for pairing in pairings):
        return None

    def cell(pairing: Pairing, row: str) -> Text:
        value = values.get((pairing, row))
        return Text("–" if value is None else f"{100 * value:.1f}")

    caption = (
        "Jaccard index × 100 of the masks of language SFTs, mean over seeds or pairs of seeds, estimated from sampled "
        "coordinates (all of a small base's). Two seeds of one method are the noise floor: a method that overlaps with "
        "the baseline as much as the baseline does with itself chose no other weights."
    )
    name, title = f"{section.slug}-masks", f"Overlap of masks: {section.title}"
    return laid_out(summary, pairings, cell, name, title, caption, sizes=False)


def _overlaps(
    masks: Mapping[tuple[Column, str, int], Mask], pairing: Pairing, language: str, seeds: list[int]
) -> list[float]:
    """Return the Jaccard indices of the pairs of masks that a pairing means."""
    first, *rest = pairing.columns
    if rest:
        pairs = [((first, language, seed), (rest[0], language, seed)) for seed in seeds]
    else:
        pairs = [((first, language, one), (first, language, other)) for one, other in combinations(seeds, 2)]
    return [jaccard(masks[one], masks[other]) for one, other in pairs if one in masks and other in masks]


def _masks(summary: Summary) -> dict[tuple[Column, str, int], Mask]:
    """Return the sampled mask of each column's language SFT by column, language and seed."""
    found: dict[tuple[Column, str, int], Mask] = {}
    section = summary.section
    for run in section.runs:
        where: dict[str, list[tuple[Column, str, int]]] = {}
        for cell in run.record.cells:
            column = section.column_of(run, cell.condition)
            if column is None or cell.condition not in section.methods or cell.pair is None:
                continue
            key = (column, cell.language, run.record.seed or 0)
            if key not in found:
                where.setdefault(cell.pair[1], []).append(key)
        if where:
            frame = _rows(run)
            for sft, keys in where.items():
                rows = frame[frame["key"] == sft] if frame is not None else None
                if rows is not None and len(rows):
                    mask = {
                        str(name): np.sort(np.abs(np.asarray(sample, dtype=np.int64)))
                        for name, sample in zip(rows["parameter"], rows["sample"], strict=True)
                    }
                    found |= dict.fromkeys(keys, mask)
    return found


def _rows(run: Run) -> pd.DataFrame | None:
    """Return the rows of a run's diagnostics that hold samples; None of an older run, or where there are none."""
    try:
        frame = read_diagnostics(run, ("what", "key", "parameter", "sample"))
    except DeftxError:
        return None  # the plots say so
    if "sample" not in frame:
        return None
    return frame[(frame["what"] == "sft") & frame["sample"].notna()]
