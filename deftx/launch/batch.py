"""What every launcher gets: a function, its tasks, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class TaskFailure(str):
    """Why a task has no answer."""

    __slots__ = ()


class TaskStop(TaskFailure):
    """Why a task was interrupted: it can go on."""

    __slots__ = ()


@dataclass(frozen=True)
class TaskBatch:
    """Tasks to run.

    Attributes:
        work: A module-level function; exceptions it raises make its task a lost one.
        tasks: Its arguments, picklable.
        ended: To call with a task's number and its answer, or a :class:`TaskFailure`, as each one ends.
        began: To call with a task's number as it is given to what runs it (a process, a cluster's queue).
        folder: For the launcher's own files (a cluster's logs).
    """

    work: Callable[[Any], Any]
    tasks: Sequence[Any]
    ended: Callable[[int, Any], None]
    began: Callable[[int], None]
    folder: Path


def failure_of(error: BaseException) -> TaskFailure:
    """Return the end of a task that raised."""
    return TaskFailure(f"{type(error).__name__}: {error}")
