"""Sweeps: what was finished is not run again, shared stages come first, failures stay their own, dry runs only look."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose
from safetensors.torch import load_file
from small_study import FEW, GRID, SMALL, Command, Outcome

from deftx.cache import StageCache
from deftx.config import hydra_session, study_settings
from deftx.core.delta import SparseDelta
from deftx.core.denoise import denoise
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.stages.evaluate import Cell, Evaluator
from deftx.stages.graph import Look, graph


def sweep_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def states(folder: Path) -> dict[str, int]:
    return dict(Counter(job["status"] for job in sweep_of(folder)["jobs"]))


def computed(runs: list[dict[str, Any]]) -> Counter[str]:
    return Counter(stage["kind"] for run in runs for stage in run["stages"] if stage["outcome"] == "computed")


def test_a_sweep_again_copies_what_was_finished(
    deftx: Command, grid: tuple[Outcome, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, cache = grid
    assert states(first.folder) == {"done": 2}
    # What was swept, as fields; the values as a person writes them.
    sweep = sweep_of(first.folder)
    assert [job["knobs"] for job in sweep["jobs"]] == [{"rank": "2"}, {"rank": "none"}]
    assert {"experiment=demo", "language=qba"} <= set(sweep["shared"])
    assert not [text for text in sweep["shared"] if text.startswith("rank=")]

    def refuse(*_: Any, **options: Any) -> None:
        raise AssertionError(f"{options['label']} was trained again")

    monkeypatch.setattr("deftx.training.fit.fit_phase", refuse)
    again = deftx("run", *GRID, cache=cache)
    assert again.status == 0, again.err
    assert states(again.folder) == {"cached": 2}
    assert "2 finished before" in again.out
    for number in range(2):
        for name in ("result.json", "metrics.csv", "predictions.parquet", "diagnostics.parquet"):
            one, other = first.folder / str(number) / name, again.folder / str(number) / name
            assert one.read_bytes() == other.read_bytes()
    assert not (again.folder / "stages").exists()


def test_shared_stages_run_first_and_once(grid: tuple[Outcome, Path]) -> None:
    outcome, _ = grid
    stages = [json.loads(p.read_text()) for p in sorted((outcome.folder / "stages").rglob("result.json"))]
    jobs = [json.loads((outcome.folder / str(number) / "result.json").read_text()) for number in range(2)]
    assert {run["job_type"] for run in stages} == {"stage"}
    assert {run["job_type"] for run in jobs} == {"run"}
    # qaa (under the task SFT), qba and the task: each full phase once, all of them before the jobs.
    assert computed(stages)["full"] == 3
    assert computed(stages)["pretrain"] == 1
    assert computed(jobs)["full"] == computed(jobs)["pretrain"] == computed(jobs)["decompose"] == 0
    assert computed(jobs)["sparse"] == 4
    names = [stage["swept"][0] for stage in sweep_of(outcome.folder)["stages"]]
    assert names == ["base", "sft:source:qaa", "full:language:qba", "full:task"]
    assert max(run["finished"] for run in stages) <= min(run["started"] for run in jobs)


def test_a_sweep_ends_with_its_scores_side_by_side(grid: tuple[Outcome, Path]) -> None:
    outcome, _ = grid
    last = outcome.out[outcome.out.rindex("sweep") :]
    assert "rank=2" in last
    assert "rank=none" in last
    assert "2 jobs" in last
    assert "0 failed" in last


@pytest.mark.soak
def test_parts_that_share_a_node_but_nothing_that_trains_do_not_wait_for_each_other(
    deftx: Command, tmp_path: Path
) -> None:
    # φ_T with φ_S and without have one random mask; neither needs the other.
    arguments = ("-m", "compare=[]", "controls=[no_language_sft]", "mask=random", "language=qba,qbb")
    outcome = deftx("run", *arguments, cache=tmp_path / "c")
    assert outcome.status == 0, outcome.err
    names = {stage["swept"][0] for stage in sweep_of(outcome.folder)["stages"]}
    assert {"sft:task:random_mask", "sft:task_alone:random_mask"} <= names
    stages = [json.loads(p.read_text()) for p in sorted((outcome.folder / "stages").rglob("result.json"))]
    assert computed(stages)["select"] == 2, "φ_S's and the one that both task SFTs share"


def test_a_failed_job_stops_no_other_and_alone_runs_again(deftx: Command, tmp_path: Path) -> None:
    rates = ("-m", *FEW, "lang.training.learning_rate=1e38,1e-3")
    first = deftx("run", *rates, cache=tmp_path / "c")
    assert first.status == 1
    assert states(first.folder) == {"failed": 1, "done": 1}
    # The learning rate is legal, the loss is not finite: only a run can find that out.
    assert Counter(run["status"] for run in first.runs() if run["job_type"] == "run") == {"done": 1, "failed": 1}
    assert "lang.training.learning_rate=1e" in first.out
    assert "not finite" in first.out
    assert "step" in first.out
    assert "2 jobs, 1 done, 0 finished before, 1 failed" in first.out
    again = deftx("run", *rates, cache=tmp_path / "c")
    assert again.status == 1
    assert states(again.folder) == {"failed": 1, "cached": 1}


def test_a_shared_part_that_fails_fails_the_jobs_that_need_it(deftx: Command, tmp_path: Path) -> None:
    # The language's full phase diverges; both ranks need it, so does the LT-SFT they share, and it is tried once.
    grid = ("-m", "language=qba", "controls=[]", "compare=[ltsft]", "lang.training.learning_rate=1e38", "rank=2,3")
    outcome = deftx("run", *grid, cache=tmp_path / "c")
    assert outcome.status == 1
    jobs = sweep_of(outcome.folder)["jobs"]
    assert {job["status"] for job in jobs} == {"failed"}
    parts = {stage["swept"][0]: stage["status"] for stage in sweep_of(outcome.folder)["stages"]}
    assert parts == {"base": "done", "full:source:qaa": "done", "full:language:qba": "failed"}
    assert all("language qba, which it shares with other jobs" in job["error"] for job in jobs)
    assert not (outcome.folder / "0").exists()


def test_a_dry_run_says_what_is_then_computed_and_writes_nothing(deftx: Command, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    empty = deftx("run", *GRID, "--dry-run", cache=cache)
    assert empty.status == 0, empty.err
    assert not cache.exists()
    assert not empty.folder.exists()
    assert "jobs: 2, of which 0 were finished before" in empty.out
    assert deftx("run", *FEW, "rank=2", cache=cache).status == 0
    before = sorted(path for path in cache.rglob("*"))
    planned = deftx("run", *FEW, "rank=3", "--dry-run", cache=cache)
    assert sorted(path for path in cache.rglob("*")) == before
    then = deftx("run", *FEW, "rank=3", cache=cache).result()
    missing = {
        line.removeprefix("to compute: ") for line in planned.out.splitlines() if line.startswith("to compute: ")
    }
    done = {f"{s['kind']} {s['label']}" for s in then["stages"] if s["outcome"] == "computed" and s["kind"] != "run"}
    assert missing == done
    assert "this very run was finished before" in deftx("run", *FEW, "rank=3", "--dry-run", cache=cache).out


def test_planned_keys_are_those_of_the_run(deftx: Command, tmp_path: Path) -> None:
    with hydra_session():
        study = study_settings(compose("run", overrides=[*SMALL, *FEW, f"paths.cache={tmp_path / 'c'}"]))
    cache = StageCache(tmp_path / "c")
    nodes = graph(study, cache)
    planned = {(node.stage.kind, node.key) for node in nodes.nodes}
    assert [node.key for node, there in Look(cache).required_nodes(nodes.required) if not there] == [
        node.key for node in nodes.nodes
    ]
    stages = deftx("run", *FEW, cache=tmp_path / "c").result()["stages"]
    assert {(stage["kind"], stage["key"]) for stage in stages} == planned
    assert {node.key for node in graph(study, cache).nodes} == {key for _, key in planned}
    asked = Look(cache).required_nodes(nodes.required)
    assert all(there for _, there in asked)
    # A finished SFT is not asked for what made it.
    assert not {"full", "decompose", "select"} & {node.stage.kind for node, _ in asked}
    assert cache.peek(nodes.finished) is not None


def test_a_sweeps_folder_is_never_shared(deftx: Command, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    outcome = deftx("run", "-m", *FEW, "rank=2,3", f"hydra.sweep.dir={tmp_path / 'used'}")
    assert outcome.status == 1
    assert "exists and is not empty" in outcome.err
    assert sorted(path.name for path in (tmp_path / "used").iterdir()) == ["note.txt"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["hydra/launcher=joblib"], ["choose launcher=basic"]),
        (["launcher=slrum"], ["did you mean 'slurm'"]),
        (["launcher.workers=0"], ["launcher.workers=0", "at least 1"]),
        (["launcher=joblib", "launcher.workers=null"], ["launcher.workers is needed"]),
        (["only=[full:tsak]"], ["only='full:tsak'", "did you mean 'full:task'", "full:language:qba"]),
        (["mask=rnadom"], ["did you mean 'random'"]),
        (["ablate=sparsty"], ["did you mean 'sparsity'"]),
        (["search.space.rank=[4,900]"], ["rank=900", "exceeds 16"]),
        (["search.space.rank={low: 9}"], ["range needs two numbers"]),
        (["search.space.rank=[2]", "search.objective=test"], ["search.objective='test'", "source_validation"]),
        (["search.space.rank=[2]", "search.sampler_seed=-1"], ["sampler_seed=-1"]),
        (["search.space.density={low: 0.1, high: 0.3, step: -1}"], ["step=-1"]),
        (["search.space.language=[qba]"], ["search.space.language", "no knob of the method"]),
        (["only=[full:task]", "rank=2,3"], ["neither swept nor planned"]),
        (["only=[full:language:qbb]"], ["only='full:language:qbb'", "its parts are base, full:source:qaa"]),
        (["ablate=denoising", "rank=2,4"], ["ablate=denoising is rank=none"]),
        (["rank=2,4", "rank=4,8"], ["rank is swept twice"]),
        (["rank=glob(*)"], ["rank=glob(*)", "no jobs"]),
    ],
)
def test_a_wrong_value_stops_the_sweep_before_it_begins(
    deftx: Command, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    outcome = deftx("run", "-m", *FEW, *arguments, cache=tmp_path / "new")
    assert outcome.status == 1
    for text in expected:
        assert text in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.folder.exists()
    assert not (tmp_path / "new").exists()


def test_equal_values_are_one_job(deftx: Command) -> None:
    outcome = deftx("run", "-m", *FEW, "rank=2,2", "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "jobs:" not in outcome.out


def test_a_part_the_study_has_not_is_named(deftx: Command) -> None:
    outcome = deftx("run", *FEW, "only=[full:language:qbb]")
    assert outcome.status == 1
    assert "only='full:language:qbb' is no part of this study; did you mean 'full:language:qba'" in outcome.err


@pytest.mark.soak
def test_each_component_can_be_left_out(deftx: Command, tmp_path: Path, shared_cache: Path) -> None:
    outcome = deftx("run", "experiment=component_ablation", "seed=0", "language=qba")
    assert outcome.status == 0, outcome.err
    by_knobs = {
        (s["mask"], s["second_phase"], s["rank"], s["density"]): run
        for run in outcome.runs()
        if run["job_type"] == "run"
        for s in [run["settings"]]
    }
    assert set(by_knobs) == {
        ("magnitude", True, "energy:0.9", 0.3),
        ("magnitude", True, None, 0.3),
        ("magnitude", True, "energy:0.9", 1.0),
        ("magnitude", False, "energy:0.9", 0.3),
        ("random", True, None, 0.3),
    }
    conditions = {key: {row["condition"] for row in run["metrics"]} for key, run in by_knobs.items()}
    assert conditions["random", True, None, 0.3] == {"random_mask"}
    assert conditions["magnitude", True, None, 0.3] == {"ltsft"}

    def folder(run: dict[str, Any], role: str) -> Path:
        (found,) = {
            stage["key"] for stage in run["stages"] if stage["kind"] in ("sparse", "direct") and role in stage["label"]
        }
        return next(path for path in shared_cache.glob(f"*/{found[:16]}/sft"))

    # Without a second phase: φ is Δ̂ on the mask, recomputed here from the full phase and θ⁰.
    direct = by_knobs["magnitude", False, "energy:0.9", 0.3]
    keys = {stage["kind"]: stage["key"] for stage in direct["stages"] if "qba" in stage["label"]}
    full = load_file(shared_cache / "full" / keys["full"][:16] / "full.safetensors") if "full" in keys else None
    if full is None:
        full = _full_of(shared_cache, folder(direct, "language qba"))
    (encoder,) = {stage["key"] for stage in direct["stages"] if stage["kind"] == "pretrain"}
    base = load_file(shared_cache / "pretrain" / encoder[:16] / "model" / "model.safetensors")
    names = {name: next(key for key in base if key.endswith(name)) for name in full if not name.startswith("head.")}
    change = {name: full[name] - base[key] for name, key in names.items()}
    denoised, _ = denoise(change, RankPolicy.parse("energy:0.9"), ResidualPolicy.parse("prune:0.05"))
    sft = SparseDelta.load(folder(direct, "language qba"))
    assert sum(index.numel() for index in sft.indices.values()) == sft.metadata["k"]
    smallest = min(float(values.abs().min()) for values in sft.values.values())
    for name, index in sft.indices.items():
        torch.testing.assert_close(sft.values[name], denoised[name].flatten()[index])
        outside = denoised[name].flatten().clone()
        outside[index] = 0
        assert float(outside.abs().max()) <= smallest + 1e-9
    # A random mask has exactly K coordinates, is another for another seed, and prefers no parameter.
    drawn = SparseDelta.load(folder(by_knobs["random", True, None, 0.3], "language qba"))
    sizes = {name: full[name].numel() for name in names}
    assert sum(index.numel() for index in drawn.indices.values()) == drawn.metadata["k"]
    for name, size in sizes.items():
        if size > 2000:
            assert drawn.indices[name].numel() / size == pytest.approx(0.3, abs=0.04)


def _full_of(cache: Path, sft: Path) -> dict[str, torch.Tensor]:
    """The full phase behind an SFT, found through the manifests."""
    manifest = json.loads((sft.parent / "manifest.json").read_text())
    return load_file(cache / "full" / manifest["inputs"]["full"][:16] / "full.safetensors")


@pytest.mark.soak
def test_a_search_reads_no_target_label(deftx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[str] = []
    real = Evaluator._compute

    def spy(self: Evaluator, cell: Cell, work: Any) -> None:
        evaluated.append(cell.language)
        real(self, cell, work)

    monkeypatch.setattr(Evaluator, "_compute", spy)
    space = ("search.space.rank=[2,4]", "search.space.density={low: 0.1, high: 0.3}", "search.trials=3")
    outcome = deftx("run", *FEW, *space, cache=tmp_path / "c")
    assert outcome.status == 0, outcome.err
    trials = pd.read_csv(outcome.folder / "trials.csv")
    assert len(trials) == 3
    assert trials["state"].eq("COMPLETE").all()
    # Three trials made SFTs; only the best one was evaluated, once.
    assert evaluated == ["qba"]
    best = trials.loc[trials["value"].idxmax()]
    (run,) = [run for run in outcome.runs() if run["job_type"] == "run"]
    assert run["settings"]["rank"] == str(best["params_rank"])
    (job,) = sweep_of(outcome.folder)["jobs"]
    assert job["knobs"] == {"rank": str(best["params_rank"]), "density": str(best["params_density"])}
    assert run["settings"]["density"] == pytest.approx(best["params_density"])
    again = deftx("run", *FEW, *space, cache=tmp_path / "c")
    pd.testing.assert_series_equal(pd.read_csv(again.folder / "trials.csv")["value"], trials["value"])
    by_loss = deftx("run", *FEW, *space, "search.objective=target_mlm_loss", "search.trials=2", cache=tmp_path / "c")
    assert by_loss.status == 0, by_loss.err
    losses = pd.read_csv(by_loss.folder / "trials.csv")
    (run,) = [run for run in by_loss.runs() if run["job_type"] == "run"]
    assert run["settings"]["density"] == pytest.approx(losses.loc[losses["value"].idxmin()]["params_density"])


def test_a_part_with_nothing_to_make_is_said(deftx: Command) -> None:
    outcome = deftx("run", *FEW, "method=random_mask", "only=[full:language:qba]")
    assert outcome.status == 0, outcome.err
    assert "only=full:language:qba: this study makes nothing of that name" in outcome.err


def test_a_dry_run_says_what_each_source_sft_costs(deftx: Command, tmp_path: Path) -> None:
    ranks = ["-m", *FEW, "rank=2,3", "--dry-run"]
    own, shared = (deftx("run", *ranks, f"source={name}", cache=tmp_path / "c").out for name in ("sft", "shared"))
    costs = [
        re.search(
            r"source=sft, a φ_S of each column: (\d+) stages; source=shared, .*: (\d+) stages; this is (.*)", text
        )
        for text in (own, shared)
    ]
    assert costs[0] is not None
    assert costs[1] is not None
    assert costs[0].groups()[:2] == costs[1].groups()[:2]
    assert int(costs[0][1]) > int(costs[0][2])
    assert (costs[0][3], costs[1][3]) == ("source=sft", "source=shared")


def test_tables_say_that_a_source_sft_is_shared(grid: tuple[Outcome, Path]) -> None:
    assert "shared φ_S" in " ".join(grid[0].out.split())
