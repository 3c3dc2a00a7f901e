"""Plots of what happened inside: energy and rank that denoising kept, spectra, and where masks lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deftx.errors import DeftxError
from deftx.plots import inside
from deftx.plots.inside import KINDS, layer_names
from deftx.plots.style import Drawn, legend, look, panels
from deftx.report.collect import Run, read_diagnostics
from deftx.report.knobs import ordered_values, shown_value
from deftx.report.sections import MEAN, Column
from deftx.report.summary import Summary
from deftx.tracking import DIAGNOSTICS, SFTFacts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_COLUMNS = (
    *("what", "key", "other_key", "layer", "module", "size", "selected", "density", "rank", "energy"),
    *("overlap", "sign_conflicts"),
)
MOST_LINES = 7


def facts_of(summary: Summary) -> tuple[pd.DataFrame | None, list[str]]:
    """Return the concatenated diagnostics of a section's runs, and messages about those that cannot be read.

    Beside :data:`_COLUMNS` the frame has ``run`` (its number in the section) and the columns of :func:`_sft_columns`.
    """
    if summary.diagnostics is None:
        summary.diagnostics = _read(summary)
    return summary.diagnostics


def _read(summary: Summary) -> tuple[pd.DataFrame | None, list[str]]:
    import pandas as pd

    frames, missing = [], []
    for number, run in enumerate(summary.section.runs):
        try:
            frame = read_diagnostics(run, _COLUMNS)
        except DeftxError as error:
            missing.append(str(error))
            continue
        lacking = [column for column in _COLUMNS if column not in frame]
        if lacking:
            missing.append(f"{run.name}/{DIAGNOSTICS} lacks the columns {', '.join(lacking)}")
        else:
            frames.append(frame.assign(run=number, **_sft_columns(frame, run)))
    return (pd.concat(frames, ignore_index=True) if frames else None), missing


def _sft_columns(frame: pd.DataFrame, run: Run) -> dict[str, Any]:
    """Return the columns ``kind``, ``policy`` (of the rank) and ``composed`` (bool) of each row's SFT."""
    keys, sfts = frame["key"], run.record.sfts
    return {
        "kind": keys.map({sft.key: sft.kind for sft in sfts}),
        "policy": keys.map({sft.key: shown_value(sft.rank, "rank") for sft in sfts}),
        "composed": keys.isin(run.record.composed()),
    }


def energy(summary: Summary) -> Drawn | str:
    """Draw the share of each weight change's squared Frobenius norm that its kept directions hold, by layer."""
    return _by_layer(
        summary,
        "energy",
        "retained energy",
        "Share of the squared norm of the weight change that the kept directions hold",
    )


def kept_rank(summary: Summary) -> Drawn | str:
    """Draw the number of directions kept, by layer."""
    return _by_layer(summary, "rank", "kept rank", "Directions kept of each matrix")


def _by_layer(summary: Summary, measure: str, label: str, sentence: str) -> Drawn | str:
    frame, missing = facts_of(summary)
    if frame is None:
        return missing[0] if missing else "no diagnostics"
    frame = frame[(frame["what"] == "sft") & frame[measure].notna() & frame["composed"]]
    if not len(frame):
        return "no run denoised anything (LT-SFT only)"
    ordered = ordered_values(frame["policy"])
    shown = _spread_out(ordered)
    kinds = [kind for kind in KINDS if (frame["kind"] == kind).any()]
    figure, axes = panels(len(kinds), height=3.0, sharey=True)
    layers = sorted(frame["layer"].unique())
    for axis, kind in zip(axes, kinds, strict=True):
        for order, policy in enumerate(shown):
            part = frame[(frame["kind"] == kind) & (frame["policy"] == policy)].groupby("layer")[measure].mean()
            part = part.reindex(layers)
            axis.plot(range(len(layers)), part.to_numpy(), label=f"rank={policy}", **look(order))
        axis.set_xticks(range(len(layers)), layer_names(layers))
        axis.set_title(KINDS[kind])
        axis.set_xlabel("layer (emb.: outside of the layers)" if -1 in layers else "layer")
    if measure == "energy":
        axes[0].set_ylim(0, 1.03)
        axes[0].set_ylabel(f"{label} (share)")
    else:
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel(f"{label} (directions)")
    legend(figure, axes[0])
    some = f"; {len(shown)} of {len(ordered)} policies are drawn" if len(shown) < len(ordered) else ""
    return Drawn(figure, f"{sentence}: means over a layer's matrices, composed SFTs and seeds{some}.")


def _spread_out(values: list[str]) -> list[str]:
    """Return at most :data:`MOST_LINES` evenly spaced values, the first and the last among them."""
    if len(values) <= MOST_LINES:
        return values
    return [values[round(number * (len(values) - 1) / (MOST_LINES - 1))] for number in range(MOST_LINES)]


def spectra(summary: Summary) -> Drawn | str:
    """Draw singular values of the full phase's weight changes; they do not depend on rank or density."""
    for run in summary.section.runs:
        try:
            frame = read_diagnostics(run, ("what", "key", "layer", "module", "singular_values"))
        except DeftxError:
            continue
        if "singular_values" in frame and (figure := _spectra(frame[frame["what"] == "sft"], run)) is not None:
            return Drawn(
                figure,
                "Singular values of the full phase's weight change, relative to the largest: medians over each "
                f"layer's matrices (seed {run.record.seed}); they do not depend on rank or density.",
            )
    return "no run holds singular values (nothing was denoised, or no diagnostics)"


def _spectra(frame: pd.DataFrame, run: Run) -> Figure | None:
    """Draw one language SFT of a target, one of another language and one task SFT; the others look alike."""
    targets = {str(code) for code in run.record.settings.get("language") or []}
    sfts = {sft.key: sft for sft in run.record.sfts}
    denoised = frame.loc[frame["singular_values"].notna(), "key"]
    picked: dict[tuple[str, bool], SFTFacts] = {}
    for sft in (sfts[key] for key in dict.fromkeys(denoised) if key in sfts):
        picked.setdefault((sft.kind, sft.kind == "language" and not targets.isdisjoint(sft.languages)), sft)
    return inside.spectra(
        [
            (
                f"language {'+'.join(sft.languages)} SFT" if sft.kind == "language" else "task SFT",
                frame[frame["key"] == sft.key],
            )
            for sft in picked.values()
        ]
    )


def mask_density(summary: Summary) -> Drawn | str:
    """Draw the density of the masks: a heat map, module × layer, for each kind of SFT and method."""
    frame, missing = facts_of(summary)
    if frame is None:
        return missing[0] if missing else "no diagnostics"
    frame = frame[(frame["what"] == "sft") & frame["density"].notna()]
    chosen = [best for condition in summary.section.methods if (best := _best(summary, condition)) is not None]
    composed = [(column, frame[_composed_in(column, frame, summary)]) for column in chosen]
    parts = [
        (kind, f"{title}, {column.label}", rows[rows["kind"] == kind])
        for kind, title in KINDS.items()
        for column, rows in composed
    ]
    parts = [part for part in parts if len(part[2])]
    if not parts:
        return "the diagnostics hold no masks of the methods' SFTs"
    qualifier = " (of several settings the one that scores highest)" if _several(summary) else ""
    return Drawn(
        inside.mask_density(parts),
        f"Share of each module's coordinates that the mask selects, by layer{qualifier}: sums over composed "
        "SFTs and seeds; white: the layer has no such module.",
    )


def _composed_in(column: Column, frame: pd.DataFrame, summary: Summary) -> npt.NDArray[np.bool_]:
    """Return for each row whether a run composes its SFT for a column's scores, bool [rows]."""
    runs = summary.section.runs_of(column)
    keys = {
        (number, key)
        for number, run in enumerate(summary.section.runs)
        if run in runs
        for key in run.record.composed(column.condition)
    }
    return np.array([pair in keys for pair in zip(frame["run"], frame["key"], strict=True)], dtype=bool)


def _best(summary: Summary, condition: str) -> Column | None:
    row = MEAN if len(summary.section.languages) > 1 else summary.section.languages[0]
    scored = [
        (score.mean, column)
        for column in summary.section.named([condition])
        if (score := summary.scores.get((column, row))) is not None
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _several(summary: Summary) -> bool:
    return any(len(summary.section.named([condition])) > 1 for condition in summary.section.methods)
