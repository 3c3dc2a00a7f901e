"""What each command does once its configuration has passed, and how that ended; the same here, in a worker, on a node.

A job never raises: its mistakes and failures are its :class:`End`, so that they reach the summary of a sweep and stop
no other job.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deftx.errors import DeftxError

log = logging.getLogger(__name__)

LOG = "job.log"


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        error: The message of a failure.
        scores: Mean over targets of each condition's score.
        seconds: Wall time.
        sfts: Scores of the SFTs on their own validation data, by role and language (for a search).
    """

    error: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    sfts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One job of a sweep, as it travels to where it runs.

    Attributes:
        command: The subcommand.
        overrides: All of its overrides.
        folder: Its own folder, absolute.
        config_dir: The user's configuration folder, absolute.
        headline: What is said of it when it starts, if anything.
        logged: Whether what it prints goes to ``job.log`` in its folder: several jobs share one terminal.
    """

    command: str
    overrides: tuple[str, ...]
    folder: str
    config_dir: str | None = None
    headline: str = ""
    logged: bool = False


def work(task: Task) -> End:
    """Run one job of a sweep."""
    with contextlib.ExitStack() as stack:
        if task.logged:
            Path(task.folder).mkdir(parents=True, exist_ok=True)
            output = stack.enter_context((Path(task.folder) / LOG).open("a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
        elif task.headline:
            print(task.headline, flush=True)
        return _launched(task)


def _launched(task: Task) -> End:
    from deftx.config import launch

    try:
        return launch(task.command, JOBS[task.command], task.overrides, config_dir=task.config_dir, folder=task.folder)
    except DeftxError as error:
        return End(error=str(error))


def _job(body: Callable[[Any], End | None]) -> Callable[[Any], End]:
    """Wrap a job so that whatever stops it becomes its message."""

    def run(config: Any) -> End:
        logging.captureWarnings(True)
        started = time.perf_counter()
        try:
            end = body(config) or End()
        except DeftxError as error:
            end = End(error=str(error))
        except Exception as error:
            # Not a mistake of the user's: the traceback is in result.json and in the job's log.
            log.exception("the job failed")
            end = End(error=f"{type(error).__name__}: {error}".strip().splitlines()[0])
        return replace(end, seconds=round(time.perf_counter() - started, 3))

    return run


def _run(config: Any) -> End:
    from deftx.config import run_directory, study_settings
    from deftx.stages.study import run_parts, run_study
    from deftx.tracking import mean_scores

    study = study_settings(config)
    record = run_parts(study, run_directory()) if study.only else run_study(study, run_directory())
    found = {sft["name"]: sft["metrics"].get("best_score") for sft in record.sfts}
    return End(scores=mean_scores(record), sfts={name: value for name, value in found.items() if value is not None})


def _sft(config: Any) -> None:
    from deftx.config import run_directory, sft_settings
    from deftx.stages.study import run_sft

    run_sft(*sft_settings(config), run_directory())


def _eval(config: Any) -> End:
    from deftx.config import eval_settings, run_directory
    from deftx.stages.study import run_eval
    from deftx.tracking import mean_scores

    return End(scores=mean_scores(run_eval(*eval_settings(config), run_directory())))


def _pretrain(config: Any) -> None:
    from deftx.config import pretrain_settings
    from deftx.stages.study import run_pretrain

    run_pretrain(*pretrain_settings(config))


JOBS: dict[str, Callable[[Any], End]] = {
    "run": _job(_run),
    "sft": _job(_sft),
    "eval": _job(_eval),
    "pretrain": _job(_pretrain),
}
