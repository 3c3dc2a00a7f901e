"""One fit on several devices: a process for each, around the fit alone.

Lightning's own launcher would start the whole command again for every device, its stages and locks included. Here the
command stays one process. It hands the fit to a process for each device, as a copy; they train it with
DistributedDataParallel (nccl on GPUs, gloo on CPUs) and rank 0 leaves the result in the phase's folder, as any fit
does. A batch's ``normalizer`` makes the mean of the devices' gradients the gradient of the step
(:mod:`~deftx.data.module`).
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from deftx.errors import DeftxError
from deftx.signals import terminated_as_interrupted

TIMEOUT = timedelta(minutes=30)  # how long a device waits for the others


def run_on_devices(function: Callable[[Any], object], job: Any, devices: int, *, on_gpu: bool, label: str) -> None:
    """Call ``function(job)`` in ``devices`` processes that form one group, and wait for all of them.

    Args:
        function: importable by name.
        job: what it gets; a copy in each process.
        devices: how many processes.
        on_gpu: the processes take a GPU each.
        label: how errors name the fit.

    Raises:
        DeftxError: as ``function`` raised it; or a process died.
        KeyboardInterrupt: interrupted (also by SIGTERM); the processes are gone.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    # By value: torch's own way to hand a model over puts it into shared memory, which containers keep small.
    content = pickle.dumps((function, job), protocol=5)
    with tempfile.TemporaryDirectory(prefix="deftx-") as folder, terminated_as_interrupted():
        context = start_processes(  # type: ignore[no-untyped-call]
            _rank, args=(content, devices, on_gpu, folder), nprocs=devices, join=False, start_method="spawn"
        )
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells whom it ends
        try:
            while not context.join():
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            error_files = sorted(Path(folder).glob("error-*"))
            if error_files:
                raise DeftxError(error_files[0].read_text(encoding="utf-8")) from error
            if isinstance(error, ProcessExitedException):
                raise DeftxError(
                    f"{label}: the process of device {error.error_index} of {devices} died ({error}); out of memory? "
                    "run the command again to go on from the last state"
                ) from error
            raise
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _rank(rank: int, content: bytes, devices: int, on_gpu: bool, folder: str) -> None:
    """Run in one process: join the group, run the job, leave a user's error where the parent finds it."""
    import torch
    import torch.distributed as distributed

    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that the processes are there already
    for name in ("NODE_RANK", "GROUP_RANK"):  # of somebody else's launcher
        os.environ.pop(name, None)
    if rank:
        logging.getLogger("deftx").setLevel(logging.ERROR)  # one of them speaks
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // devices))
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=devices,
        timeout=TIMEOUT,
    )
    try:
        function, job = pickle.loads(content)  # noqa: S301 - from this process's parent, never from a file
        function(job)
    except DeftxError as error:
        (Path(folder) / f"error-{rank}").write_text(str(error), encoding="utf-8")
        raise
    else:
        distributed.destroy_process_group()
