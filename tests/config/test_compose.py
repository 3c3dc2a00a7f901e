"""Sharing compositions changes nothing: what a job gets is what Hydra composes, and what its worker runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from deftx.config import check_command, hydra_session, run_job, study_settings, typed
from deftx.config.check import COMPOSE_ERRORS
from deftx.config.compose import Composer
from deftx.settings import RunConfig
from deftx.stages.settings import StudySettings

# Jobs of one command each, so that later ones meet the compositions of earlier ones.
JOBS: dict[str, list[list[str]]] = {
    "values": [["seed=3"], ["seed=4", "rank=energy:0.5"], ["lang.training.epochs=2", "seed=3"], []],
    "the last one counts": [["rank=2", "rank=3"], ["rank=3", "rank=2"], ["k=3", "k=null", "density=0.5"]],
    "groups among values": [
        ["seed=1", "budget=smoke", "lang.training.epochs=7"],
        ["lang.training.epochs=7", "seed=1", "budget=smoke"],
        ["denoise=none", "rank=4"],
        ["rank=4", "denoise=none"],
        ["experiment=demo", "seed=2"],
        ["seed=2", "experiment=demo", "trainer=cpu"],
        ["experiment=[demo,rank_x_sparsity]", "seed=5"],
        ["language=[qba,qbb]", "language.qba.text=[a.txt,'b c.txt']"],
        ["model=local", "model.path=/x"],
    ],
    "lists": [
        ["compare=[ltsft]", "controls=[]"],
        ["compare=[]"],
        ["denoise.exclude=['embeddings.*',x]"],
        ["lang.exclude=[]", "denoise.exclude=[y]"],
        ["data.labels=[no,yes]", "data.labels=[a]"],
    ],
    "mappings": [
        ["++data.revisions.nusax=abc", "seed=1"],
        ["seed=1", "++data.revisions.nusax=abc", "seed=2"],
        ["++data.revisions={nusax: a}", "++data.revisions={xnli: b}"],
        ["++launcher.additional.mail=me", "launcher.setup=['module load x']"],
        ["search.space={rank: [1, 2], density: {low: 0.1, high: 0.2}}"],
        ["synthetic={train: 6, valid: 3}", "synthetic.valid=9"],
        ["model={name: other}", "model.seed=3"],
        ["model.name=x", "model={name: other}"],
        ["model.pretrain={steps: 3}"],
    ],
    "additions and deletions": [
        ["+foo=3", "seed=1"],
        ["seed=1", "+foo={a: 1}", "foo.a=2"],
        ["+foo=1", "++foo=2"],
        ["~model.pretrain", "model.path=/x"],
        ["rank=3", "~rank", "+rank=4"],
        ["~language.qba"],
        ["++rank=5", "rank=6"],
        ["+model@second=local", "seed=3"],
        ["~source", "seed=1"],
    ],
    "texts": [
        ["rank='energy:0.9'", "study='a.b'"],
        ['study="x-1"', "logger.tags=['a b','c,d']"],
        ["data.root='/a b/c=d'", "model.path=/ü/é"],
        ["lang.rank=${task.rank}", "task.rank=7"],
        ["rank=${seed}", "seed=4"],
        ["task.training.epochs=${lang.training.epochs}", "lang.training.epochs=9"],
        ["study=null", "seed=0x10"],
        ["data.root=", "k=1e3"],
        ["second_phase=False", "lang.training.learning_rate=1e-3", "trainer.threads=null"],
    ],
    "hydra's own": [["hydra.run.dir=x", "seed=1"], ["hydra.job.name=y", "seed=2"]],
    "wrong": [
        ["seed=abc"],
        ["rnak=3", "seed=1"],
        ["seed=1", "model=local", "model.pretrain.steps=9"],
        ["model=tinny"],
        ["lang=3"],
        ["~foo"],
        ["+seed=3"],
        ["seed=1,2"],
        ["nothing@seed=3"],
        ["compare={a: 1}"],
        ["denoise.exclude=3"],
    ],
}


def outcome(composer: Any, overrides: list[str]) -> Any:
    """A configuration as plain values, unresolved and in order; or an error as its texts."""
    try:
        config = composer(overrides)
    except COMPOSE_ERRORS as error:
        return type(error), str(error), str(error.__cause__)
    # As text, too: the order of keys.
    return OmegaConf.to_container(config), OmegaConf.to_yaml(config), OmegaConf.is_struct(config)


SLOW = ("groups among values", "additions and deletions", "texts")  # seconds each


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.soak] * (name in SLOW)) for name in JOBS])
def test_a_job_is_what_hydra_composes(name: str) -> None:
    with hydra_session():
        shared = Composer("run")
        expected = [outcome(lambda texts: compose("run", overrides=texts), overrides) for overrides in JOBS[name]]
        jobs = list(zip(JOBS[name], expected, strict=True))
        for overrides, composed in [*jobs, *reversed(jobs)]:
            assert outcome(shared, overrides) == composed, overrides


def test_jobs_of_equal_choices_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []

    def counted(name: str, overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return compose(name, overrides=overrides)

    monkeypatch.setattr("deftx.config.compose.compose", counted)
    with hydra_session():
        shared = Composer("run")
        for seed in range(5):
            for budget in ("smoke", "demo"):
                assert shared(["rank=3", f"budget={budget}", f"seed={seed}", "++data.revisions.nusax=a"]).seed == seed
    assert composed == [["budget=smoke"], ["budget=demo"]]


SWEEPS = [
    ["experiment=demo", "seed=1,2", "rank=energy:0.9,none"],
    ["experiment=component_ablation", "seed=0,1"],
    ["experiment=rank_x_sparsity", "seed=0", "density=0.1", "compare=[ltsft]"],
    ["experiment=demo", "budget=smoke,demo", "lang.exclude=['embeddings.*']", "++data.revisions.nusax=x"],
    ["language=[qba],[qba,qbb]", "source=sft,none", "lang.k=10", "trainer.threads=2"],
]


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_a_worker_resolves_to_what_was_checked(tmp_path: Path, overrides: list[str]) -> None:
    """What is planned is what runs: the one comes from shared compositions, the other from Hydra's own launch."""
    with hydra_session():
        command = check_command("run", overrides, multirun=True)
    assert len(command.jobs) > 1
    for number, job in enumerate(command.jobs):

        def work(config: RunConfig) -> tuple[RunConfig, StudySettings]:
            return config, study_settings(config)

        ran = run_job("run", work, job.overrides, config_dir=None, folder=str(tmp_path / str(number)))
        assert ran == (job.config, job.study)


def test_composed_settings_are_the_declared_dataclasses() -> None:
    with hydra_session():
        config = typed(compose("run", overrides=["lang.rank=3", "task=tsv"]))
        assert config.task.source == ""  # said when it is resolved
        assert (config.lang.rank, config.task.rank, config.source.rank) == (3, "energy:0.9", 3)
        assert config.lang.training == config.budget.language
        assert list(config.language) == ["qba", "qbb", "qbc"]
