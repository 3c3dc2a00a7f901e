"""The command itself: help, versions, unknown commands, where the configuration is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from deftx import __version__
from deftx.cli import COMMANDS, main
from deftx.config import conf_dir
from deftx.settings import READS

REPOSITORY = Path(__file__).resolve().parent.parent
CONF = REPOSITORY / "conf"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    streams = capsys.readouterr()
    return int(stop.value.code or 0), streams.out, streams.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", READS)
def test_each_command_shows_its_knobs(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    shown = set(re.findall(r"^  (\w+): ", out, re.MULTILINE))
    assert shown <= set(READS[command])
    assert shown >= set(READS[command]) - set(READS["run"])
    assert ("rank" in shown) == (command in ("run", "sft"))
    assert "xlmr_base" in out
    if command != "run":
        own = {"sft": "kind:", "eval": "task_sft:", "pretrain": "out:"}[command]
        assert f"  {own}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"deftx {__version__}\n", "")


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "rum")
    assert status == 1
    assert "'rum'; did you mean 'run'?" in err


def test_help_does_not_import_anything_heavy() -> None:
    code = (
        "import sys; sys.argv = ['deftx', '--help']\n"
        "from deftx.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'hydra', 'omegaconf', 'numpy', 'pandas', 'transformers', 'wandb'}"
        " & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def test_the_whole_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "run", "experiment=nusax", "--cfg", "job")
    assert status == 0
    assert yaml.safe_load(out)["task"]["name"] == "nusax"


def test_the_checkouts_configuration_is_used_when_none_is_packaged() -> None:
    assert conf_dir() == CONF


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_each_file_opens_with_the_command_that_uses_it(path: Path) -> None:
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [line for line in comments if not line.startswith("@package")]
    assert commands[0].startswith("deftx ")


@pytest.mark.slow
def test_the_wheel_carries_the_configuration(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, cwd=REPOSITORY)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    shown = subprocess.run(
        [sys.executable, "-c", "import deftx.config as c; print(c.conf_dir())"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert Path(shown.stdout.strip()) == site / "deftx" / "conf"
    packaged = {path.relative_to(site / "deftx" / "conf") for path in (site / "deftx" / "conf").rglob("*.yaml")}
    assert packaged == {path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
