"""Jobs on a Ray cluster, or on one that is started here."""

from __future__ import annotations

import logging
import os
from typing import Any

from deftx.errors import DeftxError
from deftx.launch.batch import TaskBatch, TaskFailure
from deftx.launch.settings import LauncherSettings


def run_all(settings: LauncherSettings, batch: TaskBatch) -> None:
    """See :func:`deftx.launch.run_all`."""
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(ray, settings)
    # A worker's death is told to ray as a lost task; it tries again this often before it tells us.
    remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=settings.requeues)(batch.work)
    waiting, running = list(range(len(batch.tasks))), dict[Any, int]()
    limit = settings.workers or len(batch.tasks)
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                number = waiting.pop(0)
                running[remote.remote(batch.tasks[number])] = number
                batch.began(number)
            for reference in ray.wait(list(running), num_returns=1)[0]:
                number = running.pop(reference)
                try:
                    answer = ray.get(reference)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is this task's end
                    lines = str(error).strip().splitlines() or ["no message"]
                    answer = TaskFailure(f"{type(error).__name__}: {lines[-1]}")
                batch.ended(number, answer)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _connect(ray: Any, settings: LauncherSettings) -> None:
    # What jobs print goes to their own logs; ray's news of itself is nobody's here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address=settings.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            include_dashboard=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DeftxError(f"launcher.address={settings.address}: {error}") from error
