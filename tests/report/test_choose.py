"""A setting is chosen by what is known before a target label is read, and its score is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fabricate import Report, write_run

from deftx.errors import DeftxError
from deftx.report.choose import choose, describe
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
    (choice,) = choose(summary(sweep), rule)
    assert choice.column.knobs["rank"] == rank
    assert choice.values[choice.column] == pytest.approx(value)
    assert len(choice.values) == 3


def test_the_score_of_what_is_chosen_is_told(sweep: Path) -> None:
    found = summary(sweep)
    (choice,) = choose(found, "source_validation")
    score = 100 * found.scores[choice.column, "mean"].mean
    (line,) = describe(found, "source_validation")
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
    (line,) = describe(summary(sweep), "target_mlm_loss")
    assert "DeFT-X rank=4" in line
    assert "unknown for DeFT-X rank=16" in line
    for rank in RANKS:
        for seed in (0, 1):
            path = sweep / f"{rank}-{seed}/result.json"
            path.write_text(path.read_text().replace("best_score", "other"))
    with pytest.raises(DeftxError, match=r"no run of .* says the targets' masked-language-model loss"):
        choose(summary(sweep), "target_mlm_loss")


def test_one_setting_leaves_nothing_to_choose(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert describe(summary(tmp_path), "source_validation") == ["nothing to choose: no method has several settings"]


def test_the_command_says_it(report: Report, sweep: Path) -> None:
    shown = report(str(sweep), "--choose", "target_mlm_loss", "--samples", "100")
    assert shown.status == 0, shown.err
    assert "chosen of 3 settings by the targets' masked-language-model loss" in shown.words
    refused = report(str(sweep), "--choose", "test")
    assert refused.status == 1
    assert "--choose test: must be source_validation or target_mlm_loss" in refused.err
    assert "target labels choose nothing" in refused.err
