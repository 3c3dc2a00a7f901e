"""``deftx status``: what it says of sweeps and runs that run, were killed or are over, from their files alone."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import FEW, Command

from deftx.cli import main
from deftx.heartbeat import Heartbeat, heartbeat_file, heartbeats, read_heartbeat, write_heartbeat
from deftx.processes import Process
from deftx.tracking import SweepJob, SweepRecord, write_sweep
from deftx.training import record


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["status", *arguments])
    streams = capsys.readouterr()
    return int(stop.value.code or 0), streams.out + streams.err


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Path, SweepRecord]:
    states = ["done", "done", "cached", "running", "running", "waiting", "failed", "interrupted"]
    jobs = [SweepJob(n, [], [f"rank={n + 1}"], str(n), {"rank": str(n + 1)}, state) for n, state in enumerate(states)]
    jobs[0].seconds, jobs[1].seconds, jobs[6].error = 60.0, 180.0, "the loss is not finite\nmore"
    folder = tmp_path / "multirun" / "study" / "now"
    folder.mkdir(parents=True)
    content = SweepRecord("mine", "run", jobs)
    write_sweep(folder, content)
    for number in (3, 4):
        (folder / str(number)).mkdir()
    return folder, content


def test_a_sweep_that_runs(sweep: tuple[Path, SweepRecord], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = sweep
    beat = Heartbeat("full language ace", 50, 200, 2.34567, 0.5)
    write_heartbeat(beat, folder / "3" / "progress.json")
    status, text = said(capsys, str(folder))
    assert status == 0
    assert "8 jobs: 2 done, 1 finished before, 2 running, 1 waiting, 1 failed, 1 interrupted" in text
    row = next(line for line in text.splitlines() if "rank=4" in line)
    for cell in ("full language ace", "50/200", "2.3457", "0.5", "5 min of this phase", "0 s ago"):
        assert cell in row
    assert "process has gone" not in text
    assert "failed: rank=7: the loss is not finite" in text
    # 3 jobs are left, two at a time, 120 s each.
    assert "left: 3 jobs, about 3 min" in text


@pytest.mark.parametrize("host", ["this", "another"])
def test_a_sweep_that_was_killed(
    sweep: tuple[Path, SweepRecord], capsys: pytest.CaptureFixture[str], host: str
) -> None:
    folder, _ = sweep
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    process = Process.this()._replace(pid=int(gone.stdout), start=1)
    beat = Heartbeat("full language ace", 50, 200, 2.0, 0.5, owner=process.text)
    if host == "another":
        beat = replace(beat, owner=process._replace(host="0a0a0a0a").text, when=time.time() - 3600)
    write_heartbeat(beat, folder / "3" / "progress.json")
    _, text = said(capsys, str(folder))
    assert "its process has gone" in text
    assert "the same command again goes on" in text


def test_without_a_folder_what_runs_here_is_shown(
    sweep: tuple[Path, SweepRecord], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, content = sweep
    over = tmp_path / "multirun" / "over"
    over.mkdir()
    write_sweep(over, replace(content, study="older", jobs=content.jobs[:2], finished="2026-01-01T00:00:00+00:00"))
    monkeypatch.chdir(tmp_path)
    _, text = said(capsys)
    assert "mine, 8 jobs" in text
    assert "older" not in text
    assert "1 more that is over: deftx status --all" in text
    assert "older, 2 jobs: 2 done" in said(capsys, "--all")[1]


def test_a_damaged_record_hides_no_other(
    sweep: tuple[Path, SweepRecord], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = tmp_path / "multirun" / "damaged"
    damaged.mkdir()
    (damaged / "sweep.json").write_text("{")
    status, text = said(capsys, str(tmp_path))
    assert status == 0
    assert "mine, 8 jobs" in text
    assert str(damaged) in text


def test_what_is_not_there_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["nowhere"], "nowhere: no such folder"),
        (
            [],
            "no sweep and no run in multirun/ and outputs/, which are not here; `deftx run experiment=demo` makes one",
        ),
        (["--al"], "the only option is --all"),
    ):
        status, text = said(capsys, *arguments)
        assert status == 1
        assert message in text
        assert "Traceback" not in text
    assert said(capsys, "--help")[0] == 0


def test_a_run_tells_how_far_it_is(
    deftx: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def keep(beat: Heartbeat, file: Path | None) -> None:
        write_heartbeat(beat, file)
        assert file is not None
        seen.append(read_heartbeat(file.parent))

    monkeypatch.setattr(record, "_FILE_SECONDS", 0.0)
    monkeypatch.setattr(record, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(record, "write_heartbeat", keep)
    outcome = deftx("run", *FEW, "seed=31")
    assert outcome.status == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if "step 4 of 4" in line]
    assert len({line.partition(":")[0] for line in lines}) == len(lines) >= 4
    assert all(beat is not None and Process.parse(beat.owner) == Process.this() for beat in seen)
    assert [beat.step for beat in seen if beat][:4] == [1, 2, 3, 4]
    # What is over has none, and nobody else's is touched.
    assert list(outcome.folder.rglob("progress.json")) == []
    assert heartbeat_file() is None
    status, text = said(capsys, str(outcome.folder))
    assert status == 0
    assert "demo, run: done" in text


def test_a_job_whose_folder_is_gone_goes_on(tmp_path: Path) -> None:
    with heartbeats(tmp_path / "nowhere"):
        write_heartbeat(Heartbeat("x"), heartbeat_file())
    write_heartbeat(Heartbeat("x"), None)
    assert read_heartbeat(tmp_path / "nowhere") is None
    (tmp_path / "progress.json").write_text("[]")
    assert read_heartbeat(tmp_path) is None
