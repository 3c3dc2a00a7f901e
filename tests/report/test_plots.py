"""The numbers in the plots: read from the figures' lines and points, and counted again from the results."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricate import write_run
from scipy.stats import spearmanr

from deftx import tracking
from deftx.plots.style import Drawn
from deftx.report.collect import collect
from deftx.report.plots import facts, layers
from deftx.report.sections import make_sections
from deftx.report.summary import Options, Summary, summarise

BOTH = {"ltsft": 0.5, "deftx": 0.7}
CONTROLLED = {"no_language_sft": 0.4, **BOTH}


def summary(folder: Path) -> Summary:
    (section,) = make_sections(collect([folder]).runs)
    return summarise(section, "ltsft", Options(samples=20))


def drawn(result: Drawn | str) -> Drawn:
    assert isinstance(result, Drawn), result
    return result


def points(result: Drawn | str) -> list[dict[str, list[float]]]:
    """Of each panel: label -> x of its points, and under ``LABEL y`` their y."""
    panels = []
    for axis in drawn(result).figure.axes:
        found = {}
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            line: Any = handle[0] if isinstance(handle, tuple) else handle
            found[label], found[f"{label} y"] = list(line.get_xdata()), list(line.get_ydata())
        panels.append(found)
    return panels


def minutes(folder: Path, names: list[str]) -> float:
    """Both phases of SFTs that are named by hand."""
    told = {sft.name: sft.metrics for sft in tracking.read_result(folder).sfts}
    return sum(told[name]["seconds"] + told[name].get("full", {}).get("seconds", 0) for name in names) / 60


DEFTX = "deftx rank={} residual=prune:0.05"


def test_the_cost_of_ltsft_is_that_of_runs_that_trained_it(tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH, rank="4", **{"task.source": "ind"})
    write_run(tmp_path / "1", conditions={"deftx": 0.7}, rank="8", **{"task.source": "ind"})
    found = points(facts.cost(summary(tmp_path)))
    source = f"language ind {DEFTX.format('energy:0.9')}"
    expected = minutes(
        tmp_path / "0", [source, *(f"{part} ltsft" for part in ("language ace", "language min", "task on θ⁰+ind"))]
    )
    assert expected == pytest.approx((1000 + 3 * 180) / 60)
    assert found[0]["LT-SFT"] == pytest.approx([expected])


@pytest.mark.parametrize("diagnostics", [True, False])
def test_the_cost_is_that_of_what_is_composed_and_of_what_lies_under_it(tmp_path: Path, diagnostics: bool) -> None:
    known = {"task.source": "ind", "controls": ["no_language_sft"]}
    write_run(tmp_path / "0", conditions=CONTROLLED, rank="4", diagnostics=diagnostics, **known)
    time, memory, size = points(facts.cost(summary(tmp_path)))
    own = [f"{part} {DEFTX.format(4)}" for part in ("language ace", "language min", "task on θ⁰+ind")]
    expected = minutes(tmp_path / "0", [f"language ind {DEFTX.format('energy:0.9')}", *own])
    assert time["DeFT-X"] == pytest.approx([expected])
    assert memory["DeFT-X"] == pytest.approx([1.0])  # the control's took 8 GiB
    assert size["DeFT-X"] == pytest.approx([2 * 5 * 1e5 / 2**20])


def test_the_cost_where_the_source_is_a_target(tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH, rank="4", diagnostics=True, **{"task.source": "ace"})
    time, _, size = points(facts.cost(summary(tmp_path)))
    source = f"language ace {DEFTX.format('energy:0.9')}"
    for title, tail in (("DeFT-X", DEFTX.format(4)), ("LT-SFT", "ltsft")):
        own = [f"{part} {tail}" for part in ("language ace", "language min", "task on θ⁰+ind")]
        assert time[title] == pytest.approx([minutes(tmp_path / "0", [source, *own])])
        assert size[title] == pytest.approx([2 * 5 * 1e5 / 2**20])


@pytest.mark.parametrize("source", ["ind", "ace"])
@pytest.mark.parametrize("what", ["energy", "rank"])
def test_layers_are_means_over_composed_sfts_alone(tmp_path: Path, source: str, what: str) -> None:
    known = {"task.source": source, "source.rank": "31"}
    write_run(tmp_path / "0", conditions=CONTROLLED, rank="4", diagnostics=True, **known)
    frame = pd.read_parquet(tmp_path / "0" / tracking.DIAGNOSTICS)
    found = points((layers.energy if what == "energy" else layers.kept_rank)(summary(tmp_path)))
    names = (["language ace", "language min"], ["task on θ⁰+ind"])
    for panel, own in zip(found, names, strict=True):
        rows = frame[frame["sft"].isin([f"{name} {DEFTX.format(4)}" for name in own])]
        expected = [rows.loc[rows["layer"] == layer, what].astype(float).mean() for layer in (-1, 0, 1, 2, 3)]
        assert panel["rank=4 y"] == pytest.approx(expected)
    if what == "rank":
        assert found[0]["rank=4 y"] == pytest.approx([4] * 5)  # not nearer to the source's 31


@pytest.mark.parametrize("source", ["ind", "ace"])
def test_mask_density_is_that_of_composed_sfts(tmp_path: Path, source: str) -> None:
    known = {"task.source": source, "source.rank": "31"}
    write_run(tmp_path / "0", conditions=CONTROLLED, rank="4", diagnostics=True, **known)
    write_run(tmp_path / "1", conditions={"deftx": 0.1}, rank="8", diagnostics=True, **known)
    frame = pd.read_parquet(tmp_path / "0" / tracking.DIAGNOSTICS)
    figure = drawn(layers.mask_density(summary(tmp_path))).figure
    maps = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    own = ["language ace", "language min"], ["task on θ⁰+ind"]
    wanted = [[f"{name} {tail}" for name in names] for names in own for tail in (DEFTX.format(4), "ltsft")]
    assert len(maps) == len(wanted)
    for drawn_map, names in zip(maps, wanted, strict=True):
        rows = frame[(frame["what"] == "sft") & frame["sft"].isin(names) & (frame["module"] == "output.dense")]
        sums = rows.groupby("layer")[["selected", "size"]].sum()
        assert any(
            np.allclose(np.ma.compressed(np.ma.masked_invalid(row)), 100 * (sums["selected"] / sums["size"]))
            for row in np.ma.asarray(drawn_map)
            if np.ma.compressed(np.ma.masked_invalid(row)).size == len(sums)
        )


CODES = ["ace", "ban", "bjn", "mad", "min"]


def morphology(folder: Path, words: dict[str, int]) -> Drawn:
    """Of two densities in five languages whose samples have some numbers of words."""
    measured = {"fertility": 1.5, "type_token_ratio": 0.3, "words_per_sentence": 9.0}
    for number, density in enumerate((0.05, 0.1)):
        known = {
            code: {name: value + place / 10 for name, value in measured.items()}
            | ({"words": words[code]} if code in words else {})
            for place, code in enumerate(CODES)
        }
        write_run(
            folder / str(number), conditions={"deftx": 0.7}, density=density, languages_facts=known, language=CODES
        )
    return drawn(facts.morphology(summary(folder)))


def panels_of(result: Drawn) -> dict[str, list[str]]:
    return {axis.get_xlabel(): [text.get_text() for text in axis.texts] for axis in result.figure.axes}


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (dict.fromkeys(CODES, 10_000), CODES),
        ({}, CODES),  # older results do not say it
        (dict.fromkeys(CODES, 10_000) | {"ban": 4_000}, ["ace", "bjn", "mad", "min"]),
        ({"ace": 10_000, "ban": 10_000, "bjn": 10_000, "mad": 9_999}, ["ace", "ban", "bjn"]),
        ({"ace": 10_000, "ban": 9_000, "bjn": 8_000, "mad": 7_000, "min": 6_000}, []),
    ],
)
def test_type_token_ratios_are_of_samples_of_one_size(tmp_path: Path, words: dict[str, int], left: list[str]) -> None:
    result = morphology(tmp_path, words)
    panels = panels_of(result)
    assert panels.get("type-token ratio", []) == left
    assert panels["subword fertility (pieces a word)"] == panels["words a sentence"] == CODES
    absent = ", ".join(code for code in CODES if code not in left) if left else "ban, bjn, mad, min"
    told = f"The type-token ratio is without {absent}: of fewer words than 10,000."
    assert (told in result.caption) is (left != CODES)
    for axis in result.figure.axes:
        if axis.get_xlabel() == "type-token ratio":
            x = axis.containers[0].lines[0].get_xdata()
            assert list(x) == pytest.approx([0.3 + CODES.index(code) / 10 for code in left])


def test_an_evaluation_that_several_runs_hold_is_one_point(tmp_path: Path) -> None:
    for rank in ("4", "8"):
        write_run(tmp_path / rank, conditions=BOTH, rank=rank, diagnostics=True, **{"task.source": "ind"})
    (axis, _) = drawn(facts.overlap(summary(tmp_path))).figure.axes[:2]
    collections = {item.get_label(): len(item.get_offsets()) for item in axis.collections}
    # LT-SFT reads no rank: both runs hold one and the same evaluation of it.
    assert {name: count for name, count in collections.items() if "LT-SFT" in str(name)} == {
        "ace, LT-SFT": 1,
        "min, LT-SFT": 1,
    }
    assert {name: count for name, count in collections.items() if "DeFT-X" in str(name)} == {
        "ace, DeFT-X": 2,
        "min, DeFT-X": 2,
    }


@pytest.mark.parametrize("n", [4, 7, 12])
def test_rank_correlations_are_those_of_every_order(n: int) -> None:
    """Spearman's ρ by scipy; its p counted by hand over all orders, or over 20,000 drawn ones."""
    rng = np.random.default_rng(n)
    x, y = rng.random(n), rng.integers(0, 3, n).astype(float)
    rho, p = facts.spearman(x, y, seed=1)
    assert rho == pytest.approx(spearmanr(x, y).statistic)
    few = n <= facts.EXACT
    orders = list(itertools.permutations(range(n))) if few else [rng.permutation(n) for _ in range(3000)]
    ranks = pd.Series(x).rank().to_numpy(), pd.Series(y).rank().to_numpy()
    drawn = np.array([np.corrcoef(ranks[0], ranks[1][list(order)])[0, 1] for order in orders])
    assert p == pytest.approx(np.mean(np.abs(drawn) >= abs(rho) - 1e-9), abs=1e-12 if few else 0.03)


def test_permutations_within_families_exchange_nothing_else() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.random(7), rng.random(7)
    families = ["a", "a", "a", "b", "b", "c", "d"]
    test = facts.permuted(x, y, seed=0, groups=families)
    ranks = pd.Series(x).rank().to_numpy(), pd.Series(y).rank().to_numpy()
    orders = [[*first, *second, 5, 6] for first in itertools.permutations(range(3)) for second in ([3, 4], [4, 3])]
    strengths = np.abs([np.corrcoef(ranks[0], ranks[1][order])[0, 1] for order in orders])
    assert test.orders == len(orders) == 12
    assert test.p == pytest.approx(np.mean(strengths >= strengths[0] - 1e-9))
    assert test.smallest == pytest.approx(1 / 12)
    assert facts.permuted(x, y, seed=0).orders == 5040
    many = facts.permuted(rng.random(14), rng.random(14), seed=0)
    assert (many.orders, many.smallest) == (20_000, 1 / 20_001)
    alone = facts.permuted(x, y, seed=0, groups=list("abcdefg"))
    assert (alone.p, alone.orders, alone.smallest) == (1.0, 1, 1.0), "languages alone in their families say nothing"


def test_no_spread_is_no_correlation() -> None:
    assert np.isnan(facts.spearman(np.array([1.0, 2.0, 3.0]), np.ones(3), seed=0)).all()


def test_an_easy_language_makes_no_correlation() -> None:
    """Within each language the score falls as the fact grows, although the language with more of it scores higher."""
    points = [("ace", "deftx", x, 0.0, 10 - x) for x in (1.0, 2.0, 3.0)]
    points += [("min", "deftx", x, 0.0, 90 - x) for x in (11.0, 12.0, 13.0)]
    assert facts._within(points, 2) == (pytest.approx(-1.0), 6)
    assert facts._within(points[:2], 2)[1] == 0
