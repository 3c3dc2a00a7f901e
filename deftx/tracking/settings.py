"""Settings of the tracking room: where a run is logged."""

from __future__ import annotations

from dataclasses import dataclass

from deftx.knobs import knob, matching, one_of

MODES = ("off", "offline", "online")


@dataclass
class LoggerSettings:
    """Where a run is logged beside its own files.

    Attributes:
        wandb: ``offline`` (files in the run directory, no account, no network), ``online`` or ``off``. The
            environment's ``WANDB_MODE`` can lower it, never raise it.
        project: W&B project.
        entity: W&B user or team; None: the account's own.
        group: None: the study's name.
        name: None: the job's name.
        tags: added to method, task and languages.
        dir: where W&B writes its files; None: the run directory.
        artifacts: put whole SFTs, predictions and diagnostics into artifacts; else only the small files that lineage
            needs.
        pictures: draw mask densities and spectra into the W&B run; 0.3 s a job.
        curves: write training curves as CSV under ``curves/`` in the run directory.
    """

    wandb: str = knob("offline", one_of(*MODES))
    project: str = knob("deftx", matching(r"[^/\\#?%:]{1,128}", "W&B takes 1 to 128 characters without / \\ # ? % :"))
    entity: str | None = knob(None)
    group: str | None = knob(None)
    name: str | None = knob(None)
    tags: list[str] = knob([])
    dir: str | None = knob(None)
    artifacts: bool = knob(False)
    pictures: bool = knob(True)
    curves: bool = knob(True)
