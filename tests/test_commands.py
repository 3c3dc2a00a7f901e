"""Every command that README, configuration files and help show composes and resolves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deftx.cli import COMMANDS, _parse, main
from deftx.config import check_command, hydra_session
from deftx.help import EXAMPLES
from deftx.settings import READS

REPOSITORY = Path(__file__).resolve().parent.parent


def shown() -> list[str]:
    """Command lines, continuation lines joined, trailing comments cut."""
    found = [example for examples in EXAMPLES.values() for example in examples]
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8").replace("\\\n", " ") for path in pages)
    found += [line.strip() for line in re.findall(r"^ *deftx [a-z]+ .*$", text, re.MULTILINE)]
    for path in sorted((REPOSITORY / "conf").rglob("*.yaml")):
        # The files of a kind of language open alike (tests/data/test_languages.py): one of each kind is resolved.
        if path.parent.name == "language" and path.stem not in {"ace", "quy", "eng", "qba"}:
            continue
        first = [line for line in path.read_text(encoding="utf-8").splitlines()[:2] if line.startswith("# deftx ")]
        assert first, f"{path} does not open with the command that uses it"
        found.append(first[0].removeprefix("# "))
    # Lines that differ in their comments are one command.
    return list({tuple(shlex.split(line, comments=True)): line for line in found}.values())


@pytest.mark.parametrize("line", shown())
def test_a_command_that_is_shown_resolves(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS
    if name not in READS:  # not Hydra's: its options are those of its help page
        with pytest.raises(SystemExit):
            main([name, "--help"])
        page = capsys.readouterr().out
        assert all(word in page for word in arguments if word.startswith("--"))
        return
    # README's own language is any that is there.
    arguments = ["language=ace" if item == "language=xyz" else item for item in arguments]
    if "--help" in arguments:
        return
    known, overrides = _parse(arguments)
    with hydra_session():
        assert check_command(name, overrides, multirun=known.multirun).jobs
