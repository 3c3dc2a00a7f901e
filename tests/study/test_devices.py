"""The kind of device in a key is the workers', never the planning machine's; a worker that finds another stops."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose
from small_study import FEW, SMALL, Command

from deftx.cache import StageCache
from deftx.config import hydra_session, study_settings, typed
from deftx.jobs import Task, work
from deftx.stages.graph import graph
from deftx.stages.settings import StudySettings

DRAWING = [text for text in (*SMALL, *FEW) if text != "trainer=cpu"] + ["model.pretrain.dropout=0.1"]
TRAINED = {"pretrain", "full", "decompose", "select", "sparse", "evaluate"}


def study(*overrides: str, device: str = "") -> StudySettings:
    with hydra_session():
        return replace(study_settings(compose("run", overrides=[*DRAWING, *overrides])), device=device)


def keys(settings: StudySettings, cache: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in graph(settings, StageCache(cache)).nodes:
        found.setdefault(node.stage.kind, set()).add(node.key)
    return found


def gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


@pytest.mark.parametrize("planner_has_gpu", [False, True])
def test_a_plan_has_the_keys_of_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planner_has_gpu: bool
) -> None:
    plans = {}
    for device, gpus in (("cuda", 1), ("cpu", 0)):
        with hydra_session():
            config = typed(compose("run", overrides=[*DRAWING, "launcher=slurm", f"launcher.gpus={gpus}"]))
            assert study_settings(config).device == "", "a single run is this machine's"
        assert config.launcher.device("auto") == device
        gpu(monkeypatch, planner_has_gpu)
        plans[device] = keys(study(device=device), tmp_path)
        gpu(monkeypatch, device == "cuda")
        assert keys(study(), tmp_path) == plans[device], "a worker finds what was planned for it"
    differing = {kind for kind in plans["cpu"] if plans["cpu"][kind] != plans["cuda"][kind]}
    assert differing == TRAINED | {"profile"}  # the base's tokenizer is part of the base


def test_a_login_node_without_gpu_plans_for_workers_with_one(
    deftx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "srun", "squeue"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    gpu(monkeypatch, False)
    grid = ("-m", *FEW, "rank=2,3", "launcher=slurm", "trainer=gpu")
    planned = deftx("run", *grid, "--dry-run", cache=tmp_path / "c")
    assert planned.status == 0, planned.err
    # A run that stays here, and a sweep whose jobs do, are refused as ever.
    for arguments in ([*FEW, "launcher=slurm", "trainer=gpu"], ["-m", *FEW, "rank=2,3", "trainer=gpu"]):
        refused = deftx("run", *arguments, "--dry-run", cache=tmp_path / "c")
        assert refused.status == 1
        assert "torch sees no GPU" in refused.err


@pytest.mark.parametrize(
    ("planned", "here", "told"),
    [("cuda", False, "planned for workers that train on cuda, and this one has no GPU"), ("cpu", True, "has a GPU")],
)
def test_a_worker_that_finds_another_device_stops_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: str, here: bool, told: str
) -> None:
    gpu(monkeypatch, here)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one")
    places = (f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / 'out'}")
    end = work(Task("run", (*DRAWING, *places), str(tmp_path / "job"), device=planned))
    assert end.error is not None
    assert told in end.error
    assert "\n" not in end.error
    record = json.loads((tmp_path / "job" / "result.json").read_text())
    assert (record["status"], record["error"]["traceback"]) == ("failed", None)
    assert not list((tmp_path / "cache").glob("pretrain/*/manifest.json"))
