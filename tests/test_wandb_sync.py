"""``wandb sync`` of offline runs, against a stand-in for W&B's server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from offline_runs import records
from test_wandb import MASKS, SCORES, SETTINGS, diagnostics, quiet_home, record, sft_folders

from deftx.tracking import LoggerSettings, Tracker, names, recording

__all__ = ["quiet_home"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Its address and the file of what it was sent; a process of its own, since tests have no sockets."""
    log = tmp_path / "requests.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("wandb_stub.py")), str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}", log
    process.kill()
    process.wait()


@pytest.mark.soak
@pytest.mark.slow
def test_offline_runs_can_be_synced_with_their_lineage(
    quiet_home: Path, tmp_path: Path, server: tuple[str, Path]
) -> None:
    address, log = server
    for name, kind, sfts, metrics in (
        ("run", "run", list(MASKS), SCORES),
        ("stage", "stage", ["ace"], []),
    ):
        made = record(job_type=kind)
        made.sfts = [sft for sft in made.sfts if sft.name in sfts]
        made.metrics = list(metrics)
        made.cells = made.cells if metrics else []
        tracker = Tracker(LoggerSettings(), tmp_path / name, study="s", job_type=kind, config=SETTINGS, tags=["deftx"])
        with tracker, recording(tmp_path / name, made):
            tracker.finish_run(made, diagnostics(), sft_folders(tmp_path / name, made))
        records(tmp_path / name)  # complete
    # The composing run first: the SFT that it uses is not on the server yet.
    for name in ("run", "stage"):
        (folder,) = (tmp_path / name).glob("wandb/offline-run-*")
        environment = os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
        environment.pop("WANDB_SERVICE", None)
        synced = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(folder)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
        assert synced.returncode == 0, synced.stderr
        assert next(folder.glob("*.wandb.synced")), "marked, so that it is not uploaded twice"

    sent = [json.loads(line) for line in log.read_text().splitlines()]

    def asked(operation: str) -> list[dict[str, Any]]:
        found = [item["variables"] for item in sent if item.get("operation") == operation]
        return [item | (item.get("input") or {}) for item in found]

    begun = [item for item in asked("UpsertBucket") if item.get("groupName")]
    assert [(item["groupName"], item["jobType"], item["tags"]) for item in begun] == [
        ("s", "run", ["deftx"]),
        ("s", "stage", ["deftx"]),
    ]
    assert json.loads(begun[0]["config"])["rank"]["value"] == "energy:0.9"
    made = asked("CreateArtifact")
    ace = [item for item in made if item["artifactCollectionName"].startswith("sft-language-ace-deftx")]
    # An input has no maker until the job that made it arrives; the result is the composing run's own.
    assert [item.get("runName") for item in ace] == [None, begun[1]["name"]]
    (result,) = (item for item in made if item["artifactTypeName"] == "result")
    assert result["runName"] == begun[0]["name"]
    assert len({item["digest"] for item in ace}) == 1
    assert len(asked("UseArtifact")) == len(MASKS), "the composing run's inputs, and no other's"
    assert {item["runName"] for item in asked("UseArtifact")} == {begun[0]["name"]}
    uploaded = [item["path"].rpartition("/")[2] for item in sent if item["method"] == "PUT"]
    assert uploaded.count("sft.json") == len(MASKS), "each SFT once, though two jobs have logged one of them"
    assert {"result.json", "metrics.csv", "results.table.json"} <= set(uploaded)
    assert sum(name.endswith(".png") for name in uploaded) >= 2
    streams = [item["json"].get("files", {}) for item in sent if item["path"].endswith("/file_stream")]
    summaries = [line for files in streams for line in files.get("wandb-summary.json", {}).get("content", [])]
    last = [found for found in map(json.loads, summaries) if names.RESULTS in found][-1]
    assert last["macro_f1/ace/deftx"] == 0.6304
    assert last[names.jaccard("ace")] == pytest.approx(2 / 6)
    # Nothing of the run's own was taken away.
    assert (tmp_path / "run" / "result.json").is_file()
    assert (tmp_path / "run" / "metrics.csv").is_file()
