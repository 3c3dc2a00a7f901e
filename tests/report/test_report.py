"""``deftx report`` as a whole: what it writes, what it says of bad input, and what a kill leaves."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricate import N, Report, write_run, write_sweep

from deftx import tracking

BOTH = {"ltsft": 0.5, "deftx": 0.7}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Page(HTMLParser):
    """Tags with their attributes, and whether each is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_a_sweep_becomes_a_folder_with_everything(grid_report: tuple[Path, str]) -> None:
    out, shown = grid_report
    written = files(out)
    assert {"report.html", "report.json", "scores.csv", "tables/summary.csv"} <= written
    plots = {name.split("tiny-")[1] for name in written if name.startswith("plots/")}
    expected = ("overview", "rank", "density", "rank_x_sparsity", "energy", "kept_rank", "spectra", "mask", "overlap")
    assert plots == {f"{name}.{kind}" for name in (*expected, "cost") for kind in ("svg", "png")}
    assert "failed: grid/3 (rank=4 density=0.1 seed=1): the disk is full" in shown
    assert "missing: grid/8 (rank=none density=0.05 seed=0): begun but not finished" in shown
    assert "10 runs with scores" in shown
    assert (
        "paired bootstrap, 200 resamples of items, items jointly across languages, and Student's t over seeds; 95 %"
        in shown
    )


def test_scores_csv_is_tidy_and_whole(grid: Path, grid_report: tuple[Path, str]) -> None:
    out, _ = grid_report
    rows = list(csv.DictReader((out / "scores.csv").open(encoding="utf-8")))
    assert len(rows) == 10 * 2  # a run has two languages and one condition
    for row in rows:
        result = tracking.read_result(grid / row["run"].removeprefix("grid/"))
        (value,) = (
            item.value
            for item in result.metrics
            if (item.language, item.condition, item.metric) == (row["language"], row["condition"], row["metric"])
        )
        assert (float(row["value"]), int(row["seed"]), int(row["n"])) == (value, result.seed, N)
    summary = list(csv.DictReader((out / "tables" / "summary.csv").open(encoding="utf-8")))
    deftx = [row for row in summary if row["condition"] == "deftx"]
    assert deftx
    assert all(float(row["low"]) <= float(row["high"]) and row["resamples"] == "200" for row in deftx)


def test_the_page_stands_alone(grid_report: tuple[Path, str]) -> None:
    text = (grid_report[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    sources = [value for _, attributes in page.tags for name in ("src", "href") if (value := attributes.get(name))]
    assert sources
    assert all(value.startswith(("data:image/svg+xml;base64,", "#")) for value in sources)
    assert not re.search(r"url\(|@import|<link", text)
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {value[1:] for value in sources if value.startswith("#")} <= anchors
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert "the disk is full" in text
    assert "deftx run -m experiment=demo rank=4,energy:0.9,none density=0.05,0.1 seed=0,1" in text
    assert "a" * 40 in text  # the commit


def test_nothing_that_a_result_says_can_run_in_the_page(report: Report, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    record = {
        "study": bad,
        "notes": [tracking.Remark(bad, bad, (bad,))],
        "provenance": {"versions": {bad: bad}, "python": bad},
        "languages": {"ace": {"name": bad}},
        "fingerprints": {"base": "b", bad: bad},
    }
    write_run(tmp_path / "runs" / "0", conditions={"ltsft": 0.5, bad: 0.6}, record=record, **{bad: bad, "task": bad})
    write_sweep(tmp_path / "runs", [([f"x={bad}"], "failed"), ([bad], "done")])
    outcome = report(tmp_path / "runs", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert all(path.resolve().is_relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*"))


def test_results_copied_from_elsewhere_give_the_same_bytes(
    report: Report, grid: Path, grid_report: tuple[Path, str], tmp_path: Path
) -> None:
    first, _ = grid_report
    shutil.copytree(grid, tmp_path / "copied" / "grid")
    assert report(tmp_path / "copied" / "grid", "--out", tmp_path / "out").status == 0
    names = files(first)
    assert names == files(tmp_path / "out")
    for name in names - {"report.html", "report.json"}:  # these hold the time
        assert (first / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_report_lies_in_the_first_folder_and_is_not_read_again(report: Report, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", conditions=BOTH)
    for _ in range(2):
        outcome = report(tmp_path / "sweep")
        assert outcome.status == 0, outcome.err
        assert "1 run with scores" in outcome.words
        write_run(tmp_path / "sweep" / "report" / "kept", conditions=BOTH, seed=1)  # whatever lies in a report
    assert (tmp_path / "sweep" / "report" / "report.html").is_file()
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "report"]


def test_a_folder_given_twice_is_read_once(report: Report, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", conditions=BOTH)
    outcome = report(tmp_path / "sweep", tmp_path / "sweep" / "0", "--out", tmp_path / "out")
    assert "1 run with scores" in outcome.words


def test_a_launch_that_was_repeated_counts_once(report: Report, tmp_path: Path) -> None:
    for launch in ("first", "second"):
        for seed in (0, 1):
            write_run(tmp_path / launch / str(seed), conditions=BOTH, seed=seed)
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert "2 results repeat others (same settings, seed and predictions) and count once" in outcome.words
    assert "2 runs with scores" in outcome.words


def test_a_failure_that_a_later_launch_made_up_for(report: Report, tmp_path: Path) -> None:
    jobs = [(["seed=0"], "done"), (["seed=1"], "failed"), (["seed=2"], "waiting")]
    write_run(tmp_path / "first" / "0", conditions=BOTH)
    write_sweep(tmp_path / "first", jobs)
    for seed in (0, 1):
        write_run(tmp_path / "second" / str(seed), conditions=BOTH, seed=seed)
    write_sweep(tmp_path / "second", [(["seed=0"], "cached"), (["seed=1"], "done"), (["seed=2"], "waiting")])
    outcome = report(tmp_path, "--out", tmp_path / "out")
    name = tmp_path.name
    assert f"{name}/first/1 (seed=1): the disk is full; finished in another launch: {name}/second/1" in outcome.words
    assert f"missing: {name}/second/2 (seed=2): not started when the sweep stopped" in outcome.words
    assert "2 jobs have no result here" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_failed_runs_keep_their_scores_to_themselves(report: Report, tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH)
    failure = {"status": "failed", "error": {"type": "DeftxError", "message": "no text", "traceback": None}}
    write_run(tmp_path / "1", conditions=BOTH, seed=1, record=failure)
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert "one seed (0)" in outcome.words
    assert f"failed: {tmp_path.name}/1: no text" in outcome.words


def test_only_failed_runs_are_an_error_that_says_why(report: Report, tmp_path: Path) -> None:
    failure = {"status": "failed", "metrics": [], "error": {"type": "ValueError", "message": "boom", "traceback": "x"}}
    write_run(tmp_path / "runs" / "0", record=failure)
    outcome = report(tmp_path / "runs", "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "failed: runs/0: ValueError: boom" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_jobs_without_scores_are_no_error(report: Report, tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH)
    write_run(tmp_path / "stage", record={"job_type": "stage", "metrics": []}, with_predictions=False)
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert outcome.status == 0
    assert "1 run with scores, 1 without" in outcome.words


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema_version": 2, "study"', "not a result of deftx"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 2}', "not a result of deftx"),
        ("[]", "not a result of deftx"),
        ("\x00", "not a result of deftx"),
    ],
    ids=["cut off", "newer", "empty", "a list", "bytes"],
)
def test_a_damaged_result_is_listed_and_not_fatal(report: Report, tmp_path: Path, content: str, said: str) -> None:
    write_run(tmp_path / "good", conditions=BOTH)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text(content)
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert f"unreadable: {tmp_path.name}/bad" in outcome.words
    assert said in outcome.words


def test_results_of_older_schemas_are_read(report: Report, tmp_path: Path) -> None:
    """As runs wrote them (``tests/legacy``), without predictions and diagnostics."""
    for path in (Path(__file__).parents[1] / "legacy").glob("*.json"):
        (tmp_path / path.stem).mkdir()
        shutil.copy(path, tmp_path / path.stem / ("sweep.json" if path.stem == "sweep" else "result.json"))
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "9 runs with scores, 1 without" in outcome.words
    assert "unreadable" not in outcome.words
    assert "in some cells one class is predicted throughout" in outcome.words
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "rank=2,energy:0.9,none density=0.1,0.3" in page


def test_nothing_reads_a_name(report: Report, tmp_path: Path) -> None:
    """Other names, in results, diagnostics and sweeps, and other sentences of remarks: the same tables and plots."""
    import pandas as pd

    conditions = {"no_language_sft": 0.3, **BOTH}
    for folder, renamed in (("told", False), ("renamed", True)):
        for seed in (0, 1):
            place = tmp_path / folder / "sweep" / str(seed)
            text = "nothing was learnt" if renamed else "one class is predicted throughout"
            record = {"notes": [tracking.Remark("constant_predictions", text, ("ace deftx",))]}
            known = {"task.source": "ace", "source.rank": "31", "record": record}
            write_run(place, conditions=conditions, rank="4", seed=seed, diagnostics=True, **known)  # type: ignore[arg-type]
            if renamed:
                content = json.loads((place / "result.json").read_text())
                for number, sft in enumerate(content["sfts"]):
                    sft["name"] = f"language θ⁰+ ltsft rank={number}"
                (place / "result.json").write_text(json.dumps(content))
                frame = pd.read_parquet(place / "diagnostics.parquet")
                tracking.write_diagnostics(place, frame.assign(sft="task on θ⁰+ace", other="language ace"))
        write_sweep(tmp_path / folder / "sweep", [(["seed=0"], "done"), (["seed=1"], "done")])
        if renamed:
            content = json.loads((tmp_path / folder / "sweep" / "sweep.json").read_text())
            for job in content["jobs"]:
                job["swept"] = [f"job {job['number']}"]
            (tmp_path / folder / "sweep" / "sweep.json").write_text(json.dumps(content))
        outcome = report(tmp_path / folder / "sweep", "--out", tmp_path / f"out-{folder}")
        assert outcome.status == 0, outcome.err
        assert f"in some cells {text} (every run)" in outcome.words
    names = files(tmp_path / "out-told")
    assert names == files(tmp_path / "out-renamed")
    assert "plots/demo-nusax-test-tiny-overlap.svg" in names
    for name in names - {"report.html", "report.json"}:
        assert (tmp_path / "out-told" / name).read_bytes() == (tmp_path / "out-renamed" / name).read_bytes(), name
    assert "seed=0,1" in (tmp_path / "out-renamed" / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_data_was_read_and_what_stages_ran_under(report: Report, tmp_path: Path) -> None:
    read = [
        tracking.DataRead(what="train", language="ind", digest="d" * 64, hub="nusax", config="ind", revision="c0ffee"),
        tracking.DataRead(what="text", language="ace", digest="e" * 64, path="text/<ace>.txt"),
    ]
    under = [tracking.Provenance({"torch": version}, 2, "cpu", {"full": 1}) for version in ("2.8", "2.9")]
    known = {"record": {"provenances": under}, "data.read": tracking.data_setting(read)}
    write_run(tmp_path / "runs" / "0", conditions=BOTH, **known)  # type: ignore[arg-type]
    assert report(tmp_path / "runs", "--out", tmp_path / "out").status == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"<td>train ind</td><td>nusax, ind, c0ffee</td><td>{'d' * 12}</td>" in text
    assert "<td>text ace</td><td>text/&lt;ace&gt;.txt</td>" in text
    assert "data.read" not in text
    assert "<td>torch, of its stages</td><td>2.8 (1 runs) · 2.9 (1 runs)</td><td>differs</td>" in text
    assert "<td>threads, of its stages</td><td>2</td><td></td>" in text


@pytest.mark.parametrize("damage", ["absent", "garbage", "no columns"])
def test_scores_stay_without_their_predictions(report: Report, tmp_path: Path, damage: str) -> None:
    import pandas as pd

    write_run(tmp_path / "0", conditions=BOTH, diagnostics=True)
    for name in ("predictions.parquet", "diagnostics.parquet"):
        path = tmp_path / "0" / name
        if damage == "absent":
            path.unlink()
        elif damage == "garbage":
            path.write_bytes(b"PAR1 and no more")
        else:
            pd.DataFrame({"x": [1]}).to_parquet(path)
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "no intervals for its scores" in outcome.words
    assert "Plots left out" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_damaged_sweep_is_listed(report: Report, tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH)
    (tmp_path / "sweep.json").write_text("{")
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert outcome.status == 0
    assert f"unreadable: {tmp_path.name}" in outcome.words


def test_controls_are_shown_on_request(tmp_path: Path, report: Report) -> None:
    write_run(tmp_path / "runs", conditions={"no_language_sft": 0.8, **BOTH})
    without = report(tmp_path / "runs", "--out", tmp_path / "a")
    shown = report(tmp_path / "runs", "--out", tmp_path / "b", "--controls")
    assert "All conditions" not in without.words
    assert "All conditions" in shown.words
    for name in ("a", "b"):
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert page.index("Scores: ") < page.index("All conditions")
        assert len(list((tmp_path / name / "tables").glob("*-main.tex"))) == 1


def test_mixed_tasks_are_separate(report: Report, tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH)
    write_run(tmp_path / "1", conditions=BOTH, task="xnli", metric="accuracy")
    outcome = report(tmp_path, "--out", tmp_path / "out")
    assert "Scores: demo · nusax · test · tiny · macro-F1" in outcome.words
    assert "Scores: demo · xnli · test · tiny · accuracy" in outcome.words
    assert len(list((tmp_path / "out" / "tables").glob("*-scores.md"))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no folder"),
        (["nowhere"], "nowhere: no such folder"),
        (["nowhere", "neither"], "neither: no such folder"),
        (["file"], "file: not a folder"),
        (["empty"], "no result.json below empty"),
        (["runs", "--baseline", "ltsf"], "did you mean 'ltsft'?; available: ltsft, deftx"),
        (["runs", "--metric", "bleu"], "--metric bleu: no result has it; available: accuracy, macro_f1"),
        (["runs", "--confidence", "95"], "--confidence 95: must lie in [0.5, 1)"),
        (["runs", "--samples", "many"], "invalid int value: 'many'"),
        (["runs", "--samples", "1"], "--samples 1: must lie in [100, 1000000]"),
        (["runs", "--seed", "-1"], "--seed -1: must be 0 or more"),
        (["runs", "--colour"], "deftx report --help"),
        (["runs", "--out", "runs"], "is not a report of deftx, and stays as it is"),
        (["runs", "--out", "file"], "file is a file"),
        (["runs", "--out", "file/below"], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    from deftx.cli import main

    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "0", conditions=BOTH)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert said in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "runs"]


def test_help_names_every_option(report: Report) -> None:
    outcome = report("--help")
    assert outcome.status == 0
    assert all(name in outcome.out for name in ("--out", "--baseline", "--metric", "--samples", "--confidence"))


def test_a_report_that_fails_leaves_the_old_one(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deftx.report import page

    write_run(tmp_path / "runs" / "0", conditions=BOTH)
    assert report(tmp_path / "runs", "--out", tmp_path / "out").status == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "page", full)
    outcome = report(tmp_path / "runs", "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "No space left on device" in outcome.err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_a_kill_leaves_no_half_report(report: Report, grid: Path, tmp_path: Path) -> None:
    """Killed while it draws: no report in its place; the next one works, and clears what was left."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deftx", "report", str(grid), "--out", str(out), "--samples", "100"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*.tmp/plots/*.svg")) and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before a plot was seen"
            time.sleep(0.01)
        assert list(tmp_path.glob(".out.*.tmp/plots/*.svg"))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.*.tmp"))) == 1
    write_run(tmp_path / "runs" / "0", conditions=BOTH)
    assert report(tmp_path / "runs", "--out", out).status == 0
    assert (out / "report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_a_report_killed_between_the_renames_is_put_back(tmp_path: Path) -> None:
    from deftx.report.publish import publish

    old = tmp_path / ".out.otherhst.1234.00.old"
    old.mkdir()
    (old / "report.json").write_text('{"kind": "deftx report"}')
    os.utime(old, (0, 0))
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path / "out", lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert (tmp_path / "out" / "report.json").is_file()
