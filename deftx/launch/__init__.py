"""Where the jobs of a sweep run: here one after the other, in processes, on a cluster.

A launcher gets a function and its tasks, both picklable, and tells of every task how it ended: with the function's own
answer, or lost, which means that whatever ran it died (killed, out of memory, a node that failed). A lost task never
takes others with it. The libraries behind joblib, submitit and ray are imported when they are used; the last two are
extras.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from deftx.errors import DeftxError
from deftx.launch.batch import TaskBatch, TaskFailure, TaskStop, failure_of
from deftx.launch.settings import LauncherSettings

__all__ = ["LauncherSettings", "TaskFailure", "TaskStop", "check", "run_all"]

T = TypeVar("T")
R = TypeVar("R")

# Launchers whose jobs run in other processes -> their module, the library behind them, the extra that installs it.
_ELSEWHERE = {
    "joblib": ("processes", "joblib", ""),
    "submitit": ("cluster", "submitit", "slurm"),
    "ray": ("on_ray", "ray", "ray"),
}


def check(settings: LauncherSettings) -> None:
    """Refuse a launcher that does not work here, before anything is made for it.

    Raises:
        DeftxError: Its library or its cluster is missing; the message says what to install or to choose.
    """
    _, library, extra = _ELSEWHERE.get(settings.name, ("", "", ""))
    if library and importlib.util.find_spec(library) is None:
        raise DeftxError(f"launcher.name={settings.name} needs {library}: pip install 'deftx[{extra}]'")
    if settings.name == "submitit" and settings.cluster == "slurm":
        missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
        if missing:
            raise DeftxError(
                f"launcher.cluster=slurm: no {', '.join(missing)} on the PATH; launch from a login node of the "
                "cluster, or choose launcher=joblib, which runs jobs on this machine"
            )


def run_all(
    settings: LauncherSettings,
    work: Callable[[T], R],
    tasks: Sequence[T],
    ended: Callable[[int, R | TaskFailure], None],
    folder: Path,
    began: Callable[[int], None] = lambda number: None,
) -> None:
    """Run every task and return when all have ended.

    Args:
        settings: Where, and how many at a time.
        work: A module-level function; exceptions it raises make its task a lost one.
        tasks: Its arguments, picklable.
        ended: Called here, with a task's number and its answer, as each one ends.
        folder: For the launcher's own files (a cluster's logs).
        began: Called here, with a task's number, as it is given to what runs it (a process, a cluster's queue).

    Raises:
        DeftxError: The launcher does not work here (a library or a cluster is missing).
        KeyboardInterrupt: Interrupted; what it started has been stopped, but for jobs of a cluster's queue, which are
            cancelled.
    """
    if not tasks:
        return
    check(settings)
    batch = TaskBatch(work, tasks, ended, began, folder)
    if settings.name in _ELSEWHERE:
        importlib.import_module(f"deftx.launch.{_ELSEWHERE[settings.name][0]}").run_all(settings, batch)
    else:
        _one_by_one(batch)


def _one_by_one(batch: TaskBatch) -> None:
    for number, task in enumerate(batch.tasks):
        batch.began(number)
        try:
            answer = batch.work(task)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this task's end
            answer = failure_of(error)
        batch.ended(number, answer)
