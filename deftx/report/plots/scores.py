"""Plots of scores: all methods at a glance, a score against one knob, and the heat map of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deftx.methods.table import METHODS
from deftx.plots.style import REFERENCE, WIDTH, Drawn, figure, heat_map, legend, look, panels, titled
from deftx.report.knobs import canonical, knob_text, number, ordered_values, shown_value
from deftx.report.sections import MEAN, Column
from deftx.report.summary import Score, Summary
from deftx.tracking import CONDITIONS
from deftx.tracking.names import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40
MOST_SERIES = 7


def look_of(condition: str) -> dict[str, Any]:
    """Return the look of a condition, the same in every plot: DeFT-X has blue discs, LT-SFT black squares."""
    if condition == BASELINE:
        return {"color": REFERENCE, "marker": "s", "linestyle": (0, (4, 2)), "markerfacecolor": "white"}
    first, *more = [name for name in METHODS if name not in ("deftx", BASELINE)]
    order = ["deftx", first, "no_language_sft", "source_sft", "other_language_sft", "composed", "source_language_only"]
    order += more
    return look(order.index(condition) if condition in order else len(order))


def overview(summary: Summary) -> Drawn | str:
    """Draw every method's score, and its difference to the baseline with the interval."""
    section = summary.section
    row = MEAN if len(section.languages) > 1 else section.languages[0]
    columns = [column for column in section.columns if (column, row) in summary.scores]
    if len(columns) < 2:
        return "there is one method only"
    if len(columns) > MOST_ROWS:
        return f"{len(columns)} methods are too many rows for one plot; the tables hold them"
    compared = any((column, row) in summary.differences for column in columns)
    fig, axes = figure(WIDTH, 1.3 + 0.26 * len(columns), 1, 2 if compared else 1, sharey=True)
    scores, positions = axes[0][0], list(range(len(columns)))
    for position, column in zip(positions, columns, strict=True):
        if row == MEAN:
            each = [
                100 * summary.scores[column, code].mean
                for code in section.languages
                if (column, code) in summary.scores
            ]
            scores.plot(each, [position] * len(each), "|", color="#8a8a8a", markersize=9, zorder=1)
        score = summary.scores[column, row]
        style = look_of(column.condition) | {"linestyle": "none"}
        scores.errorbar(100 * score.mean, position, xerr=_spread(score), capsize=3, zorder=3, **style)
    scores.set_yticks(positions, [_short(column, summary, row) for column in columns], fontsize=8.5)
    scores.set_ylim(len(columns) - 0.5, -0.5)
    scores.set_xlabel(f"{section.metric_name} × 100")
    title = "mean over languages" if row == MEAN else row
    scores.set_title(f"score, {title}")
    ticks = "grey ticks: single languages; " if row == MEAN else ""
    caption = f"{section.metric_name} of each method, {title} ({ticks}bars: standard deviation over seeds)"
    if compared:
        against = axes[0][1]
        against.axvline(0, color=REFERENCE, linewidth=1)
        for position, column in zip(positions, columns, strict=True):
            difference = summary.differences.get((column, row))
            if difference is None:
                continue
            bars = None
            if difference.low is not None and difference.high is not None:
                bars = [
                    [100 * max(0.0, difference.value - difference.low)],
                    [100 * max(0.0, difference.high - difference.value)],
                ]
            style = look_of(column.condition) | {"linestyle": "none"}
            against.errorbar(100 * difference.value, position, xerr=bars, capsize=3, **style)
        against.set_xlabel(f"difference in {section.metric_name} × 100")
        baseline = CONDITIONS.get(str(summary.baseline), str(summary.baseline))
        against.set_title(f"difference to {baseline}")
        caption += f", and its difference to {baseline} with {100 * summary.options.confidence:g} % intervals"
    return Drawn(fig, f"{caption}.")


def against_rank(summary: Summary) -> Drawn | str:
    """Draw a panel for each language: ranks on a logarithmic axis, policies beside them, LT-SFT as a line."""
    return _against(summary, "rank", "rank", line=True)


def against_density(summary: Summary) -> Drawn | str:
    """Draw a panel for each language: the mask's density, else K, on a logarithmic axis."""
    drawn = _against(summary, "density", "density of the mask", line=False)
    if isinstance(drawn, str):
        sizes = _against(summary, "k", "K (coordinates)", line=False)
        return drawn if isinstance(sizes, str) else sizes
    return drawn


def against_residual(summary: Summary) -> Drawn | str:
    """Draw a panel for each language: residual policies side by side."""
    return _against(summary, "residual", "residual policy", line=True)


def knob_of(columns: Sequence[Column], name: str) -> str | None:
    """Return the name under which a knob varies: its own, else the language SFTs', else the task SFT's."""
    names = {key for column in columns for key in column.knobs}
    for key in (name, f"lang.{name}", f"task.{name}"):
        if key in names and len({canonical({"": column.knobs.get(key)}) for column in columns}) > 1:
            return key
    return None


def _against(summary: Summary, name: str, label: str, *, line: bool) -> Drawn | str:
    section = summary.section
    columns = section.named(section.methods)
    knobs = {
        column: key
        for condition in section.methods
        for column in section.named([condition])
        if (key := knob_of(section.named([condition]), name)) is not None
    }
    columns = [column for column in columns if column in knobs]
    key = next(iter(knobs.values()), None)
    if key is None:
        return f"{name} does not vary between the runs"
    series: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        rest = " ".join(knob_text(k, v) for k, v in column.knobs.items() if k.rpartition(".")[2] != name)
        series.setdefault((column.condition, rest), []).append(column)
    if len(series) > MOST_SERIES:
        return f"{len(series)} lines would not be readable; the heat map and the tables hold them"
    positions = _positions([column.knobs[knobs[column]] for column in columns])
    rows = [row for row in [MEAN, *section.languages] if row in summary.rows]
    fig, axes = panels(len(rows))
    for axis, row in zip(axes, rows, strict=True):
        ltsft_last = sorted(series.items(), key=lambda line_columns: line_columns[0][0] == BASELINE)
        for order, ((condition, rest), columns_of_line) in enumerate(ltsft_last):
            values = [c.knobs[knobs[c]] for c in columns_of_line]
            # A little apart, so that error bars of several lines do not cover each other.
            aside = (order - (len(series) - 1) / 2) * 0.03 * _width(positions)
            points = [
                (positions[canonical({"": value})] + aside, number(value) is not None, column)
                for value, column in zip(values, columns_of_line, strict=True)
            ]
            style = look_of(BASELINE) if condition == BASELINE and not rest else look(order)
            _line(axis, summary, row, points, f"{columns_of_line[0].title} {rest}".strip(), style)
            if line:
                _reference(
                    axis, summary, row, columns_of_line, f"{CONDITIONS[BASELINE]} {rest}".strip(), order, len(series)
                )
        axis.set_title("mean over languages" if row == MEAN else row)
        _ticks(axis, positions, [column.knobs[knobs[column]] for column in columns])
    across = min(4, len(axes))
    for axis in axes[::across]:
        axis.set_ylabel(f"{section.metric_name} × 100")
    for axis in axes[-across:]:
        axis.set_xlabel(label)
    legend(fig, axes[0], 3)
    bars = "bars: standard deviation over seeds" if len(summary.seeds) > 1 else "one seed"
    extra = ""
    if line and any(section.baseline_of(column, BASELINE) is not None for column in columns):
        extra = "; dashed: LT-SFT" + (", with its spread as a band" if len(series) == 1 else " of the same setting")
    return Drawn(fig, f"{section.metric_name} against {label}, for each language ({bars}{extra}; the y axes differ).")


def _positions(values: Sequence[Any]) -> dict[str, float]:
    """Return each value's position on the x axis: numbers at their logarithm, words in equal steps to the right."""
    ordered = ordered_values(values)
    numbers = [value for value in ordered if (as_number := number(value)) is not None and as_number > 0]
    words = [value for value in ordered if value not in numbers]
    logs = [float(np.log2(number(value) or 1)) for value in numbers]
    span = (logs[-1] - logs[0]) if len(logs) > 1 else 1.0
    step = span / max(2.0, len(logs) - 1) if len(logs) > 1 else 1.0
    start = logs[-1] if logs else 0.0
    positions = dict(zip((canonical({"": value}) for value in numbers), logs, strict=True))
    for order, value in enumerate(words):
        positions[canonical({"": value})] = start + step * (order + 1.2)
    return positions


def _width(positions: Mapping[str, float]) -> float:
    return max(positions.values()) - min(positions.values()) or 1.0


def _ticks(axis: Axes, positions: dict[str, float], values: Sequence[Any]) -> None:
    shown = {canonical({"": value}): value for value in values}
    ordered = sorted(positions.items(), key=lambda pair: pair[1])
    labels = [
        shown_value(shown[key], "rank").replace("gavish_donoho", "gavish\ndonoho").replace(":", ":\n")
        for key, _ in ordered
    ]
    axis.set_xticks([position for _, position in ordered], labels)
    crowded = len(ordered) > 5
    axis.tick_params(axis="x", labelsize=8, rotation=90 if crowded else 0)
    words = [position for key, position in ordered if number(shown[key]) is None]
    figures = [position for key, position in ordered if number(shown[key]) is not None]
    if words and figures:
        axis.axvline((figures[-1] + words[0]) / 2, color="#bbbbbb", linewidth=1, linestyle=(0, (2, 2)))


def _line(
    axis: Axes,
    summary: Summary,
    row: str,
    points: Sequence[tuple[float, bool, Column]],
    title: str,
    style: Mapping[str, Any],
) -> None:
    drawn_points = [
        (position, joined, summary.scores[column, row])
        for position, joined, column in sorted(points, key=lambda point: point[0])
        if (column, row) in summary.scores and not summary.scores[column, row].missing
    ]
    # A line joins numbers; policies are points of their own.
    for numeric in (True, False):
        part = [point for point in drawn_points if point[1] == numeric]
        if part:
            x, y = [position for position, _, _ in part], [100 * score.mean for _, _, score in part]
            spread = [_spread(score) or 0.0 for _, _, score in part]
            dash = style["linestyle"] if numeric else "none"
            axis.errorbar(
                x,
                y,
                yerr=spread if any(spread) else None,
                capsize=3,
                **{**style, "linestyle": dash},
                label=title if drawn_points[0] is part[0] else None,
            )


def _reference(
    axis: Axes, summary: Summary, row: str, columns: Sequence[Column], title: str, order: int, several: int
) -> None:
    bases = {base for column in columns if (base := summary.section.baseline_of(column, BASELINE)) is not None}
    scores = [summary.scores[base, row] for base in bases if (base, row) in summary.scores]
    if len(scores) != 1 or scores[0].missing:
        return
    colour = REFERENCE if several == 1 else look(order)["color"]
    mean, spread = 100 * scores[0].mean, _spread(scores[0])
    axis.axhline(mean, color=colour, linestyle=(0, (4, 2)), linewidth=1.3, label=title, zorder=1)
    if spread and several == 1:
        axis.axhspan(mean - spread, mean + spread, color=colour, alpha=0.1, linewidth=0, zorder=0)


def rank_by_sparsity(summary: Summary) -> Drawn | str:
    """Draw a heat map of the mean over languages by rank and density; LT-SFT is the last row."""
    section = summary.section
    for columns in (section.named([condition]) for condition in section.methods):
        rank = knob_of(columns, "rank")
        size = knob_of(columns, "density") or knob_of(columns, "k")
        if rank is not None and size is not None:
            break
    else:
        return "rank and density do not both vary between the runs"
    row = MEAN if len(section.languages) > 1 else section.languages[0]
    ranks = ordered_values(column.knobs[rank] for column in columns)
    sizes = ordered_values(column.knobs[size] for column in columns)
    own = (rank, size)
    groups: dict[str, list[Column]] = {}
    for column in columns:
        rest = " ".join(
            knob_text(k, v)
            for k, v in column.knobs.items()
            if k not in own and k.rpartition(".")[2] not in ("rank", "density", "k")
        )
        groups.setdefault(rest, []).append(column)
    if len(groups) > 4:
        return f"{len(groups)} heat maps would be needed: other knobs vary, too"
    fig, axes = panels(len(groups), height=0.9 + 0.36 * (len(ranks) + 1), most=2)
    incomplete = False
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        values = np.full((len(ranks) + 1, len(sizes)), np.nan)
        for column in group:
            where = sizes.index(column.knobs[size])
            base = section.baseline_of(column, BASELINE)
            for index, cell in ((ranks.index(column.knobs[rank]), column), (len(ranks), base)):
                score = summary.scores.get((cell, row)) if cell is not None else None
                if score is not None and not score.missing:
                    values[index][where] = 100 * score.mean
                elif cell is not None:
                    incomplete = True
        names = [shown_value(value, "rank") for value in ranks] + ["none (LT-SFT)"]
        if np.isnan(values[-1]).all():
            values, names = values[:-1], names[:-1]
        texts = [shown_value(value) for value in sizes]
        heat_map(axis, values, names, texts, form=".1f", label=f"{section.metric_name} × 100")
        axis.set_xlabel(size)
        axis.set_ylabel(rank)
        titled(axis, title or ("mean over languages" if row == MEAN else row))
    more = "; a dash: a run or a language is missing" if incomplete else ""
    return Drawn(
        fig,
        f"{section.metric_name} by rank and {size}, {'mean over languages' if row == MEAN else row} and seeds{more}.",
    )


def _spread(score: Score) -> float | None:
    return 100 * score.std if score.std is not None else None


def _short(column: Column, summary: Summary, row: str) -> str:
    score = summary.scores[column, row]
    present = len(summary.section.languages) - len(score.missing)
    return column.label + (f" ({present} of {len(summary.section.languages)})" if score.missing else "")
