"""What surrounds a job changes nothing that it leaves: other launchers' variables, streams, the cache's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import offline_runs
import pytest
from small_study import FEW, SMALL, Command, Outcome

# Of a SLURM step of independent jobs, of torchrun, of other launchers: this one is not the first.
FOREIGN = {
    **{"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "7"},
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "NODE_RANK": "1", "GROUP_RANK": "1"},
    **{"JSM_NAMESPACE_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"},
}


def run(
    cache: Path, folder: Path, *arguments: str, environment: dict[str, str] | None = None, shell: str = ""
) -> Outcome:
    """Run the command in a process of its own, where variables and streams are the system's."""
    places = [f"paths.cache={cache}", f"paths.output={folder}", f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "deftx", "run", *SMALL, *FEW, *places, *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in FOREIGN and not name.startswith("WANDB")}
    clean["PYTHONPATH"] = str(Path(__file__).parents[2])
    full = ["sh", "-c", f'exec "$@" {shell}', "sh", *command] if shell else command
    done = subprocess.run(full, capture_output=True, env=clean | (environment or {}), timeout=200, check=False)
    return Outcome(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), folder)


def left(outcome: Outcome) -> tuple[list[str], list[dict[str, float]]]:
    """Names of the files of a run, and the curves that W&B has."""
    [result] = outcome.folder.rglob("result.json")
    names = {path.name for path in result.parent.rglob("*") if path.is_file() and "wandb" not in path.parts}
    times = ("_timestamp", "_runtime", "_step")
    lines = offline_runs.history(offline_runs.records(result.parent))
    curves = [{name: value for name, value in line.items() if "loss" in name and name not in times} for line in lines]
    return sorted(names), [line for line in curves if line]


@pytest.mark.soak
def test_variables_of_other_launchers_change_nothing_that_a_job_leaves(
    deftx: Command, shared_cache: Path, tmp_path: Path
) -> None:
    """Seeds of their own, so that both train; the base is shared."""
    plain = deftx("run", *FEW, "logger=offline", "seed=51")
    assert plain.status == 0, plain.err
    foreign = run(shared_cache, tmp_path / "foreign", "logger=offline", "seed=52", environment=FOREIGN)
    assert foreign.status == 0, foreign.err
    (names, curves), (found, found_curves) = left(plain), left(foreign)
    assert found == names
    assert [line.keys() for line in found_curves] == [line.keys() for line in curves]
    assert len(curves) > 4


@pytest.mark.parametrize(
    ("environment", "shell"),
    [
        ({"PYTHONIOENCODING": "ascii"}, ""),
        pytest.param({}, ">/dev/full 2>&1", marks=pytest.mark.soak),
        pytest.param({}, ">&- 2>&-", marks=pytest.mark.soak),
    ],
    ids=["ascii", "full", "closed"],
)
def test_whatever_happens_to_the_terminal_a_finished_run_is_finished(
    deftx: Command, shared_cache: Path, tmp_path: Path, environment: dict[str, str], shell: str
) -> None:
    assert deftx("run", *FEW).status == 0
    outcome = run(shared_cache, tmp_path / "there", environment=environment, shell=shell)
    assert outcome.status == 0, outcome.err
    assert outcome.result()["status"] == "done"
    assert "Traceback" not in outcome.err
    if environment:
        assert r"macro-F1 \xd7 100" in outcome.out


@pytest.mark.soak
def test_jobs_of_a_sweep_under_an_agent_are_one_run_each(deftx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WANDB_RUN_ID", "agent"), ("WANDB_SWEEP_ID", "sweep"), ("WANDB_RESUME", "allow")):
        monkeypatch.setenv(name, value)
    outcome = deftx("run", *FEW, "logger=offline", "-m", "seed=71,72")
    assert outcome.status == 0, outcome.err
    runs = sorted(path.name.rpartition("-")[2] for path in outcome.folder.rglob("offline-run-*") if path.is_dir())
    assert len(set(runs)) == len(runs) == len(outcome.runs()) >= 2  # shared stages are runs, too
    assert "agent" not in runs


@pytest.mark.soak
@pytest.mark.parametrize(
    ("arguments", "environment", "shell", "status", "said"),
    [
        (["run", "--help"], {"PYTHONIOENCODING": "ascii"}, "", 0, r"\u03c6"),
        (["cache", "ls"], {"PYTHONIOENCODING": "ascii"}, "", 0, "pretrain"),
        (["status", "."], {"PYTHONIOENCODING": "ascii"}, "", 0, "demo"),
        (["cache", "ls"], {}, ">/dev/full", 1, "not all of it could be printed"),
        (["run", "--help"], {}, ">/dev/full", 1, "not all of it could be printed"),
        (["--help"], {}, ">&-", 0, ""),
    ],
)
def test_what_only_prints_says_when_it_could_not(
    deftx: Command,
    shared_cache: Path,
    tmp_path: Path,
    arguments: list[str],
    environment: dict[str, str],
    shell: str,
    status: int,
    said: str,
) -> None:
    assert deftx("run", *FEW).status == 0
    command = [sys.executable, "-m", "deftx", *arguments]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    places = {"PYTHONPATH": str(Path(__file__).parents[2]), "DEFTX_CACHE": str(shared_cache)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | places | environment, check=False
    )
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.soak
def test_a_reader_who_goes_stops_no_run(deftx: Command, shared_cache: Path, tmp_path: Path) -> None:
    assert deftx("run", *FEW).status == 0
    outcome = run(shared_cache, tmp_path / "there", shell="| head -c 1 >/dev/null")
    assert outcome.result()["status"] == "done"
    assert "Traceback" not in outcome.err
    assert "BrokenPipe" not in outcome.err


def test_a_cache_that_is_deleted_under_a_run_is_said_so(
    deftx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deftx.stages import learn

    cache = tmp_path / "cache"

    def gone(*_: object, **__: object) -> None:
        shutil.rmtree(cache)
        raise FileNotFoundError(2, "No such file or directory", str(cache / "full"))

    monkeypatch.setattr(learn, "_write_json", gone)  # at the end of a phase
    outcome = deftx("run", *FEW, cache=cache)
    assert outcome.status == 1
    assert f"the stage cache {cache} was deleted while this run used it" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("variable", ["DEFTX_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_variable_is_none(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deftx.folders import cache_root

    for name in ("DEFTX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, " ")
    assert cache_root() == str(tmp_path / ".cache" / "deftx")
    monkeypatch.setenv(variable, "/somewhere")
    assert cache_root() == ("/somewhere" if variable == "DEFTX_CACHE" else "/somewhere/deftx")


def test_without_a_home_a_folder_has_to_be_named(
    deftx: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("DEFTX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for command, said in ((["run", "--dry-run"], "paths.cache=FOLDER"), (["cache", "ls"], "--cache FOLDER")):
        done = subprocess.run(
            [sys.executable, "-m", "deftx", *command], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
