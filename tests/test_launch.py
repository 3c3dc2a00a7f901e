"""Launchers: every task's own answer comes back, and one that dies takes no other with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deftx.errors import DeftxError
from deftx.launch import LauncherSettings, TaskFailure, TaskStop, check, run_all
from deftx.launch.processes import _claim, visible_gpus

BASIC = LauncherSettings()
JOBLIB = LauncherSettings(name="joblib", workers=2)
LOCAL = LauncherSettings(name="submitit", cluster="local", workers=2, timeout_min=5)


def square(number: int) -> int:
    return number * number


def threads(names: tuple[str, ...]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def trouble(task: dict[str, Any]) -> str:
    """Does what it is told: dies, raises, notes that it began, and says on which GPU."""
    if "log" in task:
        with Path(task["log"]).open("a", encoding="utf-8") as file:
            file.write(f"{task['name']}\n")
    if task.get("do") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.get("do") == "stop":
        raise KeyboardInterrupt
    if task.get("do") == "raise":
        raise ValueError("no such luck")
    time.sleep(task.get("seconds", 0))
    return f"{task['name']} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('OMP_NUM_THREADS')}"


def answers(settings: LauncherSettings, work: Any, tasks: list[Any], folder: Path) -> dict[int, Any]:
    found: dict[int, Any] = {}

    def ended(number: int, answer: Any) -> None:
        assert number not in found, "told twice"
        found[number] = answer

    run_all(settings, work, tasks, ended, folder)
    return found


@pytest.mark.parametrize(
    "settings", [BASIC, JOBLIB, pytest.param(LOCAL, marks=pytest.mark.slow)], ids=["basic", "joblib", "submitit"]
)
def test_every_task_gives_its_answer(
    settings: LauncherSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where a job finds this module
    assert answers(settings, square, [3, 4, 5], tmp_path) == {0: 9, 1: 16, 2: 25}
    assert answers(settings, square, [], tmp_path) == {}


def test_a_task_whose_process_dies_is_lost_alone(tmp_path: Path) -> None:
    log = tmp_path / "began.txt"
    tasks = [{"name": name, "log": str(log)} for name in "abcde"]
    tasks[1]["do"], tasks[3]["do"] = "die", "raise"
    found = answers(JOBLIB, trouble, tasks, tmp_path)
    assert {number for number, answer in found.items() if isinstance(answer, TaskFailure)} == {1, 3}
    assert "process died" in found[1]
    assert found[3] == "ValueError: no such luck"
    assert [found[number][0] for number in (0, 2, 4)] == ["a", "c", "e"]
    began = log.read_text().split()
    assert began.count("b") == 3, "twice among others, once alone"
    assert began.count("e") <= 2, "only what was under way in a broken pool runs again"


@pytest.mark.soak
@pytest.mark.slow
def test_submitit_tells_of_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    tasks: list[dict[str, Any]] = [{"name": "a"}, {"name": "b", "do": "die"}, {"name": "c", "do": "raise"}]
    found = answers(LOCAL, trouble, tasks, tmp_path)
    assert found[0].startswith("a")
    assert isinstance(found[1], TaskFailure)
    assert isinstance(found[2], TaskFailure)
    assert "no such luck" in found[2]
    assert all(str(tmp_path) in found[number] for number in (1, 2)), "where its log is"


@pytest.mark.parametrize("settings", [BASIC, JOBLIB], ids=["basic", "joblib"])
def test_a_task_that_raises_ends_alone(settings: LauncherSettings, tmp_path: Path) -> None:
    tasks: list[dict[str, Any]] = [{"name": "a"}, {"name": "b", "do": "raise"}, {"name": "c"}]
    if settings is JOBLIB:
        tasks.append({"name": "d", "do": "stop"})  # what a fit makes of a SIGTERM to its process
    found = answers(settings, trouble, tasks, tmp_path)
    assert {number for number, answer in found.items() if not isinstance(answer, TaskFailure)} == {0, 2}
    assert found[1] == "ValueError: no such luck"
    assert settings is BASIC or "told to stop" in found[3]
    assert [number for number, answer in found.items() if isinstance(answer, TaskStop)] == [3] * (settings is JOBLIB)


def test_a_worker_whose_sweep_has_died_before_it_began_ends(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    code = "import sys, time; from deftx.launch.processes import _begin; _begin(sys.argv[1], 1, [], int(sys.argv[2]))"
    worker = subprocess.run(
        [sys.executable, "-c", f"{code}; time.sleep(60)", str(tmp_path), gone.stdout.decode()], timeout=50, check=False
    )
    assert worker.returncode == 1


@pytest.mark.parametrize("given", [{}, {"OMP_NUM_THREADS": "1"}, {"MKL_NUM_THREADS": "1"}])
def test_threads_that_are_set_are_those_of_workers(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (found,) = answers(JOBLIB, threads, [names], tmp_path).values()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert found == (given or dict.fromkeys(names, str(cores)))


def test_a_worker_takes_the_claim_of_a_dead_one(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from deftx.launch.processes import _claim\n"
    code += "print(_claim(Path(sys.argv[1])), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "0\n"
        assert _claim(tmp_path) == 1
        worker.kill()
    assert [_claim(tmp_path), _claim(tmp_path)] == [0, 2]


def test_each_worker_gets_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tasks = [{"name": str(number), "seconds": 1.0} for number in range(2)]
    found = answers(JOBLIB, trouble, tasks, tmp_path)
    assert {answer.split()[1] for answer in found.values()} == {"4", "7"}
    assert all(int(answer.split()[2]) >= 1 for answer in found.values())


@pytest.mark.parametrize(("told", "ids"), [("0, 2", ["0", "2"]), ("", []), ("GPU-ab", ["GPU-ab"])])
def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, told: str, ids: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert visible_gpus() == ids


def test_a_missing_cluster_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeftxError, match=r"launcher.cluster=slurm: no sbatch.*launcher=joblib"):
        check(LauncherSettings(name="submitit", cluster="slurm"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeftxError, match=r"needs ray: pip install 'deftx\[ray\]'"):
        check(LauncherSettings(name="ray"))
    check(BASIC)


def test_slurm_gets_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch script that submitit hands to sbatch, read from a stand-in on the PATH."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script.sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
    sbatch.chmod(0o755)
    for name in ("srun", "squeue"):
        (sbatch.parent / name).symlink_to(sbatch)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    settings = LauncherSettings(
        name="submitit",
        partition="gpu",
        account="lab",
        gpus=1,
        cpus=4,
        memory_gb=32,
        timeout_min=90,
        workers=8,
        setup=["module load cuda"],
        additional={"exclude": "node7"},
    )
    with pytest.raises(DeftxError, match="not accepted"):
        answers(settings, square, [1, 2], tmp_path)
    script = (tmp_path / "script.sh").read_text()
    for line in ("--partition=gpu", "--account=lab", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=32GB"):
        assert line in script
    for line in ("--time=90", "--array=0-1%", "module load cuda", "--exclude=node7"):
        assert line in script
