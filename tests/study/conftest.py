"""Fixtures that run the command line on the small study."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_study import GRID, Command, Outcome, small_for

from deftx.cli import main


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage cache for the tests that do not care where results come from."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def deftx(
    tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run the command line in this process: ``deftx("run", "rank=2")`` with the small study's overrides before it."""
    monkeypatch.chdir(tmp_path)
    number = iter(range(1000))

    def run(command: str, *arguments: str, small: bool = True, cache: Path | None = None) -> Outcome:
        folder = tmp_path / f"out{next(number)}"
        places = [f"paths.cache={cache or shared_cache}", f"paths.output={folder}", f"hydra.sweep.dir={folder}"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([command, *(small_for(command) if small else []), *places, *arguments])
        streams = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), streams.out, streams.err, folder)

    return run


@pytest.fixture
def model(deftx: Command, shared_cache: Path, tmp_path: Path) -> Path:
    """A copy of a model folder that ``deftx pretrain`` wrote on text of the user's own."""
    made = shared_cache.with_name("model")
    if not made.exists():
        text = shared_cache.with_name("text.txt")
        lines = (f"the {n} small cats saw {n * 7} large dogs near house number {n % 13}\n" for n in range(400))
        text.write_text("".join(lines))
        outcome = deftx("pretrain", f"text=[{text}]", f"out={made}")
        assert outcome.status == 0, outcome.err
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path]]:
    """Sweeps that ran for an earlier test of this process."""
    return {}


@pytest.fixture
def grid(
    deftx: Command, swept: dict[str, tuple[Outcome, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, Path]:
    """A finished sweep over two ranks, and the cache that it found empty. Read only."""
    if "grid" not in swept:
        cache = tmp_path_factory.mktemp("grid") / "cache"
        outcome = deftx("run", *GRID, cache=cache)
        assert outcome.status == 0, outcome.err
        swept["grid"] = outcome, cache
    return swept["grid"]


@pytest.fixture
def sfts(deftx: Command, shared_cache: Path, tmp_path: Path) -> Path:
    """A copy of a folder with a task SFT and a language SFT (qba) of the small study."""
    made = shared_cache.with_name("sfts")
    if not made.exists():
        assert deftx("sft", "kind=language", "language=qba", f"out={made / 'language'}").status == 0
        assert deftx("sft", "kind=task", f"out={made / 'task'}").status == 0
    return Path(shutil.copytree(made, tmp_path / "sfts"))
