"""What a result stands on: made again with other bits, it is not used; computed with something else, it is said."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_study import FEW, Command, own_rows

from deftx.errors import DeftxError


def outcomes(result: dict[str, Any], what: str) -> dict[str, str]:
    return {stage["kind"]: stage["outcome"] for stage in result["stages"] if what in stage["label"]}


def test_a_stage_made_again_with_other_bits_never_meets_evaluations_of_the_old_one(
    deftx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = deftx("run", *FEW, "rank=2", cache=cache)
    assert first.status == 0, first.err
    (entry,) = (
        path.parent
        for path in cache.glob("full/*/manifest.json")
        if json.loads(path.read_text())["label"] == "language qba"
    )
    # Another rank needs the full phase that was pruned. Made again on another machine it has other bits.
    shutil.rmtree(entry)
    with monkeypatch.context() as other_machine:
        other_machine.setattr("deftx.stages.learn.stage_seed", lambda *names: 5)
        assert deftx("run", *FEW, "rank=3", cache=cache).status == 0
    assert entry.is_dir()
    # The finished run of the first time is no answer to a sweep either.
    assert "finished before" not in deftx("run", *FEW, "rank=2", "--dry-run", cache=cache).out
    again = deftx("run", *FEW, "rank=2", cache=cache)
    assert again.status == 0, again.err
    assert outcomes(again.result(), "language qba") == {
        "full": "cached",
        "decompose": "cached",
        "select": "computed",
        "sparse": "computed",
    }
    assert outcomes(again.result(), "qba deftx")["evaluate"] == "computed"
    assert outcomes(again.result(), "task") == {"sparse": "cached"}
    assert "made again with other bits" in again.err
    assert "this very run was finished before" in deftx("run", *FEW, "rank=2", "--dry-run", cache=cache).out
    sfts = {
        run.result()["sfts"][1]["sha256"] for run in (first, again) if run.result()["sfts"][1]["languages"] == ["qba"]
    }
    assert len(sfts) == 2


@pytest.mark.soak
def test_results_of_other_threads_are_used_and_said(deftx: Command, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    alone = deftx("run", *FEW, "trainer.threads=1", "source=shared", cache=cache)
    assert [item["threads"] for item in alone.result()["provenances"]] == [1]
    assert not any(note["kind"] == "provenances_differ" for note in alone.result()["notes"])
    mixed = deftx("run", *FEW, "trainer.threads=2", "rank=3", "source=shared", cache=cache)
    assert mixed.status == 0, mixed.err
    found = {item["threads"]: item["stages"] for item in mixed.result()["provenances"]}
    assert found[1]["pretrain"] == 1, "also what was not asked for counts: the result stands on it"
    assert found[2] == {"select": 2, "sparse": 2, "evaluate": 1}
    assert found[1]["full"] == 3
    (note,) = [note for note in mixed.result()["notes"] if note["kind"] == "provenances_differ"]
    assert note["about"] == ["threads 1 / 2"]
    assert mixed.out.count("threads 1 / 2") == 1
    # Everything from the cache: the result says what made it, not only what this process would have used.
    again = deftx("run", *FEW, "trainer.threads=1", "rank=3", "source=shared", cache=cache)
    assert {stage["outcome"] for stage in again.result()["stages"]} == {"cached"}
    assert again.result()["provenances"] == mixed.result()["provenances"]


@pytest.mark.soak
def test_results_on_different_bits_of_one_result_are_made_again(deftx: Command, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    few = [*FEW, "compare=[ltsft]"]
    first = deftx("run", *few, cache=cache)
    assert first.status == 0, first.err
    # The full phase that two SFTs share was pruned, and one of them says that it was made from another one.
    for kind in ("full", "decompose", "select", "run"):
        shutil.rmtree(cache / kind)
    (manifest,) = (
        path
        for path in cache.glob("sparse/*/manifest.json")
        if "language qba ltsft" in json.loads(path.read_text())["label"]
    )
    content = json.loads(manifest.read_text())
    for ancestor in content["ancestors"]:
        if ancestor["kind"] == "full":
            ancestor["digest"] = "0" * 64
    manifest.write_text(json.dumps(content))
    again = deftx("run", *few, cache=cache)
    assert again.status == 0, again.err
    assert "than what it meets" in again.err
    # Made again on this machine, it has the bits that it had.
    assert [sft["sha256"] for sft in again.result()["sfts"]] == [sft["sha256"] for sft in first.result()["sfts"]]
    assert again.result()["metrics"] == first.result()["metrics"]


# --------------------------------------------------------------------------------------- files that change meanwhile


def own(tmp_path: Path, shared_cache: Path) -> tuple[Path, list[str]]:
    data = own_rows(tmp_path, shared_cache)
    return data, ["task=sentiment", "task.source=qaa", f"data.root={data}", "data.leak_threshold=2", *FEW]


def append(path: Path) -> None:
    """A row more: the last one again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]), encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "reader", "said"),
    [
        ("sentiment/qba/test.tsv", "deftx.data.tasks.load_test", "the test set of qba"),
        ("sentiment/qaa/train.tsv", "deftx.data.tasks.load_train", "sentiment (train) of qaa"),
        ("unlabelled/qba.txt", "deftx.stages.inputs.build_corpus", "text of qba"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    deftx: Command,
    shared_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    reader: str,
    said: str,
) -> None:
    deftx("run", *FEW)
    data, overrides = own(tmp_path, shared_cache)
    module, _, name = reader.rpartition(".")
    read = getattr(importlib.import_module(module), name)

    def changing(*given: Any, **more: Any) -> Any:
        found = read(*given, **more)
        append(data / what)
        return found

    monkeypatch.setattr(reader, changing)
    outcome = deftx("run", *overrides, cache=tmp_path / "cache")
    assert outcome.status == 1
    assert f"{said} was changed after this command began" in outcome.err
    assert "Traceback" not in outcome.err
    kinds = {path.parent.name for path in (tmp_path / "cache").glob("*/*/manifest.json")}
    assert "evaluate" not in kinds


@pytest.mark.soak
def test_what_was_read_is_told_as_it_was(
    deftx: Command, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deftx.training import fit

    deftx("run", *FEW)
    data, overrides = own(tmp_path, shared_cache)
    usual = deftx("run", *overrides, cache=tmp_path / "cache")
    kept = {name: item.get("kept") for name, item in usual.result()["settings"]["data.read"].items()}
    assert {name for name, digest in kept.items() if digest} == {"train qaa", "text qaa", "text qba"}
    train = fit.fit_phase

    def meanwhile(*given: Any, **more: Any) -> Any:
        (data / "unlabelled" / "qba.txt").unlink(missing_ok=True)
        append(data / "sentiment" / "qba" / "test.tsv")
        return train(*given, **more)

    monkeypatch.setattr(fit, "fit_phase", meanwhile)
    outcome = deftx("run", *overrides, cache=tmp_path / "another cache")
    assert outcome.status == 0, outcome.err
    assert outcome.result()["settings"]["data.read"] == usual.result()["settings"]["data.read"]
    assert outcome.result()["metrics"] == usual.result()["metrics"]


def test_the_error_of_a_run_is_the_one_that_is_told(deftx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise DeftxError("the run's own reason")

    def worse(*_: Any) -> None:
        raise OSError("telling it failed, too")

    monkeypatch.setattr("deftx.stages.execute.StudyProgress.evaluate", wrong)
    monkeypatch.setattr("deftx.stages.study.fill", worse)
    outcome = deftx("run", *FEW)
    assert outcome.status == 1
    assert "the run's own reason" in outcome.err.splitlines()[-1]
    assert outcome.result()["error"]["message"] == "the run's own reason"
