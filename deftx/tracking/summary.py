"""What a run's W&B summary holds, computed from its record and its diagnostics: one number for each stable name.

Facts of SFTs are those of the job's own method: a comparison's LT-SFT masks have no energy and are no part of the mean,
and a control's φ_S says nothing of the targets. A value that does not exist for a job is left out, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from deftx.tracking import names
from deftx.tracking.artifacts import is_input
from deftx.tracking.facts import SFTFacts
from deftx.tracking.results import CONDITIONS, Metric, RunRecord, finite

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["own_sfts", "results_rows", "summarise"]


def summarise(record: RunRecord, diagnostics: pd.DataFrame | None = None) -> dict[str, float | int]:
    """Every number of a run under its stable name.

    Args:
        record: The run's record, finished or not.
        diagnostics: The frame of ``diagnostics.parquet``.

    Returns:
        Names of :mod:`deftx.tracking.names`, finite values only.
    """
    found: dict[str, Any] = _scores(record) | _costs(record)
    if diagnostics is not None and len(diagnostics):
        found |= _sft_facts(record, diagnostics) | _overlaps(record, diagnostics)
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def results_rows(metrics: Iterable[Metric]) -> tuple[list[str | int], list[Iterable[Any]]]:
    """The table ``results``: its columns, and a row for each target, split and metric; None where there is no score."""
    rows, conditions = _by_row(metrics)
    data: list[Iterable[Any]] = [
        [language, split, metric, max(item.n for item in row.values())]
        + [finite(row[name].value) if name in row else None for name in conditions]
        for (metric, split, language), row in rows.items()
    ]
    return ["language", "split", "metric", "n", *conditions], data


def own_sfts(record: RunRecord) -> dict[str, SFTFacts]:
    """SFTs that the job's own composed models consist of, by key; of a job that composes nothing, those it made."""
    if not record.cells:
        return {sft.key: sft for sft in record.sfts if not is_input(record, sft)}
    own = {term.key for cell in record.own_cells() for term in cell.terms}
    return {sft.key: sft for sft in record.sfts if sft.key in own}


def _by_row(
    metrics: Iterable[Metric],
) -> tuple[dict[tuple[str, str, str], dict[str, Metric]], list[str]]:
    rows: dict[tuple[str, str, str], dict[str, Metric]] = {}
    for item in metrics:
        rows.setdefault((item.metric, item.split, item.language), {})[item.condition] = item
    asked = {name: None for row in rows.values() for name in row}
    return rows, [name for name in CONDITIONS if name in asked] + [name for name in asked if name not in CONDITIONS]


def _scores(record: RunRecord) -> dict[str, float | None]:
    """Scores by language and condition, of the own method, differences; a mean only where no target is missing."""
    found: dict[str, float | None] = {}
    rows, conditions = _by_row(record.metrics)
    own = "composed" if record.job_type == "eval" else record.settings.get("method")
    values: dict[tuple[str, str, str], dict[str, float | None]] = {
        row: {name: finite(scores[name].value) if name in scores else None for name in conditions}
        for row, scores in rows.items()
    }
    for metric, split in dict.fromkeys((metric, split) for metric, split, _ in rows):
        table = {language: row for (m, s, language), row in values.items() if (m, s) == (metric, split)}
        for name in conditions:
            column = {language: row[name] for language, row in table.items()}
            for language, value in _with_mean(column).items():
                found[names.condition_score(metric, language, name, split)] = value
                if name == own:
                    found[names.own_score(metric, language, split)] = value
        if {names.METHOD, names.BASELINE} <= set(conditions):
            apart = {code: _minus(row[names.METHOD], row[names.BASELINE]) for code, row in table.items()}
            for language, value in _with_mean(apart).items():
                found[names.difference(metric, language, split)] = value
    return found


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _with_mean(column: Mapping[str, float | None]) -> dict[str, float | None]:
    known = [value for value in column.values() if value is not None]
    return {**column, names.MEAN: sum(known) / len(known) if len(known) == len(column) else None}


def _costs(record: RunRecord) -> dict[str, float | int | None]:
    found: dict[str, float | int | None] = {names.seconds(): record.seconds}
    for kind, value in record.times.items():
        found[names.seconds(kind) if kind == "imports" else names.stage_seconds(kind)] = value
    for device, peak in record.peak_memory.items():
        found[names.memory(device)] = peak
    outcomes = [stage["outcome"] for stage in record.stages]
    found[names.CACHE_HITS] = outcomes.count("cached")
    found[names.CACHE_COMPUTED] = outcomes.count("computed")
    return found


def _sft_facts(record: RunRecord, diagnostics: pd.DataFrame) -> dict[str, float]:
    found: dict[str, float] = {}
    own = own_sfts(record)
    rows = diagnostics[(diagnostics["what"] == "sft") & diagnostics["key"].isin(own)]
    kind = rows["key"].map({key: sft.kind for key, sft in own.items()})
    for of in ("language", "task", names.MEAN):
        part = rows if of == names.MEAN else rows[kind == of]
        sizes = [sft.bytes for sft in own.values() if of in (names.MEAN, sft.kind) and sft.bytes is not None]
        if not len(part):
            continue
        found[names.energy(of)] = float(part["energy"].astype(float).mean())
        found[names.rank_kept(of)] = float(part["rank"].astype(float).mean())
        found[names.density(of)] = float(part["selected"].sum() / part["size"].sum())
        if sizes:
            found[names.sft_bytes(of)] = sum(sizes) / len(sizes)
    return found


def _overlaps(record: RunRecord, diagnostics: pd.DataFrame) -> dict[str, float | None]:
    """Overlap of the task's mask with each target's language SFT, all parameters together."""
    selected = diagnostics[diagnostics["what"] == "sft"].groupby("key")["selected"].sum().to_dict()
    rows = diagnostics[diagnostics["what"] == "pair"]
    pairs = {(key, other): part for (key, other), part in rows.groupby(["key", "other_key"])}
    shares: dict[str, float | None] = {}
    conflicts: dict[str, float | None] = {}
    for cell in record.own_cells():
        if cell.pair not in pairs:
            continue  # a target without text
        part = pairs[cell.pair]
        shared = float(part["overlap"].sum())
        union = float(sum(selected[key] for key in cell.pair)) - shared
        shares[cell.language] = shared / union if union else 0.0
        conflicts[cell.language] = float(part["sign_conflicts"].sum()) / shared if shared else 0.0
    if not shares:
        return {}
    return {names.jaccard(code): value for code, value in _with_mean(shares).items()} | {
        names.sign_conflicts(code): value for code, value in _with_mean(conflicts).items()
    }
