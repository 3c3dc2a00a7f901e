"""Masks of two methods are compared beside those of two seeds: the noise floor."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import Report, write_run

from deftx.report.collect import collect
from deftx.report.masks import mask_table
from deftx.report.sections import make_sections
from deftx.report.summary import Options, Summary, summarise


def summary(folder: Path) -> Summary:
    (section,) = make_sections(collect([folder]).runs)
    return summarise(section, "ltsft", Options(samples=100))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (0, 1, 2):
        write_run(tmp_path / str(seed), seed=seed, conditions={"deftx": 0.6, "ltsft": 0.6}, rank="8", diagnostics=True)
    return tmp_path


def masks(folder: Path, language: str, method: str) -> list[set[tuple[str, int]]]:
    """The coordinates of a language SFT of each seed, read naively."""
    found = []
    for seed in (0, 1, 2):
        frame = pd.read_parquet(folder / str(seed) / "diagnostics.parquet")
        rows = frame[(frame["what"] == "sft") & frame["sft"].str.startswith(f"language {language} {method}")]
        assert len(rows)
        found.append({(row.parameter, abs(int(number))) for row in rows.itertuples() for number in row.sample})
    return found


def index(first: set[tuple[str, int]], second: set[tuple[str, int]]) -> float:
    return 100 * len(first & second) / len(first | second)


def test_methods_meet_beside_seeds(runs: Path) -> None:
    table = mask_table(summary(runs))
    assert table is not None
    assert table.header == ["target", "DeFT-X and LT-SFT", "two seeds of LT-SFT", "two seeds of DeFT-X"]
    assert [row[0].text for row in table.rows] == ["ace", "min", "mean of 2"]
    for row in table.rows[:2]:
        deftx, ltsft = (masks(runs, row[0].text, method) for method in ("deftx", "ltsft"))
        expected = [np.mean([index(one, other) for one, other in zip(deftx, ltsft, strict=True)])]
        expected += [np.mean([index(*pair) for pair in combinations(of, 2)]) for of in (ltsft, deftx)]
        assert [float(cell.text) for cell in row[1:]] == pytest.approx(expected, abs=0.051)


def test_masks_need_two_methods_and_samples(tmp_path: Path) -> None:
    write_run(tmp_path / "one/0", conditions={"deftx": 0.6}, diagnostics=True)
    assert mask_table(summary(tmp_path / "one")) is None
    folder = write_run(tmp_path / "old/0", conditions={"deftx": 0.6, "ltsft": 0.6}, diagnostics=True)
    path = folder / "diagnostics.parquet"
    pd.read_parquet(path).drop(columns="sample").to_parquet(path)
    assert mask_table(summary(tmp_path / "old")) is None


def test_the_report_writes_them(report: Report, runs: Path) -> None:
    shown = report(str(runs), "--samples", "100")
    assert shown.status == 0, shown.err
    assert re.search(r"Overlap of masks: demo", shown.words)
    (path,) = (runs / "report/tables").glob("*-masks.tex")
    assert "two seeds of LT-SFT" in path.read_text()
    assert "Overlap of masks" in (runs / "report/report.html").read_text()
