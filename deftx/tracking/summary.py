"""Computes the W&B summary of a run from its record and its diagnostics: one number for each stable name.

SFTs count only if the job's own method uses them: the LT-SFT masks of a comparison have no energy and would distort the
mean, and a control's φ_S says nothing about the targets. A value that a job does not have is left out, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from deftx.tracking import names
from deftx.tracking.artifacts import is_input
from deftx.tracking.facts import SFTFacts
from deftx.tracking.results import Metric, RunRecord, finite, score_rows

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["own_sfts", "results_rows", "summarise"]


def summarise(record: RunRecord, diagnostics: pd.DataFrame | None = None) -> dict[str, float | int]:
    """Return every number of a run under its stable name.

    Args:
        record: The run's record, finished or not.
        diagnostics: The frame of ``diagnostics.parquet``.

    Returns:
        Names of :mod:`deftx.tracking.names`, finite values only.
    """
    summary: dict[str, Any] = _scores(record) | _costs(record)
    if diagnostics is not None and len(diagnostics):
        summary |= _sft_facts(record, diagnostics) | _overlaps(record, diagnostics)
    return {name: value for name, value in summary.items() if value is not None and math.isfinite(value)}


def results_rows(metrics: Iterable[Metric]) -> tuple[list[str | int], list[Iterable[Any]]]:
    """Return the columns of the table ``results`` and a row for each target, split and metric; None for no score."""
    rows, conditions = score_rows(metrics)
    data: list[Iterable[Any]] = [
        [language, split, metric, max(score.n for score in row.values())]
        + [finite(row[name].value) if name in row else None for name in conditions]
        for (metric, split, language), row in rows.items()
    ]
    return ["language", "split", "metric", "n", *conditions], data


def own_sfts(record: RunRecord) -> dict[str, SFTFacts]:
    """Return the SFTs in the job's own composed models, by key; if it composes nothing, those it made."""
    if not record.cells:
        return {sft.key: sft for sft in record.sfts if not is_input(record, sft)}
    own = {term.key for cell in record.own_cells() for term in cell.terms}
    return {sft.key: sft for sft in record.sfts if sft.key in own}


def _scores(record: RunRecord) -> dict[str, float | None]:
    """Return scores by condition, of the job's own method, and differences; a mean only where no target is missing."""
    summary: dict[str, float | None] = {}
    rows, conditions = score_rows(record.metrics)
    own = "composed" if record.job_type == "eval" else record.settings.get("method")
    tables: dict[tuple[str, str], dict[str, dict[str, float | None]]] = {}
    for (metric, split, language), scores in rows.items():
        row = {name: finite(scores[name].value) if name in scores else None for name in conditions}
        tables.setdefault((metric, split), {})[language] = row
    for (metric, split), table in tables.items():
        for name in conditions:
            for language, value in _with_mean({code: row[name] for code, row in table.items()}).items():
                summary[names.condition_score(metric, language, name, split)] = value
                if name == own:
                    summary[names.own_score(metric, language, split)] = value
        if {names.METHOD, names.BASELINE} <= set(conditions):
            differences = {code: _minus(row[names.METHOD], row[names.BASELINE]) for code, row in table.items()}
            for language, value in _with_mean(differences).items():
                summary[names.difference(metric, language, split)] = value
    return summary


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _with_mean(column: Mapping[str, float | None]) -> dict[str, float | None]:
    scores = [value for value in column.values() if value is not None]
    return {**column, names.MEAN: sum(scores) / len(scores) if len(scores) == len(column) else None}


def _costs(record: RunRecord) -> dict[str, float | int | None]:
    summary: dict[str, float | int | None] = {names.seconds(): record.seconds}
    for kind, value in record.times.items():
        summary[names.seconds(kind) if kind == "imports" else names.stage_seconds(kind)] = value
    for device, peak in record.peak_memory.items():
        summary[names.memory(device)] = peak
    outcomes = [stage["outcome"] for stage in record.stages]
    summary[names.CACHE_HITS] = outcomes.count("cached")
    summary[names.CACHE_COMPUTED] = outcomes.count("computed")
    return summary


def _sft_facts(record: RunRecord, diagnostics: pd.DataFrame) -> dict[str, float]:
    summary: dict[str, float] = {}
    own = own_sfts(record)
    rows = diagnostics[(diagnostics["what"] == "sft") & diagnostics["key"].isin(own)]
    kind = rows["key"].map({key: sft.kind for key, sft in own.items()})
    for of in ("language", "task", names.MEAN):
        part = rows if of == names.MEAN else rows[kind == of]
        if not len(part):
            continue
        sizes = [sft.bytes for sft in own.values() if of in (names.MEAN, sft.kind) and sft.bytes is not None]
        summary[names.energy(of)] = float(part["energy"].astype(float).mean())
        summary[names.rank_kept(of)] = float(part["rank"].astype(float).mean())
        summary[names.density(of)] = float(part["selected"].sum() / part["size"].sum())
        if sizes:
            summary[names.sft_bytes(of)] = sum(sizes) / len(sizes)
    return summary


def _overlaps(record: RunRecord, diagnostics: pd.DataFrame) -> dict[str, float | None]:
    """Return the overlap of the task's mask with each target's language mask, over all parameters."""
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
    summary = {names.jaccard(code): value for code, value in _with_mean(shares).items()}
    return summary | {names.sign_conflicts(code): value for code, value in _with_mean(conflicts).items()}
