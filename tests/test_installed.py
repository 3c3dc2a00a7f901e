"""The package as people install it: a wheel in an empty environment, run from an empty folder.

Everything here needs pip and a package registry, so it belongs to ``make soak`` and is skipped where pip reaches none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / "constraints.txt"
# What a phase costs here is a handful of steps; the tiny encoder learns as little.
SMOKE = ["budget=smoke", "model.pretrain.steps=20", "language=[qba]", "controls=[]", "trainer.threads=1"]

# One environment for all of them: with pytest-xdist they run in one worker (--dist loadgroup).
pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("installed")]


def run_command(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder``, without what this checkout's tests put into the environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DEFTX_CACHE")}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )


def succeed(command: list[str | Path], folder: Path, **environment: str) -> str:
    """Run a command that has to succeed; return what it printed."""
    result = run_command(command, folder, **environment)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds the wheel and what it depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    asked = run_command([*pip, "download", "--retries=0", "--timeout=15", "--no-deps", "hatchling"], folder)
    if asked.returncode:
        pytest.skip(f"pip reaches no package registry: {(asked.stderr.strip() or 'no message').splitlines()[-1]}")
    succeed([*pip, "wheel", "--no-deps", "--wheel-dir", folder / "wheels", REPOSITORY], folder)
    (wheel,) = (folder / "wheels").glob("deftx-*.whl")
    succeed([sys.executable, "-m", "venv", folder / "venv"], folder)
    own_pip = [folder / "venv" / "bin" / "pip", "install", "--quiet", "--constraint", CONSTRAINTS]
    # As in the Makefile: asked for by name first, pip finds the CPU build wherever the machine offers one.
    succeed([*own_pip, "torch>=2.8"], folder)
    succeed([*own_pip, wheel], folder)
    return folder / "venv" / "bin"


def test_an_installed_wheel_runs_a_study_and_reports_it_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    deftx, places = environment / "deftx", {"DEFTX_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    work = tmp_path / "work"
    work.mkdir()
    assert "deftx run experiment=demo" in succeed([deftx, "--help"], work)
    assert "rank: energy:0.9" in succeed([deftx, "run", "--help"], work)
    assert not list(work.iterdir())

    assert "macro-F1" in succeed([deftx, "run", *SMOKE, "compare=[ltsft]"], work, **places)
    (result_file,) = work.glob("outputs/*/*/result.json")
    result = json.loads(result_file.read_text(encoding="utf-8"))
    assert result["status"] == "done"
    assert {score["condition"] for score in result["metrics"]} == {"deftx", "ltsft"}

    succeed([deftx, "report", "outputs"], work, **places)
    assert (work / "outputs" / "report" / "report.html").is_file()


def test_an_installed_wheel_trains_single_sfts_and_composes_them(environment: Path, tmp_path: Path) -> None:
    deftx, places = environment / "deftx", {"DEFTX_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    training = [item for item in SMOKE if not item.startswith(("controls", "language"))]
    succeed([deftx, "sft", "kind=language", "language=qba", "out=sfts/qba", *training], tmp_path, **places)
    succeed([deftx, "sft", "kind=task", "out=sfts/task", *training], tmp_path, **places)
    given = ["task_sft=sfts/task", "language_sft.qba=sfts/qba", "language=qba", "model.pretrain.steps=20"]
    assert "composed" in succeed([deftx, "eval", *given, "trainer.threads=1"], tmp_path, **places)
