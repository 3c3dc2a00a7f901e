"""The import rule of the architecture: rooms know only those below them, nothing is a circle, settings stay light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deftx"
# Ground, too: a room's settings, the table of all of them, and that of methods. Every room may know what another can be
# asked for.
SETTINGS = {
    "settings",
    "search",
    "methods.table",
    *(f"{room}.settings" for room in ("core", "data", "launch", "methods", "tracking", "training")),
}
GROUND = {
    "atomic",
    "errors",
    "folders",
    "heartbeat",
    "knobs",
    "memory",
    "processes",
    "seeds",
    "signals",
    "streams",
    "units",
}
ROOMS = {
    "core": set(),
    "data": set(),
    "cache": set(),
    "plots": set(),
    "tracking": {"plots"},
    "training": {"core"},
    "methods": {"training", "core"},
    "stages": {"methods", "training", "data", "core", "cache", "tracking"},
    # The two that know Hydra; the rooms' light settings are what config registers.
    "config": {"stages", "methods", "training", "data", "core", "tracking", "launch"},
    "launch": set(),
    "jobs": {"config", "stages", "tracking"},
    "sweeps": {"jobs", "launch", "stages", "cache", "config", "tracking"},
    "help": {"config"},
    "report": {"plots", "tracking"},
    "dashboard": {"tracking"},
    "status": {"tracking"},
    "cli": {
        "stages",
        "config",
        "help",
        "cache",
        "tracking",
        "jobs",
        "launch",
        "sweeps",
        "report",
        "dashboard",
        "status",
    },
}


def imports_of(path: Path) -> set[str]:
    """Modules a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which these tests do not follow"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & set(MODULES)
            found |= modules
            if names - modules:
                found |= {str(node.module)} if node.module != "deftx" else names - modules
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first name repeated at the end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    allowed = {f"deftx.{name}" for name in ROOMS[room] | {room, "__version__"} | GROUND}
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files_of(room)
        for name in imports_of(path)
        if name.startswith("deftx.") and ".".join(name.split(".")[:2]) not in allowed
        if name.removeprefix("deftx.") not in SETTINGS
    }
    assert not wrong


@pytest.mark.parametrize(
    ("modules", "known"), [(GROUND, GROUND), (SETTINGS, SETTINGS | GROUND)], ids=["ground", "settings"]
)
def test_the_ground_stands_on_itself_and_the_standard_library(modules: set[str], known: set[str]) -> None:
    allowed = {f"deftx.{name}" for name in known} | set(sys.stdlib_module_names)
    wrong = {
        f"{module} imports {name}"
        for module in modules
        for name in imports_of(MODULES[f"deftx.{module}"])
        if name not in allowed and name.split(".")[0] not in allowed
    }
    assert not wrong


def test_the_rooms_are_no_circle() -> None:
    assert not circle(ROOMS)


def test_the_files_are_no_circle() -> None:
    arrows = {name: imports_of(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    assert not circle(arrows)


def test_every_module_belongs_to_a_room() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert names - set(ROOMS) == {"__init__", "__main__", "settings", "search"} | GROUND


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
        "deftx.settings",
        "deftx.stages.settings",
        "deftx.data.settings",
        "deftx.training.model_folder",
        "deftx.training.shapes",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "pandas", "wandb", "matplotlib"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
