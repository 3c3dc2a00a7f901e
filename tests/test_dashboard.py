"""``deftx dashboard``: the specification, its options, and the workspace that it becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deftx.cli import main
from deftx.dashboard import config_names, specification, summary_names


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["dashboard", *arguments])
    streams = capsys.readouterr()
    return int(stop.value.code or 0), streams.out, streams.err


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_the_specification_is_written_and_says_how_to_publish_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "--study", "rank ablation", "--language", "ace,min", "--metric=accuracy")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "dashboard: dashboard-rank-ablation.json",
        "publish it with: deftx dashboard --study 'rank ablation' --project deftx --entity TEAM --metric accuracy "
        "--language ace,min --publish",
    ]
    written = json.loads((tmp_path / "dashboard-rank-ablation.json").read_text())
    assert written == specification("rank ablation", metric="accuracy", languages=["ace", "min"])
    assert written["runs"]["group"] == "rank ablation"
    assert [section["title"] for section in written["sections"]] == [
        "Rank × sparsity",
        "Language × method",
        "Knobs",
        "Masks against score",
        "Cost against score",
        "Learning curves",
        "Pictures",
    ]
    assert {"diff/accuracy/mean", "diff/accuracy/ace", "diff/accuracy/min"} <= summary_names(written)
    assert {"rank", "density", "method", "seed"} <= config_names(written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --study"),
        (["--study", " "], "--study is empty"),
        (["--study"], "--study: expected one argument"),
        (["--study", "s", "--langage", "ace"], "did you mean '--language'?"),
        (["--study", "s", "--metric", "acuracy"], "it can be macro_f1, accuracy; did you mean 'accuracy'?"),
        (["--study", "s", "--project", "a/b"], "logger.project='a/b'"),
        (["--study", "s", "--out", "/dev/null/x"], "cannot write /dev/null/x: Not a directory"),
        (["--study", "s", "--publish"], "--publish needs --entity TEAM"),
        (["--study", "s", "more"], "unrecognized arguments: more"),
    ],
)
def test_bad_options_are_refused_with_one_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert err.startswith("deftx: error: ")
    assert err.count("\n") == 1


def test_publishing_without_the_extra_or_an_account_leaves_the_specification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "deftx.dashboard.workspace", raising=False)
    status, _, err = run(capsys, "--study", "s", "--entity", "team", "--publish")
    assert status == 1
    assert 'pip install "deftx[dashboard]", then deftx dashboard --study s' in err
    assert json.loads((tmp_path / "dashboard-s.json").read_text())["entity"] == "team"


def test_help_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "--publish" in out


def test_the_workspace_asks_for_what_the_specification_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a panel's own format is, each name stands in it."""
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    from deftx.dashboard.workspace import workspace_of

    spec = specification("study", entity="team", languages=["ace"])
    view = json.loads(workspace_of(spec)._to_model().model_dump_json(by_alias=True, exclude_none=True))
    section = view["spec"]["section"]
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "deftx", "deftx: study")
    assert [part["name"] for part in section["panelBankConfig"]["sections"][:7]] == [
        part["title"] for part in spec["sections"]
    ]
    text = json.dumps(section["panelBankConfig"])
    for name in summary_names(spec):
        assert name in text
    for name in config_names(spec):
        assert f"config:{name}.value" in text
    (filters,) = leaves(section["runSets"][0]["filters"], "value")
    assert filters == "study"
    # Deterministic but for the identifiers that the library draws.
    assert text.count("viewType") == sum(len(part["panels"]) for part in spec["sections"])

    import wandb

    monkeypatch.setattr(wandb, "login", lambda **_: False)
    status, _, err = run(capsys, "--study", "s", "--entity", "team", "--publish")
    assert status == 1
    assert "no W&B account on this machine" in err


def leaves(value: Any, key: str) -> list[Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for name, item in items:
        found += [item] if name == key and not isinstance(item, dict | list) else leaves(item, key)
    return found
