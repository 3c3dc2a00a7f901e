"""A small study with W&B offline, from the command line: the dashboard's names, the job types, lineage."""

from __future__ import annotations

import json

import pytest
from offline_runs import config, of, records, summary
from small_study import Command

from deftx.dashboard import config_names, specification, summary_names


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_a_run_has_every_name_that_the_dashboard_asks_for(deftx: Command) -> None:
    outcome = deftx("run", "logger=offline")
    assert outcome.status == 0, outcome.err
    found = records(next(outcome.folder.rglob("result.json")).parent)
    (run, *_) = of("run", found)
    assert (run.run_group, run.job_type) == ("demo", "run")
    assert set(run.tags) == {"deftx", "ltsft", "synthetic", "qba", "qbb"}

    there = {name.split("|")[0] for name in summary(found)}
    for metric in ("macro_f1", "accuracy"):
        spec = specification("demo", metric=metric, languages=["qba", "qbb"])
        assert summary_names(spec) <= there
        assert config_names(spec) <= set(config(found))
        assert len(summary_names(spec)) > 12

    # Against the run's own record.
    result, values = outcome.result(), summary(found)
    scores = {(row["language"], row["condition"], row["metric"]): row["value"] for row in result["metrics"]}
    for language in ("qba", "qbb"):
        own, plain = (scores[language, name, "accuracy"] for name in ("deftx", "ltsft"))
        assert values[f"score/accuracy/{language}"] == own
        assert values[f"diff/accuracy/{language}"] == pytest.approx(own - plain)
    assert values["seconds/total"] == result["seconds"]
    assert values["memory/cpu"] == result["peak_memory"]["cpu"]
    assert config(found)["rank"] == result["settings"]["rank"]

    artifacts = {item.name: item for item in of("artifact", found) if item.type != "run_table"}
    used = {json.loads(item.metadata)["sha256"] for item in artifacts.values() if item.use_after_commit}
    assert used == {sft["sha256"] for sft in result["sfts"]}
    assert [item.type for item in artifacts.values() if not item.use_after_commit] == ["result"]


def test_a_job_that_trains_one_sft_says_what_it_made(deftx: Command) -> None:
    outcome = deftx("sft", "kind=task", "logger=offline")
    assert outcome.status == 0, outcome.err
    found = records(next(outcome.folder.rglob("result.json")).parent)
    (run, *_) = of("run", found)
    assert run.job_type == "sft-task"
    made = {json.loads(item.metadata)["role"]: item.use_after_commit for item in of("artifact", found)}
    assert made == {"task": False, "language": True}, "the source's, which the task SFT starts on, is an input"
    assert summary(found)["energy/task"] > 0


def test_wandb_disabled_by_the_environment_leaves_the_results(deftx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    outcome = deftx("run", "logger=offline", "language=qba", "compare=[]", "controls=[]")
    assert outcome.status == 0, outcome.err
    assert outcome.result()["status"] == "done"
    assert not list(outcome.folder.rglob("*.wandb"))
