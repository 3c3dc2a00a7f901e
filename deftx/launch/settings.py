"""Settings of the launchers: where the jobs of a sweep run, how many at once, and what each may use."""

from __future__ import annotations

from dataclasses import dataclass

from deftx.knobs import above, at_least, knob, one_of


@dataclass
class LauncherSettings:
    """How a sweep's jobs are started. Of this only ``gpus`` can change a result: it says what kind of device trains.

    Attributes:
        name: ``basic`` (one after the other, here), ``joblib`` (processes on this machine), ``submitit`` (SLURM, or its
            executor on this machine) or ``ray``.
        workers: jobs at a time (``joblib``, ``submitit`` on this machine: needed; SLURM: the array's limit; ``ray``: as
            many as its resources allow when null).
        cluster: of ``submitit``: ``slurm`` or ``local``.
        cpus: CPU cores a job gets (``submitit``, ``ray``).
        gpus: GPUs a job gets (``submitit``, ``ray``); ``joblib`` shares the visible ones out, one a worker.
        memory_gb: memory of a job, SLURM.
        timeout_min: time limit of a job, SLURM and ``local``; a job that meets it is requeued and resumes.
        requeues: how often a job may be requeued after a time limit or a preemption.
        partition, account, qos, constraint: as in ``sbatch``; null leaves the cluster's default.
        setup: shell lines that run before a job on its node (``module load ...``).
        additional: further ``sbatch`` options by name.
        address: of a running Ray cluster; null starts one here.
    """

    name: str = knob("basic", one_of("basic", "joblib", "submitit", "ray"))
    workers: int | None = knob(None, at_least(1))
    cluster: str = knob("slurm", one_of("slurm", "local"))
    cpus: int = knob(1, at_least(1))
    gpus: int = knob(0, at_least(0))
    memory_gb: float | None = knob(None, above(0))
    timeout_min: int = knob(60, at_least(1))
    requeues: int = knob(10, at_least(0))
    partition: str | None = knob(None)
    account: str | None = knob(None)
    qos: str | None = knob(None)
    constraint: str | None = knob(None)
    setup: list[str] = knob([])
    additional: dict[str, str] = knob({})
    address: str | None = knob(None)

    def conditions(self) -> list[str]:
        """What values must have in common."""
        on_this_machine = self.name == "joblib" or (self.name == "submitit" and self.cluster == "local")
        if not on_this_machine or self.workers is not None:
            return []
        return [f"workers is needed with launcher.name={self.name}: how many jobs at a time"]

    def device(self, accelerator: str) -> str:
        """Return the kind of device that its jobs train on, ``cpu`` or ``cuda``; empty where they run on this machine.

        A login node plans what its workers will make: what it has itself says nothing of them.

        Args:
            accelerator: ``trainer.accelerator``: ``auto``, ``cpu`` or ``gpu``.
        """
        if self.name != "ray" and (self.name != "submitit" or self.cluster != "slurm"):
            return ""
        return {"cpu": "cpu", "gpu": "cuda"}.get(accelerator) or ("cuda" if self.gpus else "cpu")
