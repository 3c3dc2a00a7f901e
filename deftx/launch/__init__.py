"""Where the jobs of a sweep run: here one after the other, in processes, on a cluster.

A launcher gets a function and its tasks, both picklable, and tells of every task how it ended: with the function's own
answer, or lost, which means that whatever ran it died (killed, out of memory, a node that failed). A lost task never
takes others with it. The libraries behind joblib, submitit and ray are imported when they are used; the last two are
extras.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deftx.launch.settings import LauncherSettings

__all__ = ["LauncherSettings", "Lost", "run_all"]

T = TypeVar("T")
R = TypeVar("R")


class Lost(str):
    """Why a task has no answer."""

    __slots__ = ()


def run_all(
    settings: LauncherSettings,
    work: Callable[[T], R],
    tasks: Sequence[T],
    ended: Callable[[int, R | Lost], None],
    folder: Path,
) -> None:
    """Run every task and return when all have ended.

    Args:
        settings: Where, and how many at a time.
        work: A module-level function; exceptions it raises make its task a lost one.
        tasks: Its arguments, picklable.
        ended: Called here, with a task's number and its answer, as each one ends.
        folder: For the launcher's own files (a cluster's logs).

    Raises:
        DeftxError: The launcher cannot be had (a library or a cluster is missing).
        KeyboardInterrupt: Interrupted; what it started has been stopped, but for jobs of a cluster's queue, which are
            cancelled.
    """
    if not tasks:
        return
    launcher: Callable[..., Any]
    if settings.name == "joblib":
        from deftx.launch.processes import run_all as launcher
    elif settings.name == "submitit":
        from deftx.launch.cluster import run_all as launcher
    elif settings.name == "ray":
        from deftx.launch.on_ray import run_all as launcher
    else:
        launcher = _one_by_one
    launcher(settings, work, tasks, ended, folder)


def _one_by_one(
    settings: LauncherSettings,
    work: Callable[[T], R],
    tasks: Sequence[T],
    ended: Callable[[int, R | Lost], None],
    folder: Path,
) -> None:
    for number, task in enumerate(tasks):
        ended(number, work(task))
