"""The command in this process, and a folder of fabricated results."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path

import pytest
from fabricate import Outcome, Report, write_run, write_sweep

from deftx.cli import main


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Run ``deftx report`` in this process, with few resamples."""

    def run(*arguments: str | Path, samples: int = 200) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, arguments), "--samples", str(samples)])
        streams = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over rank, density and seed; job 3 failed and job 8 was killed. Read only."""
    folder = tmp_path_factory.mktemp("multirun") / "grid"
    jobs = []
    for number, (rank, density, seed) in enumerate(itertools.product(("4", "energy:0.9", None), (0.05, 0.1), (0, 1))):
        status = {3: "failed", 8: "running"}.get(number, "done")
        jobs.append(([f"rank={rank or 'none'}", f"density={density}", f"seed={seed}"], status))
        if status == "done":
            write_run(folder / str(number), rank=rank, density=density, seed=seed, diagnostics=True)
    write_sweep(folder, jobs)
    return folder


@pytest.fixture(scope="session")
def grid_report(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report of ``grid``, and what the terminal showed on one line. Read only."""
    out = tmp_path_factory.mktemp("reports") / "grid"
    shown = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(shown):
        main(["report", str(grid), "--out", str(out), "--samples", "200"])
    assert not stop.value.code
    return out, " ".join(shown.getvalue().split())
