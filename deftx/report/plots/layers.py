"""Plots of what happened inside: energy and rank that denoising kept, spectra, and where masks lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deftx.errors import DeftxError
from deftx.report.collect import Run, read_diagnostics
from deftx.report.knobs import ordered_values, shown_value
from deftx.report.plots.style import DASHES, MARKERS, Drawn, heat_map, legend, look, panels, shades, titled
from deftx.report.sections import MEAN, Column
from deftx.report.summary import Summary
from deftx.tracking import DIAGNOSTICS, SFTFacts

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("what", "key", "other_key", "layer", "module", "size", "selected", "density", "rank", "energy"),
    *("overlap", "sign_conflicts"),
)
KINDS = {"language": "language SFTs", "task": "task SFTs"}
MOST_LINES = 7


def facts_of(summary: Summary) -> tuple[pd.DataFrame | None, list[str]]:
    """Diagnostics of a section's runs below each other, with the columns ``run`` (its number) and those of
    :func:`_about`; and what could not be read.
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
            frames.append(frame.assign(run=number, **_about(frame, run)))
    return (pd.concat(frames, ignore_index=True) if frames else None), missing


def _about(frame: pd.DataFrame, run: Run) -> dict[str, Any]:
    """``kind`` and rank ``policy`` of each row's SFT, and whether the run's methods compose it."""
    keys, sfts = frame["key"], run.record.sfts
    return {
        "kind": keys.map({sft.key: sft.kind for sft in sfts}),
        "policy": keys.map({sft.key: shown_value(sft.rank, "rank") for sft in sfts}),
        "composed": keys.isin(run.record.composed()),
    }


def energy(summary: Summary) -> Drawn | str:
    """Share of the squared Frobenius norm of each weight change that its kept directions hold."""
    return _by_layer(
        summary,
        "energy",
        "retained energy",
        "Share of the squared norm of the weight change that the kept directions hold",
    )


def kept_rank(summary: Summary) -> Drawn | str:
    """Number of directions kept."""
    return _by_layer(summary, "rank", "kept rank", "Directions kept of each matrix")


def _by_layer(summary: Summary, what: str, label: str, sentence: str) -> Drawn | str:
    frame, missing = facts_of(summary)
    if frame is None:
        return missing[0] if missing else "no diagnostics"
    frame = frame[(frame["what"] == "sft") & frame[what].notna() & frame["composed"]]
    if not len(frame):
        return "no run denoised anything (LT-SFT only)"
    ordered = ordered_values(frame["policy"])
    shown = _spread_out(ordered)
    kinds = [kind for kind in KINDS if (frame["kind"] == kind).any()]
    made, axes = panels(len(kinds), height=3.0, sharey=True)
    layers = sorted(frame["layer"].unique())
    for axis, kind in zip(axes, kinds, strict=True):
        for order, policy in enumerate(shown):
            part = frame[(frame["kind"] == kind) & (frame["policy"] == policy)].groupby("layer")[what].mean()
            part = part.reindex(layers)
            axis.plot(range(len(layers)), part.to_numpy(), label=f"rank={policy}", **look(order))
        axis.set_xticks(range(len(layers)), _layer_names(layers))
        axis.set_title(KINDS[kind])
        axis.set_xlabel("layer (emb.: outside of the layers)" if -1 in layers else "layer")
    if what == "energy":
        axes[0].set_ylim(0, 1.03)
        axes[0].set_ylabel(f"{label} (share)")
    else:
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel(f"{label} (directions)")
    legend(made, axes[0])
    some = f"; {len(shown)} of {len(ordered)} policies are drawn" if len(shown) < len(ordered) else ""
    return Drawn(made, f"{sentence}: means over a layer's matrices, composed SFTs and seeds{some}.")


def _spread_out(values: list[str]) -> list[str]:
    """At most :data:`MOST_LINES` of them, first and last included."""
    if len(values) <= MOST_LINES:
        return values
    return [values[round(number * (len(values) - 1) / (MOST_LINES - 1))] for number in range(MOST_LINES)]


def _layer_names(layers: list[int]) -> list[str]:
    return ["emb." if layer < 0 else str(layer) for layer in layers]


def spectra(summary: Summary) -> Drawn | str:
    """Singular values of the full phase's weight changes; they do not depend on rank or density."""
    for run in summary.section.runs:
        try:
            frame = read_diagnostics(run, ("what", "key", "layer", "module", "singular_values"))
        except DeftxError:
            continue
        if "singular_values" not in frame:
            continue
        frame = frame[(frame["what"] == "sft") & frame["singular_values"].notna()]
        frame = frame[[len(values) > 1 for values in frame["singular_values"]]]
        if len(frame):
            return _spectra(frame, run)
    return "no run holds singular values (nothing was denoised, or no diagnostics)"


def _spectra(frame: pd.DataFrame, run: Run) -> Drawn:
    targets = [str(code) for code in run.record.settings.get("language") or []]
    known = {sft.key: sft for sft in run.record.sfts}
    # One language SFT of a target, one of the source, one task SFT: the others look alike and would crowd the page.
    picked: dict[tuple[str, bool], SFTFacts] = {}
    for sft in (known[key] for key in dict.fromkeys(frame["key"]) if key in known):
        picked.setdefault((sft.kind, sft.kind == "language" and not set(targets).isdisjoint(sft.languages)), sft)
    layers = sorted(frame["layer"].unique())
    colours = dict(zip(layers, shades(len(layers)), strict=True))
    made, axes = panels(len(picked), height=3.2, most=3, sharey=True)
    for axis, sft in zip(axes, picked.values(), strict=True):
        mine = frame[frame["key"] == sft.key]
        for order, layer in enumerate(layers):
            values = [np.asarray(item, dtype=float) for item in mine.loc[mine["layer"] == layer, "singular_values"]]
            values = [item / item[0] for item in values if len(item) and item[0] > 0]
            if not values:
                continue
            length = max(map(len, values))
            padded = np.full((len(values), length), np.nan)
            for place, item in enumerate(values):
                padded[place, : len(item)] = item
            # Beyond the shortest matrix the median is of fewer, and would jump.
            median = np.nanmedian(padded[:, : min(map(len, values))], axis=0)
            axis.plot(
                np.arange(1, len(median) + 1),
                np.maximum(median, 1e-6),
                color=colours[layer],
                linestyle=DASHES[order % len(DASHES)],
                marker=MARKERS[order % len(MARKERS)],
                markevery=(order % 5, max(1, len(median) // 6)),
                markersize=4,
                linewidth=1.2,
                label="emb." if layer < 0 else f"layer {layer}",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(_whole())
        axis.set_title(f"language {'+'.join(sft.languages)} SFT" if sft.kind == "language" else "task SFT")
        axis.set_xlabel("index of the singular value")
    axes[0].set_ylabel("σᵢ / σ₁")
    legend(made, axes[0], 7)
    return Drawn(
        made,
        f"Singular values of the full phase's weight change, relative to the largest: medians over each "
        f"layer's matrices (seed {run.record.seed}); they do not depend on rank or density.",
    )


def _whole() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def mask_density(summary: Summary) -> Drawn | str:
    """Where the selected coordinates lie: a heat map for each kind of SFT and method."""
    frame, missing = facts_of(summary)
    if frame is None:
        return missing[0] if missing else "no diagnostics"
    frame = frame[(frame["what"] == "sft") & frame["density"].notna()]
    chosen = [best for condition in summary.section.methods if (best := _best(summary, condition)) is not None]
    parts = [(column, frame[_composed_in(column, frame, summary)]) for column in chosen]
    drawn = []
    for kind in KINDS:
        for column, rows in parts:
            part = rows[rows["kind"] == kind]
            if len(part):
                sums = part.groupby(["module", "layer"])[["selected", "size"]].sum()
                drawn.append((kind, f"{KINDS[kind]}, {column.label}", (sums["selected"] / sums["size"]).unstack()))
    if not drawn:
        return "the diagnostics hold no masks of the methods' SFTs"
    modules = sorted({str(module) for _, _, table in drawn for module in table.index}, key=_in_order)
    made, axes = panels(len(drawn), height=1.1 + 0.22 * len(modules), most=2)
    for axis, (kind, title, table) in zip(axes, drawn, strict=True):
        own = table.reindex([module for module in modules if module in table.index])
        layers = [int(layer) for layer in own.columns]
        names = [_module(name) for name in own.index]
        same = [100 * other.to_numpy() for its, _, other in drawn if its == kind]
        limits = (min(float(np.nanmin(item)) for item in same), max(float(np.nanmax(item)) for item in same))
        heat_map(axis, 100 * own.to_numpy(), names, _layer_names(layers), label="selected (%)", limits=limits)
        axis.tick_params(axis="y", labelsize=8)
        axis.tick_params(axis="x", labelsize=7)
        titled(axis, title)
        axis.set_xlabel("layer")
    which = " (of several settings the one that scores highest)" if _several(summary) else ""
    return Drawn(
        made,
        f"Share of each module's coordinates that the mask selects, by layer{which}: sums over composed "
        "SFTs and seeds; white: the layer has no such module.",
    )


def _composed_in(column: Column, frame: pd.DataFrame, summary: Summary) -> npt.NDArray[np.bool_]:
    """Whether each row is of an SFT that a run composes for a column's scores."""
    runs = summary.section.runs_of(column)
    keys = {
        (number, key)
        for number, run in enumerate(summary.section.runs)
        if run in runs
        for key in run.record.composed(column.condition)
    }
    return np.array([pair in keys for pair in zip(frame["run"], frame["key"], strict=True)], dtype=bool)


_ORDER = ("embeddings", "attention.self", "attention.output", "intermediate", "output")


def _in_order(module: str) -> tuple[int, str]:
    """Modules in the order a text passes them."""
    place = next((order for order, start in enumerate(_ORDER) if module.startswith(start)), len(_ORDER))
    return place, module


def _module(name: str) -> str:
    return (
        name.replace("attention.self.", "att.").replace("attention.output.", "att.out.").replace("embeddings.", "emb. ")
    )


def _best(summary: Summary, condition: str) -> Column | None:
    row = MEAN if len(summary.section.languages) > 1 else summary.section.languages[0]
    scored = [
        (score.mean, column)
        for column in summary.section.named([condition])
        if (score := summary.scores.get((column, row))) is not None
    ]
    return max(scored, key=lambda item: item[0])[1] if scored else None


def _several(summary: Summary) -> bool:
    return any(len(summary.section.named([condition])) > 1 for condition in summary.section.methods)
