"""Jobs on SLURM, or in processes of this machine, through submitit.

Jobs of one batch are one array. A job that meets its time limit or is preempted is put back into the queue and goes on
where it stopped: finished stages are in the cache, an unfinished phase resumes from its last checkpoint.

How a job ended is asked of ``sacct``; where the cluster keeps no accounts, of ``squeue``: without either, submitit
would wait for a killed job for ever.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deftx.errors import DeftxError
from deftx.launch.batch import TaskBatch, TaskFailure
from deftx.launch.settings import LauncherSettings

_LOOK_SECONDS = {"slurm": 5.0, "local": 0.5}


class Requeued:
    """A task that may be put back into the queue; submitit pickles it and calls it on the node."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __call__(self, task: Any) -> Any:
        """Run the task."""
        return self.work(task)

    def checkpoint(self, task: Any) -> Any:
        """Answer submitit's question before a time limit or preemption: the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Requeued(self.work), task)


def run_all(settings: LauncherSettings, batch: TaskBatch) -> None:
    """See :func:`deftx.launch.run_all`."""
    executor = _executor(settings, batch.folder / "submitit")
    # SLURM holds an array to its limit itself; the executor of this machine would start everything at once.
    limit = len(batch.tasks) if settings.cluster == "slurm" else settings.workers or 1
    waiting, jobs = list(range(len(batch.tasks))), dict[int, Any]()
    try:
        while waiting or jobs:
            room = limit - len(jobs)
            now, waiting = waiting[:room], waiting[room:]
            if now:
                jobs |= dict(zip(now, _submit(executor, batch.work, [batch.tasks[n] for n in now]), strict=True))
                for number in now:
                    batch.began(number)
            # One question to the cluster a round, about all jobs.
            over = [
                number for position, (number, job) in enumerate(jobs.items()) if job.done(force_check=position == 0)
            ]
            for number in over:
                batch.ended(number, _answer(jobs.pop(number)))
            if not over:
                time.sleep(_LOOK_SECONDS[settings.cluster])
    finally:
        for job in jobs.values():
            job.cancel(check=False)


def _executor(settings: LauncherSettings, folder: Path) -> Any:
    import submitit

    if settings.cluster == "slurm":
        _without_accounts()
    if settings.cluster == "local":
        # On one machine a result that is not there now does not come; on a shared file system it may be seconds late.
        submitit.Job._results_timeout_s = 2
    try:
        executor = submitit.AutoExecutor(
            folder=folder, cluster=settings.cluster, slurm_max_num_timeout=settings.requeues
        )
    except (RuntimeError, ValueError) as error:
        raise DeftxError(
            f"launcher.cluster={settings.cluster}: {error}; is sbatch on the PATH? launcher=joblib runs jobs on this "
            "machine"
        ) from error
    parameters: dict[str, Any] = {
        "name": "deftx",
        "timeout_min": settings.timeout_min,
        "cpus_per_task": settings.cpus,
        "tasks_per_node": 1,
        "nodes": 1,
        "slurm_array_parallelism": settings.workers or 256,
        "slurm_setup": list(settings.setup) or None,
        "slurm_additional_parameters": dict(settings.additional) or None,
        **{f"slurm_{name}": getattr(settings, name) for name in ("partition", "account", "qos", "constraint")},
        "gpus_per_node": settings.gpus or None,
        "mem_gb": settings.memory_gb,
    }
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    return executor


def _without_accounts() -> None:
    """Look jobs up in the queue where ``sacct`` does not answer; it knows them for some minutes after their end."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    try:
        subprocess.run(["sacct", "-X", "-n", "-j", "1"], capture_output=True, timeout=60, check=True)
        return
    except (OSError, subprocess.SubprocessError):
        pass

    class QueueWatcher(SlurmInfoWatcher):
        """Asks ``squeue`` for the states of jobs."""

        def __init__(self, delay_s: int) -> None:
            super().__init__(delay_s=delay_s)
            self.seen: set[str] = set()

        def _make_command(self) -> list[str] | None:
            job_ids = sorted({name.split("_")[0] for name in self._registered - self._finished})
            if not job_ids:
                return None
            return ["squeue", "-r", "-a", "-h", "-t", "all", "-o", "%i|%T|%N", "-j", ",".join(job_ids)]

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            """States by job id, from lines ``id|state|nodes``."""
            text = string if isinstance(string, str) else string.decode()
            rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
            states = {name: {"JobID": name, "State": state, "NodeList": nodes} for name, state, nodes in rows}
            # The queue forgets a job some minutes after its end: one that was there and is not any more has ended.
            forgotten = {name: {"JobID": name, "State": "FORGOTTEN"} for name in self.seen - states.keys()}
            self.seen |= states.keys()
            return states | forgotten

    SlurmJob.watcher = QueueWatcher(delay_s=30)


def _submit(executor: Any, work: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    from submitit.core.utils import FailedJobError

    try:
        return list(executor.map_array(Requeued(work), tasks))
    except (FailedJobError, OSError) as error:  # what sbatch said: a partition, an option or a limit it refuses
        raise DeftxError(f"the jobs were not accepted: {error}") from error


def _answer(job: Any) -> Any:
    """Return what a job gave, or why it gave nothing; submitit raises for a job that failed, died or was cancelled."""
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result()
    except UncompletedJobError:
        # It wrote no result: killed, out of memory, cancelled. What it said last says most.
        reason = _last_line(job.stderr()) or "it ended without a message (killed, or out of memory?)"
    except Exception as error:  # noqa: BLE001 - an answer about one job must not end the others
        reason = _last_line(str(error)) or type(error).__name__
    return TaskFailure(f"{job.state.lower()}: {reason}; its log: {job.paths.stderr}")


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip(" -")]
    return lines[-1] if lines else ""
