"""Plots of what happened inside: energy and rank that denoising kept, spectra, and where masks lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deftx.errors import DeftxError
from deftx.report.collect import Run, read_diagnostics
from deftx.report.knobs import ordered_values, score_settings, shown_value
from deftx.report.plots.style import DASHES, MARKERS, Drawn, heat_map, legend, look, panels, shades, titled
from deftx.report.sections import MEAN, Column
from deftx.report.sfts import composed, told
from deftx.report.summary import Summary
from deftx.tracking import DIAGNOSTICS

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("what", "sft", "other", "layer", "module", "size", "selected", "density", "rank", "energy"),
    *("overlap", "sign_conflicts"),
)
ROLES = {"language": "language SFTs", "task": "task SFTs"}
MOST_LINES = 7


def facts_of(summary: Summary) -> tuple[pd.DataFrame | None, list[str]]:
    """Diagnostics of a section's runs below each other, with the columns ``run`` (number), ``role``, ``language``,
    ``method`` and ``composed`` of :mod:`deftx.report.sfts`; and what could not be read.
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
            frames.append(frame.assign(run=number, **_named(frame, run)))
    return (pd.concat(frames, ignore_index=True) if frames else None), missing


def _named(frame: pd.DataFrame, run: Run) -> dict[str, Any]:
    """Role, language and method of SFTs, and whether the run's methods compose them."""
    names = frame["sft"]
    known = told(run, (str(name) for name in names.unique()))
    pairs = frame[frame["what"] == "pair"]
    mine = composed(run, known, {*map(str, pairs["sft"]), *map(str, pairs.get("other", ()))})
    return {
        "role": names.map({name: item.role for name, item in known.items()}),
        "language": names.map({name: "+".join(item.languages) for name, item in known.items()}),
        "method": names.map({name: item.method for name, item in known.items()}),
        "composed": names.isin(mine),
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
    frame = frame[(frame["what"] == "sft") & frame[what].notna() & frame["role"].isin(list(ROLES))]
    frame = frame[(frame["method"] != "ltsft") & frame["composed"]]
    if not len(frame):
        return "no run denoised anything (LT-SFT only)"
    settings = [score_settings(run.record.settings) for run in summary.section.runs]
    policies = {}
    for role, prefix in (("language", "lang"), ("task", "task")):
        for number, item in enumerate(settings):
            policies[role, number] = item.get(f"{prefix}.rank", item.get("rank"))
    frame = frame.assign(
        policy=[shown_value(policies[key], "rank") for key in zip(frame["role"], frame["run"], strict=True)]
    )
    ordered = [shown_value(value, "rank") for value in ordered_values(policies.values())]
    ordered = [policy for policy in ordered if policy in set(frame["policy"])]
    shown = _spread_out(ordered)
    roles = [role for role in ROLES if (frame["role"] == role).any()]
    made, axes = panels(len(roles), height=3.0, sharey=True)
    layers = sorted(frame["layer"].unique())
    for axis, role in zip(axes, roles, strict=True):
        for order, policy in enumerate(shown):
            part = frame[(frame["role"] == role) & (frame["policy"] == policy)].groupby("layer")[what].mean()
            part = part.reindex(layers)
            axis.plot(range(len(layers)), part.to_numpy(), label=f"rank={policy}", **look(order))
        axis.set_xticks(range(len(layers)), _layer_names(layers))
        axis.set_title(ROLES[role])
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
            frame = read_diagnostics(run, ("what", "sft", "layer", "module", "singular_values"))
        except DeftxError:
            continue
        if "singular_values" not in frame:
            continue
        frame = frame[(frame["what"] == "sft") & frame["singular_values"].notna()]
        frame = frame[[len(values) > 1 for values in frame["singular_values"]]]
        if len(frame):
            return _spectra(frame.assign(**_named(frame, run)), run)
    return "no run holds singular values (nothing was denoised, or no diagnostics)"


def _spectra(frame: pd.DataFrame, run: Run) -> Drawn:
    names = list(dict.fromkeys(frame["sft"]))
    targets = [str(code) for code in run.record.settings.get("language") or []]
    about = frame.drop_duplicates("sft").set_index("sft")
    # One language SFT of a target, one of the source, one task SFT: the others look alike and would crowd the page.
    picked: dict[tuple[str, bool], str] = {}
    for name in names:
        role, language = str(about.loc[name, "role"]), str(about.loc[name, "language"])
        picked.setdefault((role, role == "language" and language in targets), name)
    layers = sorted(frame["layer"].unique())
    colours = dict(zip(layers, shades(len(layers)), strict=True))
    made, axes = panels(len(picked), height=3.2, most=3, sharey=True)
    for axis, ((role, _), name) in zip(axes, picked.items(), strict=True):
        mine = frame[frame["sft"] == name]
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
        axis.set_title(" ".join(str(name).split()[: 2 if role == "language" else 1]) + " SFT")
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
    """Where the selected coordinates lie: a heat map for each role and method."""
    frame, missing = facts_of(summary)
    if frame is None:
        return missing[0] if missing else "no diagnostics"
    frame = frame[(frame["what"] == "sft") & frame["density"].notna() & frame["role"].isin(list(ROLES))]
    frame = frame[frame["composed"]]
    chosen: list[tuple[str, Column]] = []
    for condition in ("deftx", "ltsft"):
        best = _best(summary, condition)
        if best is not None:
            chosen.append((condition, best))
    drawn = []
    for role in ROLES:
        for condition, column in chosen:
            held = summary.section.runs_of(column)
            runs = {number for number, run in enumerate(summary.section.runs) if run in held}
            part = frame[(frame["role"] == role) & (frame["method"] == condition) & frame["run"].isin(runs)]
            if len(part):
                sums = part.groupby(["module", "layer"])[["selected", "size"]].sum()
                drawn.append((role, f"{ROLES[role]}, {column.label}", (sums["selected"] / sums["size"]).unstack()))
    if not drawn:
        return "the diagnostics hold no masks of the methods' SFTs"
    modules = sorted({str(module) for _, _, table in drawn for module in table.index}, key=_in_order)
    made, axes = panels(len(drawn), height=1.1 + 0.22 * len(modules), most=2)
    for axis, (role, title, table) in zip(axes, drawn, strict=True):
        own = table.reindex([module for module in modules if module in table.index])
        layers = [int(layer) for layer in own.columns]
        names = [_module(name) for name in own.index]
        same = [100 * other.to_numpy() for its, _, other in drawn if its == role]
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
    return any(len(summary.section.named([condition])) > 1 for condition in ("deftx", "ltsft"))
