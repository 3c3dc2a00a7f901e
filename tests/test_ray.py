"""Jobs through ray, for real: ``make ray`` installs it and runs these; without it they skip."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deftx.launch import LauncherSettings, TaskFailure, run_all

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
SETTINGS = LauncherSettings(name="ray", workers=2, requeues=0)
STUDY = ("run", "experiment=demo", "budget=smoke", "language=[qba]", "compare=[]", "controls=[]", "logger=csv")
SWEEP = (*STUDY, "trainer=cpu", "trainer.threads=1", "source=shared", "-m", "rank=2,none")


def work(task: str) -> str:
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("no such luck")
    return task.upper()


@contextlib.contextmanager
def deftx(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command; it ends with the block."""
    places = [f"paths.cache={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deftx", *SWEEP, *arguments, *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.enable_socket
def test_each_task_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(here))  # where a job finds this module
    found: dict[int, object] = {}
    run_all(SETTINGS, work, ["a", "die", "raise", "b"], found.__setitem__, tmp_path)
    assert (found[0], found[3]) == ("A", "B")
    assert all(isinstance(found[number], TaskFailure) for number in (1, 2))
    assert "no such luck" in str(found[2])


def test_a_sweep_gives_what_it_gives_here_and_prints_nothing_of_rays(tmp_path: Path) -> None:
    scores, printed = [], []
    for name, launcher in (("here", ["launcher=basic"]), ("there", ["launcher=ray", "launcher.workers=2"])):
        with deftx(tmp_path / name, *launcher) as process:
            printed.append(process.communicate(timeout=400)[0])
        assert process.returncode == 0, printed[-1]
        results = sorted((tmp_path / name / "sweep").glob("[01]/result.json"))
        scores.append([json.loads(path.read_text())["metrics"] for path in results])
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2
    of_ray = [line for line in printed[1].splitlines() if "pid=" in line or "ray" in line.lower()]
    noise = [line for line in of_ray if "launcher" not in line]
    assert noise == []


def test_a_worker_that_is_killed_is_run_again(tmp_path: Path) -> None:
    with deftx(tmp_path, "launcher=ray", "launcher.workers=2", "launcher.requeues=2") as process:
        deadline = time.monotonic() + 200
        killed = 0
        while not killed and time.monotonic() < deadline:
            for path in (tmp_path / "sweep").rglob("progress.json"):
                owner = json.loads(path.read_text())["owner"]
                os.kill(int(owner.split("-")[1]), signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.05)
        output, _ = process.communicate(timeout=400)
    assert killed
    assert process.returncode == 0, output
