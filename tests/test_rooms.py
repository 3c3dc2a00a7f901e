"""The import rule of the architecture: rooms know only the rooms below them, and settings stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deftx"
ROOMS = {
    "core": set(),
    "data": set(),
    "cache": set(),
    "tracking": set(),
    "training": {"core"},
    "stages": {"training", "data", "core", "cache", "tracking"},
    # The two that know Hydra; the rooms' light settings are what config registers.
    "config": {"stages", "training", "data", "core", "tracking", "launch"},
    "launch": set(),
    "jobs": {"config", "stages", "tracking"},
    "sweeps": {"jobs", "launch", "stages", "cache", "config", "tracking"},
    "help": {"config"},
    "report": {"tracking"},
    "dashboard": {"tracking"},
    "cli": {"stages", "config", "help", "cache", "tracking", "jobs", "launch", "sweeps", "report", "dashboard"},
}


def imports_of(path: Path) -> set[str]:
    """Modules a file imports anywhere, functions included; ``deftx.errors`` is everybody's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} if node.module != "deftx" else {f"deftx.{alias.name}" for alias in node.names}
    return found


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    allowed = ROOMS[room] | {room, "errors", "signals", "__version__"}
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files_of(room)
        for name in imports_of(path)
        if name.startswith("deftx.") and name.split(".")[1] not in allowed
    }
    assert not wrong


def test_every_module_belongs_to_a_room() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert names - set(ROOMS) == {"__init__", "__main__", "errors", "signals"}


def test_only_cli_and_config_know_hydra() -> None:
    knowing = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] in ("hydra", "omegaconf") for name in imports_of(path))
    }
    assert knowing == {"cli", "config"}


def test_core_needs_torch_and_safetensors_only() -> None:
    outside = {name.split(".")[0] for path in files_of("core") for name in imports_of(path)} - set(
        sys.stdlib_module_names
    )
    assert outside <= {"torch", "safetensors", "deftx"}


@pytest.mark.parametrize(
    "module",
    [
        "deftx",
        "deftx.cli",
        "deftx.cache",
        "deftx.tracking",
        "deftx.report.command",
        "deftx.core.folder",
        "deftx.dashboard",
        "deftx.stages.settings",
        "deftx.data.settings",
        "deftx.training.model_folder",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "pandas", "wandb", "matplotlib"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
