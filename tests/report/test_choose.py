"""A setting is chosen by what is known before a target label is read, and its score is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fabricate import Report, write_run

from deftx.errors import DeftxError
from deftx.report.choose import ON_LABELS, RULES, choose, describe
from deftx.report.collect import collect
from deftx.report.sections import make_sections
from deftx.report.summary import Options, Summary, summarise

RANKS = {"4": (0.9, 2.0, 0.5), "16": (0.8, 1.0, 0.9), "64": (0.7, 3.0, 0.7)}
"""Rank -> validation score of φ_T, loss of φ_L, and how often the composed model is right."""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for rank, (score, loss, skill) in RANKS.items():
        for seed in (0, 1):
            folder = write_run(tmp_path / f"{rank}-{seed}", rank=rank, seed=seed, conditions={"deftx": skill})
            path = folder / "result.json"
            content = json.loads(path.read_text())
            for sft in content["sfts"]:
                best = score if sft["kind"] == "task" else loss
                sft["metrics"]["best_score"] = best + 0.01 * seed
            path.write_text(json.dumps(content))
    return tmp_path


def summary(folder: Path) -> Summary:
    (section,) = make_sections(collect([folder]).runs)
    return summarise(section, None, Options(samples=100))


@pytest.mark.parametrize(
    ("rule", "rank", "value"), [("source_validation", "4", 0.905), ("target_mlm_loss", "16", 1.005)]
)
def test_a_rule_chooses_by_its_own_values(sweep: Path, rule: str, rank: str, value: float) -> None:
    (choice,) = choose(summary(sweep), RULES[rule])
    assert choice.column.knobs["rank"] == rank
    assert choice.values[choice.column] == pytest.approx(value)
    assert len(choice.values) == 3


def test_the_score_of_what_is_chosen_is_told(sweep: Path) -> None:
    found = summary(sweep)
    rule = RULES["source_validation"]
    (choice,) = choose(found, rule)
    score = 100 * found.scores[choice.column, "mean"].mean
    (line,) = describe(found, rule, [choice])
    assert line.startswith("chosen of 3 settings by the source's validation score (90.50): DeFT-X rank=4: macro-F1 ")
    assert f"macro-F1 {score:.1f} ± " in line
    assert line.endswith("over 2 seeds")
    best = max(found.scores[column, "mean"].mean for column in found.section.columns)
    assert 100 * best > score + 5, "what the test labels would have chosen is another one"


def test_what_does_not_say_it_is_named_or_refused(sweep: Path) -> None:
    path = sweep / "16-1/result.json"
    content = json.loads(path.read_text())
    for sft in content["sfts"]:
        del sft["metrics"]["best_score"]
    path.write_text(json.dumps(content))
    rule, found = RULES["target_mlm_loss"], summary(sweep)
    (line,) = describe(found, rule, choose(found, rule))
    assert "DeFT-X rank=4" in line
    assert "unknown for DeFT-X rank=16" in line
    for rank in RANKS:
        for seed in (0, 1):
            path = sweep / f"{rank}-{seed}/result.json"
            path.write_text(path.read_text().replace("best_score", "other"))
    with pytest.raises(DeftxError, match=r"no run of .* says the targets' masked-language-model loss"):
        choose(summary(sweep), rule)


def test_one_setting_leaves_nothing_to_choose(tmp_path: Path) -> None:
    write_run(tmp_path)
    rule, found = RULES["source_validation"], summary(tmp_path)
    assert describe(found, rule, choose(found, rule)) == ["nothing to choose: no method has several settings"]


def test_the_command_says_it(report: Report, sweep: Path) -> None:
    shown = report(str(sweep), "--choose", "target_mlm_loss", "--samples", "100")
    assert shown.status == 0, shown.err
    assert "chosen of 3 settings by the targets' masked-language-model loss" in shown.words
    (table,) = (sweep / "report/tables").glob("*-chosen.md")
    title, header, *_ = [line for line in table.read_text().splitlines() if line]
    assert title == "**Chosen by masked-language-model loss: demo · nusax · test · tiny · macro-F1**"
    assert header == "| target | n | DeFT-X rank=16 |"
    for wrong in (["--choose", "test"], ["--choose", "dev"]):
        refused = report(str(sweep), *wrong)
        assert refused.status == 1
        assert f"{wrong[0]} {wrong[1]}: must be source_validation or target_mlm_loss" in refused.err
    refused = report(str(sweep), "--choose-on", "test")
    assert "--choose-on test: must be dev" in refused.err
    refused = report(str(sweep), "--choose-on", "dev", "--choose", "source_validation")
    assert "--choose and --choose-on" in refused.err
    refused = report(str(sweep), "--choose-on", "dev")
    assert refused.status == 1
    assert "split=[test,dev] evaluates both in one run" in refused.err


def test_whoever_chooses_on_target_labels_says_so_in_the_title(report: Report, tmp_path: Path) -> None:
    on_dev = {"4": 0.95, "16": 0.2, "64": 0.3}  # test rows would choose 16 (RANKS)
    for rank, dev in on_dev.items():
        for seed in (0, 1):
            skill = RANKS[rank][2]
            write_run(
                tmp_path / f"{rank}-{seed}",
                rank=rank,
                seed=seed,
                conditions={"deftx": skill},
                on_dev={"deftx": dev},
            )
    test, dev_rows = make_sections(collect([tmp_path]).runs)
    assert (test.split, dev_rows.split) == ("test", "dev")
    scores = {section.split: len(section.cells) for section in (test, dev_rows)}
    assert scores == {"test": 12, "dev": 12}, "no score of one split stands in the other's table"
    summaries = [summarise(section, None, Options(samples=100)) for section in (test, dev_rows)]
    (choice,) = choose(summaries[0], ON_LABELS["dev"], summaries)
    assert choice.column.knobs["rank"] == "4"
    best = {
        s.section.split: max(s.section.columns, key=lambda column: s.scores[column, "mean"].mean) for s in summaries
    }
    assert best["dev"].knobs["rank"] == "4"
    assert best["test"].knobs["rank"] == "16"

    shown = report(str(tmp_path), "--choose-on", "dev", "--samples", "100")
    assert shown.status == 0, shown.err
    title = "Chosen on target labels, not zero-shot: demo · nusax · test · tiny · macro-F1"
    assert title in shown.words
    (table,) = (tmp_path / "report/tables").glob("*-chosen.md")
    assert title in table.read_text()
    assert title in (tmp_path / "report/report.html").read_text()
    own = summaries[0].scores[choice.column, "mean"]
    assert f"{100 * own.mean:.1f}" in table.read_text()
