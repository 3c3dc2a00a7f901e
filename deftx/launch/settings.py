"""Settings of the launchers: where the jobs of a sweep run, how many at once, and what each may use."""

from __future__ import annotations

from dataclasses import dataclass, field

from deftx.errors import DeftxError, did_you_mean

LAUNCHERS = ("basic", "joblib", "submitit", "ray")
CLUSTERS = ("slurm", "local")


@dataclass
class LauncherSettings:
    """How a sweep's jobs are started. None of it changes a result.

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

    name: str = "basic"
    workers: int | None = None
    cluster: str = "slurm"
    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None
    timeout_min: int = 60
    requeues: int = 10
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    additional: dict[str, str] = field(default_factory=dict)
    address: str | None = None

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            DeftxError: One line for each.
        """
        problems = []
        if self.name not in LAUNCHERS:
            hint = did_you_mean(self.name, LAUNCHERS)
            problems.append(f"launcher.name={self.name!r}{hint}; available: {', '.join(LAUNCHERS)}")
        if self.cluster not in CLUSTERS:
            problems.append(f"launcher.cluster={self.cluster!r}; available: {', '.join(CLUSTERS)}")
        if self.workers is not None and self.workers < 1:
            problems.append(f"launcher.workers={self.workers}: at least 1")
        here = self.name == "joblib" or (self.name == "submitit" and self.cluster == "local")
        if here and self.workers is None:
            problems.append(f"launcher.workers is needed with launcher.name={self.name}: how many jobs at a time")
        for name, lowest in (("cpus", 1), ("gpus", 0), ("timeout_min", 1), ("requeues", 0)):
            if getattr(self, name) < lowest:
                problems.append(f"launcher.{name}={getattr(self, name)}: at least {lowest}")
        if self.memory_gb is not None and not self.memory_gb > 0:
            problems.append(f"launcher.memory_gb={self.memory_gb}: more than 0")
        if problems:
            raise DeftxError("\n".join(problems))
