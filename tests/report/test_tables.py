"""The four forms of a table."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fabricate import write_run
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score

from deftx.report.collect import collect
from deftx.report.page import template
from deftx.report.sections import make_sections
from deftx.report.summary import Difference, Options, Summary, summarise
from deftx.report.tables import Table, Text, difference_table, difference_text, latex, lead_table, score_table

BOTH = {"ltsft": 0.3, "deftx": 0.9}


def summary(folder: Path) -> Summary:
    (section,) = make_sections(collect([folder]).runs)
    return summarise(section, "ltsft", Options(samples=200))


def test_languages_are_rows_and_the_best_is_bold(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), conditions=BOTH, seed=seed)
    table = score_table(summary(tmp_path))
    assert table.header == ["target", "n", "LT-SFT", "DeFT-X"]
    assert [row[0].text for row in table.rows] == ["ace", "min", "mean of 2"]
    assert all(row[3].bold and not row[2].bold for row in table.rows)
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", row[3].text) for row in table.rows)
    assert "2 seeds" in table.caption


def test_the_lead_table_has_methods_under_paper_names_and_what_a_guess_gets(tmp_path: Path) -> None:
    conditions = {"no_language_sft": 0.8, "ltsft": 0.3, "deftx": 0.9}
    for rank in ("4", "16"):
        write_run(tmp_path / rank, conditions=conditions, rank=rank)
    found = summary(tmp_path)
    table = lead_table(found)
    assert table is not None
    assert table.header == ["method", "ace", "min", "mean of 2"]
    assert [row[0].text for row in table.rows] == [
        "DeFT-X, rank 4",
        "DeFT-X, rank 16",
        "LT-SFT",
        "majority",
        "chance",
    ]
    assert table.ruled == [3]
    golds = {language: cell.items.gold for (_, language, _), cell in found.section.cells.items() if cell.items}
    for place, language in enumerate(("ace", "min"), 1):
        gold = golds[language]
        always = DummyClassifier(strategy="most_frequent").fit(gold[:, None], gold).predict(gold[:, None])
        rng = np.random.default_rng(0)
        score = f1_score if found.section.metric == "macro_f1" else accuracy_score
        options = {"average": "macro"} if score is f1_score else {}
        assert table.rows[3][place].text == f"{100 * score(gold, always, **options):.1f}"
        drawn = np.repeat(gold, 400)
        guessed = rng.integers(0, 3, len(drawn))
        assert float(table.rows[4][place].text) == pytest.approx(100 * score(drawn, guessed, **options), abs=0.6)


@pytest.mark.parametrize(
    ("low", "high", "clear"), [(-0.03, -0.0001, False), (-0.03, -0.001, True), (0.0004, 0.1, False), (0.001, 0.1, True)]
)
def test_a_zero_that_is_shown_is_not_outside(low: float, high: float, clear: bool) -> None:
    difference = Difference(0.5 * (low + high), (0, 1, 2), low, high)
    assert difference.clear is clear
    assert (
        "0.0" in difference_text(difference)[difference_text(difference).index("[") :].replace("10.0", "")
    ) is not clear


def test_many_methods_are_rows(tmp_path: Path) -> None:
    for rank in (*range(2, 16), None):
        write_run(tmp_path / str(rank), rank=None if rank is None else str(rank))
    table = score_table(summary(tmp_path))
    assert table.header == ["method", "ace", "min", "mean of 2"]
    methods = [row[0].text for row in table.rows]
    assert methods == ["n", "LT-SFT", *(f"DeFT-X rank={rank}" for rank in range(2, 16))]


def test_fewer_seeds_are_marked_and_never_the_best(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", rank=None, seed=seed, conditions={"ltsft": 0.3})
    write_run(tmp_path / "b", rank="4", conditions={"deftx": 0.9})
    table = score_table(summary(tmp_path))
    assert table.rows[0][3].text.endswith("(1 seed)")
    assert [cell.bold for cell in table.rows[0][2:]] == [False, False]


def test_one_seed_has_no_spread_and_the_method_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, conditions=BOTH)
    table = difference_table(summary(tmp_path))
    assert table is not None
    assert re.fullmatch(r"\+\d+\.\d \[\d+\.\d, \d+\.\d\]", table.rows[0][2].text)
    assert not any(cell.bold for row in table.rows for cell in row), "one seed marks nothing"
    assert "resamples of items (one seed: the spread over seeds is not in them)" in table.caption


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Difference(0.012, (0,), -0.003, 0.027), "+1.2 [−0.3, 2.7]"),
        (Difference(-0.012, (0,), -0.03, -0.0001), "−1.2 [−3.0, 0.0]"),
        (Difference(-0.0001, (0,)), "0.0"),
    ],
)
def test_differences_are_written_with_their_signs(difference: Difference, text: str) -> None:
    assert difference_text(difference) == text


def test_every_form_escapes_what_means_something_in_it() -> None:
    table = Table(
        "a_b", "50% & more_#1", ["m|n", "<b>"], [[Text("*x*<i>"), Text("−1 ± 2", bold=True)]], caption="$&<>{}~^\\"
    )
    tex = table.latex()
    assert r"50\% \& more\_\#1" in tex
    assert r"\textbf{$-$1 $\pm$ 2}" in tex
    assert r"\$\&\textless{}\textgreater{}\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in tex
    for rule in ("toprule", "midrule", "bottomrule"):
        assert tex.count(rf"\{rule}") == 1
    assert tex.count(" & ") == 2
    markdown = table.markdown()
    assert r"| m\|n | \<b\> |" in markdown
    assert r"| \*x\*\<i\> | **−1 ± 2** |" in markdown
    html = template("table.html.j2").render(table=table)
    assert "&lt;b&gt;" in html
    assert "<th scope=row>*x*&lt;i&gt;</th>" in html
    assert "<b>−1 ± 2</b>" in html
    assert "50% &amp; more_#1" in html


def test_latex_keeps_words_that_need_nothing() -> None:
    assert latex("DeFT-X rank=16") == "DeFT-X rank=16"


def test_a_spreadsheet_runs_nothing(tmp_path: Path) -> None:
    from deftx.report.tables import scores_csv

    write_run(tmp_path, conditions={"=HYPERLINK(1)": 0.5})
    assert "'=HYPERLINK(1)" in scores_csv([summary(tmp_path)])
