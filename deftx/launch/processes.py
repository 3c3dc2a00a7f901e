"""Jobs in processes of this machine, through joblib's loky executor; where there are several GPUs, one a worker.

A process that dies breaks loky's pool, and with it every task under way. Those are run again in a new pool, and a task
that was under way in two broken pools alone in a third, so that the one which kills its process is known by name. What
the others had computed is in the stage cache.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deftx.launch.batch import TaskBatch, TaskFailure, TaskStop, failure_of
from deftx.launch.settings import LauncherSettings

_LOOK_SECONDS = 2.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TOGETHER = 2  # how often a task may be under way when a pool breaks before it is run alone
_claims: list[FileLock] = []  # in a worker: what it holds until it ends


def run_all(settings: LauncherSettings, batch: TaskBatch) -> None:
    """See :func:`deftx.launch.run_all`."""
    workers = min(settings.workers or 1, len(batch.tasks))
    waiting, broken = list(range(len(batch.tasks))), Counter[int]()
    while waiting:
        alone = [number for number in waiting if broken[number] >= _TOGETHER][:1]
        done, died = _one_pool(1 if alone else workers, batch, alone or waiting)
        if alone and died:
            batch.ended(alone[0], TaskFailure("its process died three times (killed, or out of memory?)"))
            done = alone
        waiting = [number for number in waiting if number not in done]
        broken.update(died)


def _one_pool(workers: int, batch: TaskBatch, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Run tasks in one pool until all ended or the pool breaks; returns those that ended, and those lost with it."""
    from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

    done: list[int] = []
    waiting, lost = list(numbers), list[int]()
    with tempfile.TemporaryDirectory() as claims:
        pool = ProcessPoolExecutor(
            max_workers=workers, initializer=_begin, initargs=(claims, workers, visible_gpus(), os.getpid())
        )
        futures: dict[Future[Any], int] = {}
        try:
            while (waiting or futures) and not lost:
                # No more than there are workers: of a pool that breaks, only what was really under way is suspected.
                while waiting and len(futures) < workers:
                    number = waiting.pop(0)
                    futures[pool.submit(_answer, batch.work, batch.tasks[number])] = number
                    batch.began(number)
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    number = futures.pop(future)
                    try:
                        answer = future.result()
                    except BrokenProcessPool:
                        lost.append(number)
                        continue
                    except Exception as error:  # noqa: BLE001 - whatever it is, it is this task's end
                        answer = failure_of(error)
                    done.append(number)
                    batch.ended(number, answer)
        except BrokenProcessPool:  # it broke between two tasks
            pass
        except BaseException:
            pool.shutdown(wait=True, kill_workers=True)
            raise
        pool.shutdown(wait=True)
    return done, lost + list(futures.values())


def _answer(work: Callable[[Any], Any], task: Any) -> Any:
    """In a worker: a signal that ends one job (SIGTERM becomes KeyboardInterrupt in a fit) must not end the sweep."""
    try:
        return work(task)
    except (KeyboardInterrupt, SystemExit) as stop:
        return TaskStop(f"its process was told to stop ({type(stop).__name__})")


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, without loading torch; empty where there are none."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def _begin(claims: str, workers: int, gpus: Sequence[str], parent: int) -> None:
    """In a worker, before anything heavy is loaded: its share of the cores, and its GPU."""
    import logging

    logging.captureWarnings(True)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One of them set is a choice: what follows from it here follows from it with launcher=basic, too.
    if not any(name in os.environ for name in _THREADS):
        os.environ.update(dict.fromkeys(_THREADS, str(max(1, cores // workers))))
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[_claim(Path(claims)) % len(gpus)]


def _end_with(parent: int) -> None:
    """End when the sweep's process has died: nobody would get what is computed here, and cores are scarce.

    At any moment, as by SIGKILL: the stage cache keeps what is finished, a phase its last state.
    """
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _claim(folder: Path) -> int:
    """Return the first number that no living worker of the pool has; loky replaces workers that grew too large.

    The worker holds its number by a lock, which the system releases when the worker dies.
    """
    number = 0
    while True:
        lock = FileLock(folder / str(number), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            number += 1
        else:
            _claims.append(lock)
            return number
