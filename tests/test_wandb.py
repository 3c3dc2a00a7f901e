"""W&B: what an offline run holds, decoded; lineage; and that trouble with W&B never costs a result."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from offline_runs import config, history, of, records, summary
from scores import SCORES

from deftx.errors import DeftxError
from deftx.knobs import problems
from deftx.tracking import (
    CellFacts,
    DataRead,
    LoggerSettings,
    Metric,
    RunRecord,
    SFTFacts,
    Tracker,
    data_setting,
    names,
    read_result,
    recording,
    summarise,
)
from deftx.tracking.artifacts import artifact_name, result_name, sft_name

SETTINGS = {
    "study": "study",
    "task": "nusax",
    "language": ["ace", "ban"],
    "method": "deftx",
    "rank": "energy:0.9",
    "residual": None,
    "density": 0.1,
    "lang.rank": 16,
    "lang": {"out": Path("o")},
}

# name -> role, method, language, and coordinate -> value of each of its two parameters of 100.
MASKS: dict[str, tuple[str, str, str, list[dict[int, float]]]] = {
    "task": ("task", "deftx", "ind", [{1: 1.0, 2: 1.0, 3: -1.0}, {7: 1.0}]),
    "task alone": ("task", "deftx", "ind", [{50: 1.0}, {51: 1.0}]),
    "source": ("language", "deftx", "ind", [{1: 1.0}, {7: -1.0}]),
    "ace": ("language", "deftx", "ace", [{2: -1.0, 3: -1.0, 9: 1.0}, {8: 1.0}]),
    "ban": ("language", "deftx", "ban", [{4: 1.0, 5: 1.0}, {7: 2.0, 8: 1.0}]),
    "task lt": ("task", "ltsft", "ind", [{60: 1.0}, {61: 1.0}]),
    "ace lt": ("language", "ltsft", "ace", [{60: 1.0}, {61: 1.0}]),
}
PAIRS = [("task", "source"), ("task", "ace"), ("task", "ban"), ("task lt", "ace lt")]
KEYS = {name: f"key of {number}" for number, name in enumerate(MASKS)}
CELLS = {
    "no_language_sft": ("task alone",),
    "source_sft": ("task", "source"),
    "ltsft": ("task lt", "ace lt"),
    "deftx": ("task", "ace"),
}
DENOISED = {"task": (0.9, 4), "task alone": (0.1, 1), "source": (0.2, 2), "ace": (0.8, 6), "ban": (0.7, 2)}


def diagnostics() -> pd.DataFrame:
    """The frame of a run over MASKS; energy and rank are one fact a matrix, the second parameter has none."""
    rows: list[dict[str, Any]] = []
    for name, (_, _, _, parameters) in MASKS.items():
        for layer, changes in enumerate(parameters):
            row = {"what": "sft", "key": KEYS[name], "layer": layer, "module": "output.dense", "size": 100}
            row |= {"selected": len(changes), "density": len(changes) / 100}
            if layer == 0 and name in DENOISED:
                energy, rank = DENOISED[name]
                row |= {"energy": energy, "rank": rank, "singular_values": [3.0, 2.0, 1.0, 0.0]}
            rows.append(row)
    for task, language in PAIRS:
        for layer, (here, there) in enumerate(zip(MASKS[task][3], MASKS[language][3], strict=True)):
            shared = set(here) & set(there)
            row = {
                "what": "pair",
                "key": KEYS[task],
                "other_key": KEYS[language],
                "layer": layer,
                "overlap": len(shared),
            }
            row["sign_conflicts"] = sum(here[place] * there[place] < 0 for place in shared)
            rows.append(row)
    columns = ["what", "key", "other_key", "layer", "module", "size", "selected", "density", "rank", "energy"]
    return pd.DataFrame(rows, columns=[*columns, "singular_values", "overlap", "jaccard", "sign_conflicts"])


def record(**changes: Any) -> RunRecord:
    sfts = [
        SFTFacts(
            kind=kind,
            key=KEYS[name],
            method=method,
            languages=(language,),
            k=4,
            on=(KEYS["source"],) if name in ("task", "task lt") else (),
            name=name,
            bytes=1000 * number,
            sha256=f"{number:064x}",
        )
        for number, (name, (kind, method, language, _)) in enumerate(MASKS.items())
    ]
    terms = {sft.name: sft.term for sft in sfts}
    cells = [
        CellFacts(
            "ace", condition, "", "ltsft" if condition == "ltsft" else "deftx", "", tuple(terms[n] for n in names)
        )
        for condition, names in CELLS.items()
    ]
    cells.append(CellFacts("ban", "deftx", "", "deftx", "", (terms["task"], terms["ban"])))
    return replace(
        RunRecord(study="study", job="run-1", settings=SETTINGS, seed=3),
        cells=cells,
        metrics=SCORES,
        sfts=sfts,
        stages=[{"kind": "sparse", "outcome": "computed"}, *[{"kind": "evaluate", "outcome": "cached"}] * 2],
        times={"sparse": 2.5, "imports": 0.5},
        peak_memory={"gpu": None},
        **changes,
    )


def sft_folders(base: Path, made: RunRecord) -> dict[str, Path]:
    """A folder as training leaves it for each SFT of a record."""
    folders = {}
    for sft in made.sfts:
        folder = base / "sfts" / sft.name
        folder.mkdir(parents=True)
        facts = {"method": sft.method, "languages": list(sft.languages), "k": sft.k, "seed": 3, "base_model": "tiny"}
        facts |= {"rank": 16 if sft.method == "deftx" else None, "residual": None}
        facts |= {"task": "nusax", "trained_on": None} if sft.kind == "task" else {}
        (folder / "sft.json").write_text(json.dumps({"metadata": facts, "sha256": sft.sha256}))
        (folder / "sft.safetensors").write_bytes(bytes(100))
        folders[sft.key] = folder
    return folders


def test_settings_are_checked() -> None:
    assert not problems(LoggerSettings())
    with pytest.raises(DeftxError, match=r"logger\.wandb='ofline': must be off, offline.*did you mean 'offline'"):
        Tracker(LoggerSettings(wandb="ofline"), "x", study="s")
    with pytest.raises(DeftxError, match=r"logger\.project='a/b': W&B takes"):
        Tracker(LoggerSettings(project="a/b"), "x", study="s")


@pytest.fixture(scope="module")
def quiet_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No account, no settings, no terminal to ask on."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
            patch.delenv(name)
        for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "none"))
        patch.setattr("builtins.input", lambda *_: pytest.fail("asked something"))
        yield home


@pytest.fixture(scope="module")
def offline(quiet_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two runs in one process at once, the inner one fails."""
    import torch
    from pytorch_lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.layer(batch).sum()
            self.log("train/loss", torch.tensor(float(index)))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    base = tmp_path_factory.mktemp("runs")
    made = record()
    folders = sft_folders(base, made)
    before = dict(os.environ)
    good = Tracker(
        LoggerSettings(artifacts=True, tags=["mine", "nusax"], project="p"),
        base / "good",
        study="study",
        job_type="run",
        name="deftx-0",
        config=SETTINGS,
        tags=["deftx", "nusax", "ace", "x" * 100],
    )
    bad = Tracker(LoggerSettings(group="mine"), base / "bad", study="study")

    def fail() -> None:
        bad.finish_run(record(), diagnostics(), folders)
        raise RuntimeError("boom")

    with good, recording(base / "good", made):
        mode = good.mode
        # A second wandb.init in one process returns the first run, unless it is told not to.
        with pytest.raises(RuntimeError, match="boom"), bad:
            fail()
        for stage in ("full/ace", "sparse/ace"):
            loggers = good.lightning_loggers(stage)
            trainer = Trainer(
                max_steps=3,
                logger=loggers,
                log_every_n_steps=1,
                accelerator="cpu",
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=base,
            )
            trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 2)))
        good.finish_run(made, diagnostics(), folders)
    return {
        "base": base,
        "mode": mode,
        "good": records(base / "good"),
        "bad": records(base / "bad"),
        "environment": ({**before, "WANDB_SERVICE": ""}, {**os.environ, "WANDB_SERVICE": ""}),
        "after": (good.run, bad.run),
    }


def test_wandb_run_says_what_it_is(offline: dict[str, Any]) -> None:
    (run, *_) = of("run", offline["good"])
    assert offline["mode"] == "offline"
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("p", "study", "run", "deftx-0")
    assert list(run.tags) == ["deftx", "nusax", "ace", "x" * 64, "mine"]
    assert config(offline["good"]) == {
        **{name: value for name, value in SETTINGS.items() if not name.startswith("lang.") and name != "lang"},
        "lang/rank": 16,
        "lang/out": "o",
        "k": None,
        "seed": None,
    }
    assert set(names.KNOBS) <= set(config(offline["good"]))
    # Without settings, too: a panel over a knob finds it in every run.
    assert config(offline["bad"]) == dict.fromkeys(names.KNOBS)
    later = [item.key for record in of("config", offline["good"]) for item in record.update]
    assert "width" not in later


def test_wandb_summary_has_stable_names(offline: dict[str, Any]) -> None:
    found = summary(offline["good"])
    assert found["seconds/total"] > 0
    assert found["memory/cpu"] > 1e6
    expected = {f"macro_f1/{item.language}/{item.condition}": item.value for item in SCORES if item.value is not None}
    expected |= {
        "macro_f1/mean/no_language_sft": 0.45,
        "macro_f1/mean/ltsft": 0.581,
        "score/macro_f1/ace": 0.6304,
        "diff/macro_f1/ace": 0.6304 - 0.612,
        "energy/language": 0.75,
        "energy/task": 0.9,
        "energy/mean": 0.8,
        "rank_kept/mean": 4,
        "mask_density/task": 0.02,
        "sft_bytes/language": 3500,
        # Shared with the task: 2 and 3 of seven (one apart); 7 of the second parameter, of seven.
        "jaccard/ace": 2 / 6,
        "jaccard/ban": 1 / 7,
        "jaccard/mean": (2 / 6 + 1 / 7) / 2,
        "sign_conflicts/ace": 0.5,
        "sign_conflicts/ban": 0.0,
        "seconds/stage/sparse": 2.5,
        "cache/hits": 2,
        "cache/computed": 1,
        "status": "done",
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    # Where a target has no score there is no mean, and what does not exist is no zero.
    absent = {"macro_f1/mean/deftx", "score/macro_f1/mean", "diff/macro_f1/mean", "diff/macro_f1/ban", "memory/gpu"}
    assert not absent & set(found)


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({"metrics": SCORES[:2]}, "macro_f1/ace/ltsft", "diff/macro_f1/ace"),
        ({"job_type": "eval", "metrics": [Metric("ace", "composed", "accuracy", 1.0, 9)]}, "score/accuracy/mean", "x"),
        ({"metrics": [replace(SCORES[2], split="dev")]}, "score/macro_f1/ace/dev", "score/macro_f1/ace"),
        ({"settings": {**SETTINGS, "method": "ltsft"}}, "score/macro_f1/mean", "energy/mean"),
        ({"sfts": []}, "macro_f1/ace/ltsft", "energy/mean"),
        (
            {"job_type": "stage", "metrics": [], "cells": [], "sfts": record().sfts[2:3]},
            "energy/language",
            "energy/task",
        ),
        # The source's, which the task SFT is trained on, is an input.
        (
            {"job_type": "sft-task", "metrics": [], "cells": [], "sfts": record().sfts[:3:2]},
            "energy/task",
            "energy/language",
        ),
    ],
)
def test_summary_of_other_jobs(changes: dict[str, Any], present: str, absent: str) -> None:
    found = summarise(replace(record(), **changes), diagnostics())
    assert present in found
    assert absent not in found


def test_a_mixed_method_is_what_its_cells_compose() -> None:
    """lang.rank=none under method=deftx: the language SFT is trained as LT-SFT's, and yet it is DeFT-X's own."""
    made = record()
    made.sfts = [replace(sft, method="ltsft") if sft.name == "ace" else sft for sft in made.sfts]
    assert summarise(made, diagnostics()) == summarise(record(), diagnostics())


def test_settings_that_are_known_late_are_in_the_config(quiet_home: Path, tmp_path: Path) -> None:
    made = record()
    with Tracker(LoggerSettings(pictures=False), tmp_path, study="s", config=made.settings) as tracker:
        read = [DataRead(what="train", language="ind", digest="d1", hub="nusax", revision="c0ffee")]
        made.settings = {**made.settings, "data.read": data_setting(read)}
        tracker.finish_run(made)
    found = records(tmp_path)
    late = {item.key: json.loads(item.value_json) for record_ in of("config", found) for item in record_.update}
    assert late == {
        "data/read/train ind/what": "train",
        "data/read/train ind/language": "ind",
        "data/read/train ind/digest": "d1",
        "data/read/train ind/hub": "nusax",
        "data/read/train ind/revision": "c0ffee",
    }


def test_wandb_table_has_a_row_for_each_language(offline: dict[str, Any]) -> None:
    (path,) = (offline["base"] / "good").glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["language", "split", "metric", "n", "no_language_sft", "ltsft", "deftx"]
    assert table["data"] == [
        ["ace", "test", "macro_f1", 400, 0.5, 0.612, 0.6304],
        ["ban", "test", "macro_f1", 399, 0.4, 0.55, None],
    ]
    assert summary(offline["good"])["results|nrows"] == 2


def test_wandb_pictures_are_in_the_run(offline: dict[str, Any]) -> None:
    from PIL import Image

    found = summary(offline["good"])
    (run,) = (offline["base"] / "good").glob("wandb/offline-run-*")
    for name in (names.MASK_DENSITY, names.SPECTRA):
        assert found[f"{name}|_type"] == "image-file"
        pixels = np.asarray(Image.open(run / "files" / found[f"{name}|path"]).convert("L"))
        assert pixels.std() > 10, "not blank"


def artifacts(found: list[Any]) -> dict[str, Any]:
    return {item.name: item for item in of("artifact", found) if item.type != "run_table"}


def test_wandb_artifacts_have_lineage_and_are_staged_with_the_run(offline: dict[str, Any]) -> None:
    found = artifacts(offline["good"])
    inputs = {name for name, item in found.items() if item.use_after_commit}
    assert inputs == {item.name for item in found.values() if item.type == "sft"}
    assert "sft-language-ace-deftx-rank-16-k-4-seed-3-tiny" in inputs
    assert "sft-task-nusax-ind-ltsft-k-4-seed-3-tiny" in inputs
    (result,) = (item for item in found.values() if not item.use_after_commit)
    assert (result.type, result.name) == (
        "result",
        "result-study-nusax-ace-ban-deftx-rank-energy-0.9-density-0.1-seed-3",
    )
    assert set(json.loads(result.metadata)["sfts"]) == inputs
    contents = {item.path: Path(item.local_path) for item in result.manifest.contents}
    assert set(contents) == {"result.json", "metrics.csv"}
    assert json.loads(contents["result.json"].read_text())["status"] == "done", "written before it was logged"
    assert {item.path for item in found["sft-language-ban-deftx-rank-16-k-4-seed-3-tiny"].manifest.contents} == {
        "sft.json",
        "sft.safetensors",
    }
    for item in (entry for artifact in of("artifact", offline["good"]) for entry in artifact.manifest.contents):
        assert Path(item.local_path).is_file()
        assert Path(item.local_path).is_relative_to(offline["base"] / "good" / "wandb" / "staging")


def test_a_failed_run_has_its_scores_and_no_artifacts(offline: dict[str, Any]) -> None:
    assert summary(offline["bad"])["macro_f1/ace/deftx"] == 0.6304
    assert not artifacts(offline["bad"])


def test_lineage_needs_no_large_file_and_one_sft_is_one_version(quiet_home: Path, tmp_path: Path) -> None:
    found = {}
    jobs = {
        "run": ("run", list(MASKS), SCORES),
        "stage": ("stage", ["ace"], []),
        "sft-task": ("sft-task", ["source", "task"], []),
    }
    for folder, (kind, names_, metrics) in jobs.items():
        made = record(job_type=kind)
        made.sfts = [sft for sft in made.sfts if sft.name in names_]
        made.metrics = list(metrics)
        made.cells = made.cells if metrics else []
        with Tracker(LoggerSettings(), tmp_path / folder, study="s", job_type=kind) as tracker:
            tracker.finish_run(made, None, sft_folders(tmp_path / folder, made))
        found[folder] = artifacts(records(tmp_path / folder))
    ace = "sft-language-ace-deftx-rank-16-k-4-seed-3-tiny"
    assert {item.path for item in found["stage"][ace].manifest.contents} == {"sft.json"}
    assert json.loads(found["stage"][ace].metadata)["sha256"] == f"{3:064x}"
    # W&B takes one digest for one version, whichever job's offline run is synced first.
    assert found["stage"][ace].digest == found["run"][ace].digest
    assert {item.digest for item in found["run"].values() if item.type == "sft"} >= {found["stage"][ace].digest}
    assert len({item.digest for item in found["run"].values()}) == len(found["run"])
    used = {job: {name: item.use_after_commit for name, item in some.items()} for job, some in found.items()}
    assert used["stage"] == {ace: False}
    assert used["sft-task"] == {
        "sft-language-ind-deftx-rank-16-k-4-seed-3-tiny": True,
        "sft-task-nusax-ind-deftx-rank-16-k-4-seed-3-tiny": False,
    }


def test_artifact_names_are_stable_and_short_enough() -> None:
    facts = {"languages": ["ind"], "method": "deftx", "rank": "energy:0.9", "residual": "prune:0.05", "k": 9, "seed": 0}
    assert sft_name("language", facts) == "sft-language-ind-deftx-rank-energy-0.9-residual-prune-0.05-k-9-seed-0"
    assert sft_name("task", facts | {"task": "nusax", "trained_on": {"ind": "x"}}).startswith(
        "sft-task-nusax-ind-deftx-on-ind-rank"
    )
    many = record(settings={**SETTINGS, "language": [f"l{number}" for number in range(99)]})
    other = replace(many, settings={**many.settings, "language": [*many.settings["language"], "more"]})
    assert len(result_name(many)) == 128
    assert result_name(many) != result_name(other)
    assert artifact_name(["a b", None, "", 0, "c/ü"]) == "a-b-0-c"


def test_training_curves_share_the_run_under_their_stages(offline: dict[str, Any]) -> None:
    points = history(offline["good"])
    for stage in ("full/ace", "sparse/ace"):
        curve = [(p[f"{stage}/step"], p[f"{stage}/train/loss"]) for p in points if f"{stage}/train/loss" in p]
        assert curve == [(0, 0.0), (1, 1.0), (2, 2.0)]
        rows = pd.read_csv(offline["base"] / "good" / "curves" / stage / "metrics.csv")
        assert rows["train/loss"].tolist() == [0.0, 1.0, 2.0]
    axes = {record.glob_name: record.step_metric for record in of("metric", offline["good"])}
    assert axes["full/ace/*"] == "full/ace/step"


def test_runs_are_separate_and_closed(offline: dict[str, Any]) -> None:
    ids = [of("run", offline[name])[0].run_id for name in ("good", "bad")]
    assert ids[0] != ids[1]
    assert [of("exit", offline[name])[0].exit_code for name in ("good", "bad")] == [0, 1]
    assert of("run", offline["bad"])[0].run_group == "mine"
    assert summary(offline["bad"])["status"] == "failed"
    assert offline["after"] == (None, None)
    import wandb

    assert wandb.run is None
    assert offline["environment"][0] == offline["environment"][1]


def test_wandb_off_writes_curves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(LoggerSettings(wandb="off"), tmp_path, study="s") as tracker:
        assert (tracker.mode, tracker.run) == ("off", None)
        tracker.finish_run(record(), diagnostics(), {})
        tracker.log_curve("full", {"loss": 1.0}, 1)
        assert len(tracker.lightning_loggers("full/ace")) == 1
        (tmp_path / "curves" / "sparse").mkdir(parents=True)
        assert [tracker.lightning_loggers(name)[0].name for name in ("full/ace", "sparse")] == [
            "full/ace-2",
            "sparse-2",
        ]
    with Tracker(LoggerSettings(wandb="off", curves=False), tmp_path, study="s") as tracker:
        assert tracker.lightning_loggers("full") == []
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("online", {"WANDB_MODE": "disabled"}, "off"),
        ("offline", {"WANDB_MODE": "disabled"}, "off"),
        ("off", {"WANDB_MODE": "online"}, "off"),
    ],
)
def test_the_environment_can_only_lower_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, environment: dict[str, str], mode: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with Tracker(LoggerSettings(wandb=asked), tmp_path, study="s") as tracker:
        assert tracker.mode == mode
    assert list(tmp_path.iterdir()) == []


def test_online_without_an_account_goes_offline(
    quiet_home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    started, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: (started.append(options["mode"]), init(**options))[1])
    with Tracker(LoggerSettings(wandb="online"), tmp_path, study="s") as tracker:
        assert tracker.mode == "offline"
        tracker.finish_run(record())
    assert started == ["offline"], "going online without an account would ask for one on a terminal"
    assert summary(records(tmp_path))["macro_f1/ace/deftx"] == 0.6304
    (told,) = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
    assert "wandb login" in told.getMessage()
    assert capfd.readouterr() == ("", ""), "the console stays quiet"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_wandb import diagnostics, record
from deftx.tracking import LoggerSettings, Tracker, recording

def core():
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, parent = place.read_text().rpartition(")")[::2]
        except OSError:
            continue
        if "(wandb-core" in name and parent.split()[1] == str(os.getpid()):
            return int(place.parent.name)

made = record()
with Tracker(LoggerSettings(), "run", study="s") as tracker, recording("run", made):
    os.kill(core(), signal.SIGKILL)
    tracker.log_curve("full", {{"loss": 1.0}}, 1)
    tracker.finish_run(made, diagnostics(), {{}})
with Tracker(LoggerSettings(), "next", study="s") as tracker:
    tracker.finish_run(made, diagnostics(), {{}})
    print(tracker.mode)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds W&B's process in /proc")
def test_a_killed_wandb_costs_no_result_and_the_next_job_has_another(quiet_home: Path, tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent))
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "offline\n"), ended.stderr
    assert read_result(tmp_path / "run").status == "done"
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "result.json is complete without it" in ended.stderr
    assert summary(records(tmp_path / "next"))["status"] == "done"


def test_trouble_with_wandb_costs_no_result(
    quiet_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def broken(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("no core")

    monkeypatch.setattr(wandb, "init", broken)
    with Tracker(LoggerSettings(), tmp_path, study="s") as tracker:
        tracker.finish_run(record())
        assert tracker.mode == "off"
    assert "no core" in caplog.text
    with pytest.raises(DeftxError, match="cannot write"), Tracker(LoggerSettings(), "/dev/null/x", study="s"):
        pass


def test_a_wandb_folder_that_cannot_be_written_costs_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").write_text("in the way")
    made = record()
    with Tracker(LoggerSettings(), tmp_path, study="s") as tracker, recording(tmp_path, made):
        assert tracker.mode == "off"
        tracker.finish_run(made, diagnostics(), {})
    assert read_result(tmp_path).status == "done"
    assert "File exists" in caplog.text


def test_pictures_can_be_left_out(quiet_home: Path, tmp_path: Path) -> None:
    with Tracker(LoggerSettings(pictures=False), tmp_path, study="s") as tracker:
        tracker.finish_run(record(), diagnostics())
    found = summary(records(tmp_path))
    assert not any(name.startswith("media/") for name in found)
    assert found["energy/mean"] == pytest.approx(0.8)


@pytest.mark.parametrize("broken", ["draw_mask_density", "draw_spectra", "summarise", "results_rows", "sft_artifact"])
def test_a_part_that_fails_leaves_the_others(
    quiet_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr(f"deftx.tracking.tracker.{broken}", fail)
    made = record()
    with Tracker(LoggerSettings(), tmp_path, study="s") as tracker, recording(tmp_path, made):
        tracker.finish_run(made, diagnostics(), sft_folders(tmp_path, made))
    found = records(tmp_path)
    there = {
        "draw_mask_density": f"{names.MASK_DENSITY}|path" in summary(found),
        "draw_spectra": f"{names.SPECTRA}|path" in summary(found),
        "summarise": "cache/hits" in summary(found),
        "results_rows": "results|nrows" in summary(found),
        "sft_artifact": any(item.type == "sft" for item in of("artifact", found)),
    }
    assert [name for name, present in there.items() if not present] == [broken]
    assert summary(found)["status"] == "done"
    assert any(item.type == "result" for item in of("artifact", found))
