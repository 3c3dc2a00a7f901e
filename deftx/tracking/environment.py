"""Where numbers come from: code, versions, the kind of machine, memory."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any

__all__ = ["provenance"]


_PACKAGES = (
    "deftx",
    "torch",
    "pytorch-lightning",
    "torchmetrics",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "pandas",
    "hydra-core",
    "wandb",
)


def provenance(folder: Path | None = None, *, gpu: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Say where numbers come from: code, versions and the kind of machine. No host or user names.

    Args:
        folder: the working directory whose git checkout is recorded; default: the current one.
        gpu: name of the device used, if any (this module does not ask torch).
        threads: how many threads torch was told to use; None: torch's own number when it is loaded, else ``cpus``.

    Returns:
        Plain values: ``git`` (``deftx`` and ``working_directory``, each ``{commit, dirty}``, or None outside
        of a checkout), ``versions`` (installed packages), ``python``, ``platform``, ``machine``, ``cpu``,
        ``cpus`` (usable ones), ``threads``, ``gpu``.
    """
    package = Path(__file__).parent.parent
    torch: Any = sys.modules.get("torch")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "git": {
            "deftx": _git(package) if _git_output(package, "ls-files", "errors.py") else None,
            "working_directory": _git(Path(folder or Path.cwd())),
        },
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": cpus,
        "threads": threads or (torch.get_num_threads() if torch is not None else cpus),
        "gpu": gpu,
    }


@functools.cache
def _git(folder: Path) -> dict[str, Any] | None:
    commit = _git_output(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_git_output(folder, "status", "--porcelain", "-uno"))}


def _git_output(folder: Path, *arguments: str) -> str:
    import subprocess

    # Inside a git hook, GIT_DIR and its like would point at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


@functools.cache
def _versions() -> dict[str, str]:
    from importlib import metadata

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@functools.cache
def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
