"""A study that is killed again and again, by SIGKILL, and then finished: the same files as one that ran through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_study import SMALL

ROOT = Path(__file__).parents[2]
KILLS = [
    ("write", "/scratch/pretrain-", 4),
    ("step", "/scratch/full-", 3),  # a language's
    ("validation", "/scratch/sparse-", 3),
    ("write", "/scratch/sparse-", 8),
    ("step", "/scratch/full-", 2),  # a later one
    ("written", "decompose", 1),
    ("written", "_compute", 1),  # an evaluation
]


@pytest.mark.soak
def test_a_study_killed_and_killed_again(tmp_path):
    def run(name, what="none", where="", number=0):
        out = tmp_path / f"{name}-{what}{number}"
        overrides = [
            *SMALL,
            "language=qba",
            "controls=[]",
            "trainer.checkpoint_minutes=0",
            f"paths.cache={tmp_path / name}",
        ]
        command = [sys.executable, str(ROOT / "tests" / "study" / "killed.py"), what, where, str(number), "run"]
        done = subprocess.run(
            [*command, *overrides, f"paths.output={out}", f"hydra.run.dir={out}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done, out

    whole, expected = run("undisturbed")
    assert whole.returncode == 0, whole.stderr
    resumed = 0
    for kill in KILLS:
        done, _ = run("killed", *kill)
        assert done.returncode == -9, (kill, done.stderr)
        resumed += "resumes at step" in done.stderr
    done, found = run("killed")
    assert done.returncode == 0, done.stderr
    assert resumed + ("resumes at step" in done.stderr) >= 4
    for folder, other in ((tmp_path / "undisturbed", tmp_path / "killed"), (expected, found)):
        names = [
            path.relative_to(folder)
            for pattern in ("*.safetensors", "*.parquet", "metrics.csv")
            for path in folder.rglob(pattern)
            if "curves" not in path.parts  # of phases of earlier attempts: in their folders
        ]
        assert names
        assert [name for name in names if (folder / name).read_bytes() != (other / name).read_bytes()] == []
    assert len(list((tmp_path / "killed").rglob("sft.safetensors"))) == len(
        list((tmp_path / "undisturbed").rglob("sft.safetensors"))
    )
    assert [path.name for path in (tmp_path / "killed" / "scratch").iterdir()] == ["tokens"]
