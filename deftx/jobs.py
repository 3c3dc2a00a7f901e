"""What each command does once its configuration has passed, and how that ended; the same here, in a worker, on a node.

A job never raises. Its mistakes and failures are its :class:`JobEnd`, so that they reach the summary of a sweep and
stop no other job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deftx.errors import DeftxError

if TYPE_CHECKING:
    from deftx.settings import RunConfig
    from deftx.stages.settings import StudySettings

log = logging.getLogger(__name__)

LOG = "job.log"


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        error: The message of a failure.
        scores: Mean over targets of each condition's score.
        seconds: Wall time.
        sfts: Scores of the SFTs on their own validation data, by kind, ``language`` or ``task`` (for a search).
    """

    error: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    sfts: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One job of a sweep, as it travels to where it runs.

    Attributes:
        command: The subcommand.
        overrides: All of its overrides.
        folder: Its own folder, absolute.
        config_dir: The user's configuration folder, absolute.
        headline: What is said of it when it starts, if anything.
        device: Kind of device that it was planned for; empty: what is here.
        logged: Whether what it prints goes to ``job.log`` in its folder: several jobs share one terminal.
    """

    command: str
    overrides: tuple[str, ...]
    folder: str
    config_dir: str | None = None
    headline: str = ""
    device: str = ""
    logged: bool = False


class JobFunction(Protocol):
    """What a command does with its settings, on the kind of device that was planned."""

    def __call__(self, config: RunConfig, device: str = "") -> JobEnd:
        """Run it."""


def work(task: Task) -> JobEnd:
    """Run one job of a sweep."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without(_AGENT))
        if task.logged:
            Path(task.folder).mkdir(parents=True, exist_ok=True)
            output = stack.enter_context((Path(task.folder) / LOG).open("a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
        elif task.headline:
            print(task.headline, flush=True)
        return _launched(task)


# An agent of W&B means one run by them; the jobs of a sweep would all write into it.
_AGENT = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RESUME")


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Hide environment variables within the block."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _launched(task: Task) -> JobEnd:
    from deftx.config import run_job

    job = partial(JOBS[task.command], device=task.device)
    try:
        return run_job(task.command, job, task.overrides, config_dir=task.config_dir, folder=task.folder)
    except DeftxError as error:
        return JobEnd(error=str(error))


def _job(name: str, body: Callable[[StudySettings, RunConfig], JobEnd | None]) -> JobFunction:
    """Wrap what a command does so that whatever stops it becomes its message."""

    def run(config: RunConfig, device: str = "") -> JobEnd:
        from deftx.config import study_settings

        logging.captureWarnings(True)
        started = time.perf_counter()
        try:
            end = body(replace(study_settings(config, name), device=device), config) or JobEnd()
        except DeftxError as error:
            end = JobEnd(error=str(error))
        except Exception as error:
            # Not a mistake of the user's: the traceback is in result.json and in the job's log.
            log.exception("the job failed")
            end = JobEnd(error=f"{type(error).__name__}: {error}".strip().splitlines()[0])
        return replace(end, seconds=round(time.perf_counter() - started, 3))

    return run


def _run(study: StudySettings, _: RunConfig) -> JobEnd:
    from deftx.config import run_directory
    from deftx.stages.study import run_parts, run_study
    from deftx.tracking import mean_scores

    record = run_parts(study, run_directory()) if study.only else run_study(study, run_directory())
    judged: dict[str, list[float]] = {}
    for sft in record.sfts:
        if (score := sft.metrics.get("best_score")) is not None:
            judged.setdefault(sft.kind, []).append(score)
    return JobEnd(scores=mean_scores(record), sfts=judged)


def _sft(study: StudySettings, config: RunConfig) -> None:
    from deftx.config import run_directory
    from deftx.stages.study import run_sft

    run_sft(study, str(config.kind), Path(config.out).expanduser() if config.out else None, run_directory())


def _eval(study: StudySettings, config: RunConfig) -> JobEnd:
    from deftx.config import run_directory
    from deftx.stages.study import run_eval
    from deftx.tracking import mean_scores

    asked = config.task.training.max_length
    length = asked if asked != getattr(config.budget, config.task.family).max_length else None  # the user's own
    record = run_eval(study, str(config.task_sft), config.language_sft, run_directory(), length)
    return JobEnd(scores=mean_scores(record))


def _pretrain(study: StudySettings, config: RunConfig) -> None:
    from deftx.stages.study import run_pretrain

    run_pretrain(study, config.text, Path(str(config.out)).expanduser())


JOBS: dict[str, JobFunction] = {
    name: _job(name, body) for name, body in {"run": _run, "sft": _sft, "eval": _eval, "pretrain": _pretrain}.items()
}
