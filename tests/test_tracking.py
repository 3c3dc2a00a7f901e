"""What runs leave behind: result.json, CSV, parquet, the terminal's table, W&B's offline files."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scores import SCORES

from deftx.errors import DeftxError
from deftx.tracking import (
    CellFacts,
    DataRead,
    Metric,
    Provenance,
    Remark,
    RunRecord,
    SFTFacts,
    Term,
    clock_imports,
    data_read,
    data_setting,
    gather_provenances,
    print_results,
    print_steps,
    provenance,
    provenance_differences,
    provenance_remark,
    read_result,
    recording,
    results_table,
    write_diagnostics,
    write_predictions,
    write_result,
)

# ------------------------------------------------------------------------------------------------- provenance


def git(folder: Path, *arguments: str) -> None:
    name = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


def test_provenance_knows_commit_and_dirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clean", "dirty", "empty"):
        folder = tmp_path / name
        folder.mkdir()
        git(folder, "init")
        if name != "empty":
            (folder / "a").write_text("1")
            git(folder, "add", "a")
            git(folder, "commit", "-m", "one")
        (folder / "untracked").write_text("")
    (tmp_path / "dirty" / "a").write_text("2")
    answer = subprocess.run(
        ["git", "-C", str(tmp_path / "clean"), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "dirty" / ".git"))
    clean = provenance(tmp_path / "clean", gpu="H200")
    assert clean["git"]["working_directory"] == {"commit": answer.stdout.strip(), "dirty": False}
    assert provenance(tmp_path / "dirty")["git"]["working_directory"]["dirty"] is True
    assert provenance(tmp_path / "empty")["git"]["working_directory"] is None
    assert provenance(tmp_path)["git"]["working_directory"] is None
    assert clean["versions"].keys() >= {"torch", "transformers", "pytorch-lightning", "numpy"}
    assert clean["python"] == ".".join(map(str, sys.version_info[:3]))
    assert clean["gpu"] == "H200"
    assert clean["cpus"] >= 1
    assert clean["threads"] >= 1
    assert clean["cpu"]
    assert json.loads(json.dumps(clean)) == clean


def test_provenance_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(tmp_path)["git"] == {"deftx": None, "working_directory": None}


# --------------------------------------------------------------------------------------------------- results


def test_result_holds_everything_and_reads_back(tmp_path: Path) -> None:
    record = RunRecord(
        study="demo",
        job="deftx-0",
        settings={"rank": "energy:0.9", "k": 100, "residual": None, "out": Path("x"), "bad": float("inf")},
        seed=3,
        provenance={"python": "3.11"},
        metrics=list(SCORES),
        fingerprints={"base": "f00d"},
        stages=[{"kind": "full", "key": "k" * 64, "outcome": "cached", "seconds": np.float64(0.5)}],
        times={"train": float("nan")},
    )
    record.finish()
    path = write_result(tmp_path / "new" / "run", record)
    content = json.loads(path.read_text())
    assert path == tmp_path / "new" / "run" / "result.json"
    assert content["schema_version"] == 4
    assert content["status"] == "done"
    assert content["settings"] == {"rank": "energy:0.9", "k": 100, "residual": None, "out": "x", "bad": None}
    assert content["stages"][0]["seconds"] == 0.5
    assert content["times"]["train"] is None
    assert content["error"] is None
    assert content["seconds"] >= 0
    assert content["started"].endswith("+00:00")
    assert 10_000_000 < content["peak_memory"]["cpu"] < 2**40
    assert content["metrics"][0] == {
        "language": "ace",
        "condition": "ltsft",
        "metric": "macro_f1",
        "value": 0.612,
        "n": 400,
        "split": "test",
    }
    assert not any(name.startswith("_") for name in content)
    again = read_result(tmp_path / "new" / "run")
    assert again.metrics == SCORES
    assert (again.study, again.job, again.seed, again.fingerprints) == ("demo", "deftx-0", 3, {"base": "f00d"})
    assert sorted(file.name for file in path.parent.iterdir()) == ["metrics.csv", "result.json"]


TERM = Term(
    kind="task", key="t", method="deftx", rank="4", residual="drop", languages=("ind",), task="nusax", on=("s",)
)


def test_facts_read_back_as_they_were_written(tmp_path: Path) -> None:
    record = RunRecord(
        "s",
        "j",
        settings={"data.read": data_setting([DataRead(what="train", language="ind", digest="d", path="rows.tsv")])},
        sfts=[SFTFacts(**vars(TERM), name="task on θ⁰", bytes=7, sha256="f", metrics={"best_score": 0.5})],
        cells=[CellFacts("ace", "deftx", "", "deftx", "k", (TERM, Term(kind="language", key="l", k=3)))],
        notes=[Remark("constant_predictions", "one class is predicted throughout", ("ace deftx", "ban deftx"))],
        provenances=[Provenance({"torch": "2.9"}, 2, "cpu", {"full": 3})],
    )
    again = read_result(write_result(tmp_path, record))
    for name in ("sfts", "cells", "notes", "provenances", "settings"):
        assert getattr(again, name) == getattr(record, name)
    assert again.sfts[0].term == again.cells[0].terms[0] == TERM
    assert again.cells[0].pair == ("t", "l")
    assert again.notes[0].line == "one class is predicted throughout: ace deftx, ban deftx"
    (read,) = data_read(again.settings)
    assert (read.name, read.path, read.hub) == ("train ind", "rows.tsv", None)
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["cells"][0]["terms"][0]["on"] == ["s"]
    assert content["settings"]["data.read"] == {
        "train ind": {"what": "train", "language": "ind", "digest": "d", "path": "rows.tsv"}
    }


@pytest.mark.parametrize(
    "damage",
    [
        {"sfts": [{"name": "x"}]},
        {"cells": [{"language": "ace"}]},
        {"notes": ["a sentence"]},
        {"settings": {"data.read": {"train ind": {"path": "x"}}}},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_facts_that_are_none_are_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = write_result(tmp_path, RunRecord("s", "j"))
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(DeftxError, match="not a result of deftx"):
        read_result(tmp_path)


def test_provenances_of_stages_are_gathered_and_told_apart() -> None:
    def under(torch: str, threads: int, gpu: str | None = None) -> dict[str, Any]:
        return {"versions": {"torch": torch, "numpy": "2"}, "threads": threads, "gpu": gpu, "python": "3.11"}

    same = gather_provenances([("full", under("2.8", 2)), ("sparse", under("2.8", 2)), ("full", under("2.8", 2))])
    assert same == [Provenance({"torch": "2.8"}, 2, "cpu", {"full": 2, "sparse": 1})]
    assert provenance_remark(same) is None
    apart = gather_provenances([("full", under("2.9", 2)), ("sparse", under("2.8", 2, "H200")), ("eval", {})])
    assert [item.stages for item in apart] == [{"full": 1}, {"sparse": 1}, {"eval": 1}]
    assert provenance_differences(apart) == [
        "torch 2.8 / 2.9",
        "device H200 / cpu",
    ]  # what is not known differs from nothing
    remark = provenance_remark(apart)
    assert remark is not None
    assert (remark.kind, remark.about) == ("provenances_differ", ("torch 2.8 / 2.9", "device H200 / cpu"))


def test_metrics_csv_has_one_row_for_each_score(tmp_path: Path) -> None:
    write_result(
        tmp_path, RunRecord("s", "j", metrics=[*SCORES[-2:], Metric('a,"b', "no_language_sft", "accuracy", 1 / 3, 7)])
    )
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "language,condition,metric,value,n,split",
        "ban,deftx,macro_f1,,399,test",
        "ban,ltsft,macro_f1,0.55,399,test",
        '"a,""b",no_language_sft,accuracy,0.3333333333333333,7,test',
    ]


@pytest.mark.parametrize(
    ("error", "kind", "traced", "status"),
    [
        (RuntimeError("boom"), "RuntimeError", True, "failed"),
        (DeftxError("rank is 0"), "DeftxError", False, "failed"),
        (KeyboardInterrupt(), "KeyboardInterrupt", False, "interrupted"),
    ],
)
def test_a_failed_run_leaves_its_record(
    tmp_path: Path, error: BaseException, kind: str, traced: bool, status: str
) -> None:
    record = RunRecord("s", "j", metrics=[SCORES[0]])
    with pytest.raises(type(error)) as caught, recording(tmp_path, record):
        raise error
    assert caught.value is error
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["status"] == status
    assert content["error"]["type"] == kind
    assert content["error"]["message"] == str(error)
    assert ("raise error" in (content["error"]["traceback"] or "")) is traced
    assert len(content["metrics"]) == 1


def test_a_run_that_ends_well_is_recorded(tmp_path: Path) -> None:
    with recording(tmp_path, RunRecord("s", "j")):
        pass
    assert read_result(tmp_path).status == "done"


def test_a_result_is_replaced_whole(tmp_path: Path) -> None:
    before = write_result(tmp_path, RunRecord("s", "old")).stat().st_ino
    with (tmp_path / "result.json").open() as reader:
        assert write_result(tmp_path, RunRecord("s", "new")).stat().st_ino != before
        assert json.load(reader)["job"] == "old", "a reader saw a file change under it"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot read"),
        ('{"schema_version": 0}', "schema version 0; this deftx reads 1 to 4"),
        ('{"schema_version": 1}', "not a result"),
        ('{"schema_version": 1, "metrics": [{"x": 1}]}', "not a result"),
        ("[]", "not a result"),
        ('{"schema', "not a result"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(DeftxError, match=text):
        read_result(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeftxError, match=r"cannot write .*Not a directory.*another output folder"):
        write_result(tmp_path / "file" / "run", RunRecord("s", "j"))
    with (
        pytest.raises(DeftxError, match="cannot write"),
        recording(tmp_path / "file" / "run", RunRecord("s", "j")),
    ):
        pytest.fail("nothing runs whose result has no place")

    def lost() -> None:
        with recording(tmp_path / "lost", RunRecord("s", "j")):
            shutil.rmtree(tmp_path / "lost")
            (tmp_path / "lost").write_text("")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        lost()
    assert "cannot write" in caplog.text


def test_a_killed_run_leaves_a_record_that_says_so(tmp_path: Path) -> None:
    with recording(tmp_path, RunRecord("s", "j")):
        assert read_result(tmp_path).status == "running"
    assert read_result(tmp_path).status == "done"
    with (
        pytest.raises(DeftxError, match="finished run; nothing is overwritten"),
        recording(tmp_path, RunRecord("s", "k")),
    ):
        pytest.fail("a finished run is not written over")
    assert read_result(tmp_path).job == "j"


def test_a_full_disk_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(tmp_path, RunRecord("s", "old"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeftxError, match="No space left on device"):
        write_result(tmp_path, RunRecord("s", "new"))
    assert read_result(tmp_path).job == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.csv", "result.json"]


def test_predictions_and_diagnostics(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "language": ["ace", "ace"],
            "condition": ["deftx", "deftx"],
            "id": ["0", "1"],
            "label": [2, 0],
            "negative": np.array([0.1, 0.7], dtype=np.float32),
        },
        index=[5, 9],
    )
    path = write_predictions(tmp_path, frame)
    back = pd.read_parquet(path)
    assert list(back.columns) == list(frame.columns)
    assert back["negative"].dtype == "float32"
    assert back.to_dict("list") == frame.to_dict("list")
    assert list(back.index) == [0, 1]
    first = path.read_bytes()
    write_predictions(tmp_path, frame)
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match=r"lack the columns \['id'\]"):
        write_predictions(tmp_path, frame.drop(columns="id"))
    write_diagnostics(tmp_path, pd.DataFrame({"name": ["w"], "rank": [3]}))
    assert pd.read_parquet(tmp_path / "diagnostics.parquet")["rank"].tolist() == [3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["diagnostics.parquet", "predictions.parquet"]


# ----------------------------------------------------------------------------------------------------- table


def cells(metrics: list[Metric], **options: Any) -> tuple[list[str], list[list[str]], list[list[bool]]]:
    table = results_table(metrics, **options)
    columns = [list(column.cells) for column in table.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    bold = [[getattr(cell, "style", "") == "bold" for cell in row] for row in rows]
    return [str(column.header) for column in table.columns], [[str(cell) for cell in row] for row in rows], bold


def test_table_orders_conditions_and_marks_the_best() -> None:
    header, rows, bold = cells(SCORES)
    assert header == ["target", "n", "no language SFTs", "LT-SFT", "DeFT-X"]
    assert rows == [
        ["ace", "400", "50.0", "61.2", "63.0"],
        ["ban", "399", "40.0", "55.0", "failed"],
        ["mean of 2", "", "45.0", "58.1", "63.0 (1 of 2)"],
    ]
    assert bold == [
        [False, False, False, False, True],
        [False, False, False, True, False],
        [False, False, False, True, False],
    ]


def test_table_shows_missing_cells_other_splits_and_ties() -> None:
    header, rows, bold = cells(
        [
            Metric("quy", "mine", "accuracy", 0.5, 750),
            Metric("quy", "source_sft", "accuracy", 0.5, 700),
            Metric("gn [b]", "mine", "accuracy", float("nan"), 9, split="dev"),
            Metric("quy", "source_sft", "macro_f1", 0.1, 750),
        ]
    )
    assert header == ["target", "n", "source SFT left in", "mine"]
    assert rows == [["quy", "700–750", "50.0", "50.0"], ["gn [b] (dev)", "9", "–", "failed"]]
    assert bold[0] == [False, False, True, True]
    assert not any(bold[1])
    assert cells([Metric("a", "no_language_sft", "x", 0.5, 1)])[2] == [[False, False, False]]


def test_a_mean_never_mixes_splits() -> None:
    scores = [Metric(name, "no_language_sft", "x", value, 1, split) for name, value, split in [
        ("a", 0.1, "test"), ("b", 0.3, "test"), ("c", 0.5, "dev"), ("d", 0.9, "dev")]]  # fmt: skip
    assert [row for row in cells(scores)[1] if row[0].startswith("mean")] == [
        ["mean of 2", "", "20.0"],
        ["mean of 2 (dev)", "", "70.0"],
    ]


def test_two_runs_in_one_table_are_refused() -> None:
    with pytest.raises(ValueError, match="two scores for ace, no_language_sft"):
        results_table([SCORES[1], SCORES[1]])


def test_steps_are_shown_where_a_phase_was_profiled() -> None:
    facts = {"tokens_per_second": 1234.4, "padding": 0.25, "peak_memory": 3 << 29}
    full = {**facts, "profile": {"data": 0.001, "forward": 0.003}}
    text = io.StringIO()
    profiled = SFTFacts(kind="language", key="a", name="language ace", metrics={**facts, "profile": {}, "full": full})
    sfts = [profiled, SFTFacts(kind="language", key="x", name="x")]
    print_steps(sfts, console=Console(file=text, width=40))
    assert text.getvalue().splitlines()[1:] == [
        "language ace, full phase: 4.0 ms (data 25%, forward 75%), 1,234 tokens/s, padding 25%, peak memory 1.5 GiB"
    ]
    empty = io.StringIO()
    print_steps(sfts[1:], console=Console(file=empty))
    assert not empty.getvalue()


def test_print_results_says_where_everything_lies() -> None:
    out = io.StringIO()
    long = "/a/[very]/" + "long/" * 40
    print_results(
        [*SCORES, Metric("ace", "no_language_sft", "accuracy", 0.7, 400)],
        where={"results": "/r", "SFTs": long},
        failed={"seed=1": "NaN loss at step 7"},
        notes=["dev in place of test"],
        title="demo",
        console=Console(file=out, width=80),
    )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "demo: macro-F1 × 100" in lines
    assert "demo: accuracy × 100" in lines
    assert lines[-4:] == [
        "note: dev in place of test",
        "failed: seed=1: NaN loss at step 7",
        "results  /r",
        f"SFTs     {long}",
    ]
    empty = io.StringIO()
    print_results([], failed={"a": "b"}, console=Console(file=empty))
    assert empty.getvalue() == "no scores\nfailed: a: b\n"


def test_importing_is_light() -> None:
    code = (
        "import sys, deftx.tracking; "
        "print({'torch', 'pytorch_lightning', 'wandb', 'pandas', 'pyarrow', 'rich'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_the_first_run_of_a_command_says_how_long_it_took_to_begin(tmp_path: Path) -> None:
    clock_imports()
    time.sleep(0.1)
    for name in ("first", "second"):
        with recording(tmp_path / name, RunRecord(study="s", job=name)):
            time.sleep(0.5)
    times = [read_result(tmp_path / name).times for name in ("first", "second")]
    assert 0.1 <= times[0].pop("imports") < 0.5
    assert times == [{}, {}]
