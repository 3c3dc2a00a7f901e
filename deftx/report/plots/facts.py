"""Plots of scores against the overlap of the composed SFTs, against cost, and against the languages' morphology."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deftx.methods.table import METHODS
from deftx.plots.style import COLOURS, MARKERS, Drawn, legend, look, panels, titled
from deftx.report.collect import Run
from deftx.report.knobs import canonical, number
from deftx.report.plots.layers import facts_of
from deftx.report.plots.scores import knob_of, look_of
from deftx.report.sections import MEAN, Column
from deftx.report.summary import Summary
from deftx.tracking import CONDITIONS

MEASURES = {
    "fertility": "subword fertility (pieces a word)",
    "type_token_ratio": "type-token ratio",
    "words_per_sentence": "words a sentence",
}
OF_SAMPLE = "type_token_ratio"
"""The measure that falls as a sample grows; only samples of equal size are compared."""
WORDS = "words"  # size of the sample
_NAMED = 6
EXACT = 8  # points whose permutations are all counted
DRAWN = 20_000  # permutations where there are more


def overlap(summary: Summary) -> Drawn | str:
    """Draw overlap and sign conflicts of a composition's masks against its score; a point is a language and run."""
    frame, missing = facts_of(summary)
    if frame is None:
        return missing[0] if missing else "no diagnostics"
    if not (frame["what"] == "pair").any():
        return "no run composed a language SFT with a task SFT"
    sizes = frame[frame["what"] == "sft"].groupby(["run", "key"])["selected"].sum()
    rows = frame[frame["what"] == "pair"]
    pairs = rows.groupby(["run", "key", "other_key"])[["overlap", "sign_conflicts"]].sum().to_dict("index")
    points: list[tuple[str, str, float, float, float]] = []
    section = summary.section
    seen = set()
    for run_number, run in enumerate(section.runs):
        # What is composed with φ_T: a target's own language SFT, under its method's condition.
        own = (cell for cell in run.record.cells if cell.condition in (cell.method, "composed"))
        for cell in sorted(own, key=lambda cell: (cell.condition, cell.language)):
            counts = pairs.get((run_number, *(cell.pair or ())))
            column = section.column_of(run, cell.condition)
            score = section.cells.get((column, cell.language, run.record.seed or 0)) if column is not None else None
            where = (column, cell.language, run.record.seed or 0)
            if counts is None or cell.pair is None or score is None or score.value is None or where in seen:
                continue
            seen.add(where)  # several runs may hold the same target, setting and seed
            both = float(counts["overlap"])
            size = sum(float(sizes.get((run_number, key), 0)) for key in cell.pair)
            if size > both:
                conflicts = float(counts["sign_conflicts"]) / both if both else math.nan
                points.append((cell.language, cell.condition, both / (size - both), conflicts, 100 * score.value))
    if len(points) < 3:
        return f"{len(points)} compositions with a score are too few"
    figure, axes = panels(2, height=3.1, sharey=True)
    methods = list(METHODS)
    positions = {code: order for order, code in enumerate(section.languages)}
    labels = ("overlap of the masks (Jaccard index)", "shared coordinates whose signs conflict (share)")
    for axis, field, label in zip(axes, (2, 3), labels, strict=True):
        for language, condition in dict.fromkeys((point[0], point[1]) for point in points):
            series = [point for point in points if point[:2] == (language, condition)]
            colour = COLOURS[positions[language] % len(COLOURS)]
            # A method's own filling: full, hollow, then grey.
            filling = [colour, "none", "#dddddd"][min(methods.index(condition), 2) if condition in methods else 0]
            axis.scatter(
                [point[field] for point in series],
                [point[4] for point in series],
                marker=MARKERS[positions[language] % len(MARKERS)],
                s=34,
                edgecolors=colour,
                facecolors=filling,
                alpha=0.85,
                linewidths=1.3,
                label=f"{language}, {CONDITIONS.get(condition, condition)}",
            )
        rho, n = _within(points, field)
        axis.set_xlabel(label)
        titled(axis, f"Spearman's ρ within languages: {rho:+.2f} (n\u00a0=\u00a0{n})" if n else "too few points for ρ")
        axis.xaxis.set_major_locator(_few_ticks())
    axes[0].set_ylabel(f"{section.metric_name} × 100")
    legend(figure, axes[0], 4)
    return Drawn(
        figure,
        "How language and task masks meet against the score of their composition; a point is a target, a "
        "setting and a seed, ρ is of ranks taken within each language. Points share SFTs and seeds, so no "
        "p-value is given.",
    )


def _within(points: list[tuple[str, str, float, float, float]], column: int) -> tuple[float, int]:
    """Return Spearman's ρ of ranks within languages, and its number of points; easy languages make no correlation."""
    from scipy.stats import rankdata

    ranks = []
    for language in dict.fromkeys(point[0] for point in points):
        values = [
            (point[column], point[4])
            for point in points
            if point[0] == language and not math.isnan(float(point[column]))
        ]
        if len(values) > 2:
            # Ranks are centred, and scaled so that languages with many points count no more than others.
            ranks.append((rankdata(values, axis=0) - (len(values) + 1) / 2) / len(values))
    if not ranks:
        return math.nan, 0
    first, second = np.concatenate(ranks).T
    rho = _correlation(first, second)
    return (rho, len(first)) if not math.isnan(rho) else (math.nan, 0)


def cost(summary: Summary) -> Drawn | str:
    """Draw training time, peak memory and size of the SFTs against the score of each setting."""
    section = summary.section
    row = MEAN if len(section.languages) > 1 else section.languages[0]
    points: dict[str, list[tuple[Column, float]]] = {"time": [], "memory": [], "size": []}
    for column in section.named(section.methods):
        facts: dict[str, list[float]] = {"time": [], "memory": [], "size": []}
        for run in section.runs_of(column):
            for key, value in _cost(run, column.condition).items():
                facts[key].append(value)
        for key, values in facts.items():
            if values and (column, row) in summary.scores and not summary.scores[column, row].missing:
                points[key].append((column, float(np.mean(values))))
    labels = {
        "time": "training time of its SFTs (minutes)",
        "memory": "peak memory of training (GiB)",
        "size": "size of two SFTs' files (MiB)",
    }
    measured = [key for key, columns in points.items() if columns]
    if not measured:
        return "the results hold no times, memory or sizes of their SFTs"
    figure, axes = panels(len(measured), height=3.0, sharey=True)
    kinds = list(dict.fromkeys(column.condition for key in measured for column, _ in points[key]))
    for axis, key in zip(axes, measured, strict=True):
        for condition in kinds:
            series = [(column, x) for column, x in points[key] if column.condition == condition]
            scores = [summary.scores[column, row] for column, _ in series]
            bars = [100 * (score.std or 0.0) for score in scores]
            if series:
                axis.errorbar(
                    [x for _, x in series],
                    [100 * score.mean for score in scores],
                    yerr=bars if any(bars) else None,
                    capsize=2,
                    label=series[0][0].title,
                    **{**look_of(condition), "linestyle": "none"},
                )
        if len(points[key]) <= _NAMED:  # more names would cover points; the tables hold them all
            _annotate(axis, [(x, 100 * summary.scores[column, row].mean, column.setting) for column, x in points[key]])
        axis.set_xlabel(labels[key])
        axis.margins(x=0.25, y=0.12)
        # From zero: of memory and size, differences of a thousandth would fill the panel.
        axis.set_xlim(left=0.0, right=1.3 * max(x for _, x in points[key]))
    axes[0].set_ylabel(f"{section.metric_name} × 100, {'mean over languages' if row == MEAN else row}")
    legend(figure, axes[0])
    absent = [labels[key] for key in labels if key not in measured]
    lacking = f" Not in these results: {', '.join(absent)}." if absent else ""
    return Drawn(
        figure,
        "What each setting costs against what it scores: the time is that of the training itself, full and sparse "
        "phase, wherever it happened (a cached stage keeps its own); the size is of one language and one task SFT."
        + lacking,
    )


def _annotate(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Write settings beside their points; leaves out those that would cover another."""
    wide = max(x for x, _, _ in points) - min(x for x, _, _ in points) or 1.0
    high = max(y for _, y, _ in points) - min(y for _, y, _ in points) or 1.0
    placed: list[tuple[float, float]] = []
    for x, y, text in points:
        if text and not any(abs(x - a) < 0.3 * wide and abs(y - b) < 0.06 * high for a, b in placed):
            axis.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center")
            placed.append((x, y))


def _cost(run: Run, condition: str) -> dict[str, float]:
    """Return time (minutes), memory (GiB) and size (MiB) of the SFTs that a condition's compositions use."""
    composed = run.record.composed(condition)
    # What a task SFT was trained on was trained for it, but is no part of what is composed.
    used = composed | {key for sft in run.record.sfts if sft.key in composed for key in sft.on}
    seconds, memory = 0.0, 0.0
    sizes: dict[str, list[float]] = {"language": [], "task": []}
    for sft in run.record.sfts:
        if sft.key not in used:
            continue
        full = sft.metrics.get("full") or {}
        seconds += (sft.metrics.get("seconds") or 0.0) + (full.get("seconds") or 0.0)
        memory = max(memory, sft.metrics.get("peak_memory") or 0, full.get("peak_memory") or 0)
        if sft.bytes and sft.key in composed:
            sizes[sft.kind].append(float(sft.bytes))
    costs = {}
    if seconds:
        costs["time"] = seconds / 60
    if memory:
        costs["memory"] = memory / 2**30
    if all(sizes.values()):
        costs["size"] = sum(float(np.mean(values)) for values in sizes.values()) / 2**20
    return costs


def morphology(summary: Summary) -> Drawn | str:
    """Draw the density that scores highest in each language against measures of its text."""
    section = summary.section
    columns = section.named(section.methods[:1])
    key = knob_of(columns, "density") or knob_of(columns, "k")
    if key is None:
        return "density does not vary between the runs"
    others = {canonical({k: v for k, v in column.knobs.items() if k != key}) for column in columns}
    if len(others) > 1:
        return "other knobs vary beside density, so there is no one best density"
    facts: dict[str, dict[str, float]] = {}
    unspaced: set[str] = set()
    for run in section.runs:
        for code, language_facts in run.record.languages.items():
            if language_facts.get("spaced") is False:
                unspaced.add(code)
                continue
            values = {name: number(language_facts.get(name)) for name in (*MEASURES, WORDS)}
            facts.setdefault(code, {}).update((name, value) for name, value in values.items() if value is not None)
    about = [item for run in section.runs for item in run.record.languages.items()]
    families = {code: str(of_code.get("family") or code) for code, of_code in about}
    by_loss = {code: value for code in section.languages if (value := _best_by_loss(summary, columns, code, key))}
    best: dict[str, tuple[float, float, float]] = {}
    for language in section.languages:
        scored = [
            (column, summary.scores[column, language])
            for column in columns
            if (column, language) in summary.scores and number(column.knobs[key])
        ]
        if len(scored) > 1:
            best[language] = _best_with_range(summary, language, [column for column, _ in scored], key)
    most = max((facts[code].get(WORDS, 0.0) for code in best if code in facts), default=0.0)
    short = [c for c in best if OF_SAMPLE in facts.get(c, {}) and facts[c].get(WORDS, 0.0) < most]
    for code in short:
        del facts[code][OF_SAMPLE]
    measures = [name for name in MEASURES if sum(name in facts.get(code, {}) for code in best) >= 3]
    if not measures:
        return (
            "fewer than three languages have measures of their text in the results (fertility, type-token ratio, ...)"
        )
    tried = sorted(value for column in columns if (value := number(column.knobs[key])))
    figure, axes = panels(len(measures), height=3.3, sharey=True)
    for axis, name in zip(axes, measures, strict=True):
        codes = [code for code in best if name in facts.get(code, {})]
        x = np.array([facts[code][name] for code in codes])
        y = np.array([best[code][0] for code in codes])
        bars = np.array([[max(0.0, best[c][0] - best[c][1]), max(0.0, best[c][2] - best[c][0])] for c in codes]).T
        axis.errorbar(
            x,
            y,
            yerr=bars if bars.any() else None,
            capsize=2,
            **{**look(0), "linestyle": "none"},
            elinewidth=0.8,
            ecolor="#9a9a9a",
        )
        told = [code for code in codes if code in by_loss]
        axis.plot(
            [facts[code][name] for code in told],
            [by_loss[code] for code in told],
            linestyle="none",
            marker="o",
            markersize=8,
            markerfacecolor="none",
            color="#9a9a9a",
        )
        for order, code in enumerate(codes):
            # Slanted: many languages share one best value, and their names would meet.
            axis.annotate(
                code, (x[order], y[order]), xytext=(1, 5), textcoords="offset points", fontsize=7.5, rotation=55
            )
        text = _correlation_text(x, y, [families.get(code, code) for code in codes], summary.options.seed)
        axis.set_title(text, fontsize=7.5)
        axis.set_xlabel(MEASURES[name])
        axis.set_yscale("log", base=2)
        axis.set_yticks(tried, [f"{value:g}" for value in tried])
        axis.set_ylim(tried[0] / 1.3, tried[-1] * 1.7)
        axis.margins(x=0.12)
    axes[0].set_ylabel(f"best {key}")
    bars_text = "; bars: where resamples of items and seeds find the best one" if summary.resampled else ""
    n = max(sum(name in facts.get(code, {}) for code in best) for name in measures)
    left_out = f" Without {', '.join(sorted(unspaced))}: no words between spaces to count." if unspaced else ""
    if short:
        left_out += f" The type-token ratio is without {', '.join(sorted(short))}: of fewer words than {most:,.0f}."
    small = f" {n} languages are few: a ρ of this size says little on its own." if n < 20 else ""
    return Drawn(
        figure,
        f"The {key} with the highest {section.metric_name} in each language against measures of its text"
        f"{bars_text}; grey rings: the {key} at which a language's own SFT has the lowest loss on its held-out text, "
        f"which no label chose. Spearman's ρ with two-sided permutation p, unrestricted and within language families, "
        f"each with the number of permutations and the smallest p that it can give; not corrected for {len(measures)} "
        f"measures.{small}{left_out} The best {key} by score is chosen on the split that is shown.",
    )


def _best_with_range(summary: Summary, language: str, columns: list[Column], key: str) -> tuple[float, float, float]:
    """Return the best value of a knob and its interval over resamples; without resamples the value three times."""
    values = np.array([number(column.knobs[key]) or 0.0 for column in columns])
    means = np.array([summary.scores[column, language].mean for column in columns])
    best = float(values[means.argmax()])
    seeds = sorted(set.intersection(*(set(summary.section.seeds(column, language)) for column in columns)))
    if not seeds or any((column, language, seed) not in summary.resampled for column in columns for seed in seeds):
        return best, best, best
    from deftx.report.bootstrap import Resampler

    shares = Resampler(summary.options.samples, summary.options.seed).seeds(seeds)
    drawn = np.stack(
        [
            (np.stack([summary.resampled[column, language, seed] for seed in seeds], axis=1) * shares).sum(axis=1)
            for column in columns
        ]
    )
    best_values = np.sort(values[drawn.argmax(axis=0)])
    tail = (1 - summary.options.confidence) / 2
    low, high = np.quantile(best_values, [tail, 1 - tail], method="nearest")
    return best, float(low), float(high)


def _best_by_loss(summary: Summary, columns: Sequence[Column], language: str, key: str) -> float | None:
    """Return the value of a knob at which a language's own SFT has the lowest loss; None where results lack it."""
    losses: dict[float, list[float]] = {}
    for column in columns:
        value = number(column.knobs[key])
        for run in summary.section.runs_of(column):
            sfts = {sft.key: sft for sft in run.record.sfts}
            cells = (c for c in run.record.cells if (c.language, c.condition) == (language, column.condition))
            for sft in (sfts.get(term.key) for cell in cells for term in cell.terms if term.kind == "language"):
                loss = None if sft is None else number(sft.metrics.get("best_score"))
                if loss is not None and value is not None:
                    losses.setdefault(value, []).append(loss)
    return min(losses, key=lambda value: float(np.mean(losses[value]))) if losses else None


class Permuted(NamedTuple):
    """A permutation test of Spearman's ρ.

    Attributes:
        p: Two-sided p.
        orders: Number of permutations: all there are, or those that were drawn.
        smallest: The smallest p that they can give.
    """

    p: float
    orders: int
    smallest: float


def spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """Return Spearman's ρ of x and y, float64 [n], and its two-sided p under all permutations (:func:`permuted`)."""
    from scipy.stats import rankdata

    return _correlation(rankdata(x), rankdata(y)), permuted(x, y, seed=seed).p


def permuted(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], *, seed: int, groups: Sequence[str] | None = None
) -> Permuted:
    """Return the permutation test of Spearman's ρ of x and y, float64 [n].

    All permutations count where there are at most 40,320 of them (eight points), else 20,000 are drawn.

    Args:
        x: One variable.
        y: The other, which is permuted.
        seed: Seed of the permutations that are drawn.
        groups: Groups within which alone values are exchanged, such as language families; None: any are.
    """
    from scipy.stats import rankdata

    # Centred ranks are multiples of a half, so their products add up exactly and ties between orders count as ties.
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    if not (np.ptp(first) and np.ptp(second)):
        return Permuted(math.nan, 0, math.nan)
    names = list(groups) if groups is not None else [""] * len(x)
    members = [np.flatnonzero([name == group for name in names]) for group in dict.fromkeys(names)]
    total = math.prod(math.factorial(len(group)) for group in members)
    exact = total <= math.factorial(EXACT)
    rng = np.random.default_rng(seed)
    orders = _all_orders(members, len(x)) if exact else _drawn_orders(members, len(x), DRAWN, rng)
    strengths = np.abs((first * second[orders]).sum(axis=1))
    reached = int((strengths >= abs(float((first * second).sum()))).sum())
    if exact:
        return Permuted(reached / total, total, int((strengths == strengths.max()).sum()) / total)
    return Permuted((reached + 1) / (DRAWN + 1), DRAWN, 1 / (DRAWN + 1))


def _all_orders(members: Sequence[npt.NDArray[np.int64]], n: int) -> npt.NDArray[np.int64]:
    """Return every order [orders, n] that exchanges within groups alone."""
    orders = []
    for parts in itertools.product(*(itertools.permutations(group) for group in members)):
        order = np.arange(n)
        for group, part in zip(members, parts, strict=True):
            order[group] = part
        orders.append(order)
    return np.array(orders)


def _drawn_orders(
    members: Sequence[npt.NDArray[np.int64]], n: int, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw orders [count, n] that exchange within groups alone."""
    orders = np.tile(np.arange(n), (count, 1))
    for group in members:
        orders[:, group] = rng.permuted(np.tile(group, (count, 1)), axis=1)
    return orders


def _correlation_text(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], families: Sequence[str], seed: int
) -> str:
    """Return ρ and both permutation tests in three lines."""
    rho, _ = spearman(x, y, seed=seed)
    if math.isnan(rho):
        return "ρ is undefined: no spread"
    lines = [f"ρ = {rho:+.2f}, n = {len(x)}"]
    for name, groups in (("free", None), ("within families", families)):
        test = permuted(x, y, seed=seed, groups=groups)
        lines.append(f"{name}: p = {test.p:.3f} of {test.orders:,}, ≥ {test.smallest:.2g}")
    return "\n".join(lines)


def _correlation(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Return Pearson's r; NaN where x or y has no spread."""
    from scipy.stats import pearsonr

    return float(pearsonr(x, y).statistic) if np.ptp(x) and np.ptp(y) else math.nan


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
