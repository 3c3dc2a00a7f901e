"""The W&B run of a job, and the CSV files of its curves."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from deftx.errors import DeftxError, did_you_mean
from deftx.tracking.results import CONDITIONS, Metric, finite, plain

__all__ = ["LoggerSettings", "Tracker"]


log = logging.getLogger(__name__)


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
        artifacts: upload (or stage) SFT folders as artifacts.
        curves: write training curves as CSV under ``curves/`` in the run directory.
    """

    wandb: str = "offline"
    project: str = "deftx"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    dir: str | None = None
    artifacts: bool = False
    curves: bool = True

    def validate(self) -> None:
        """Check what can be checked without importing wandb.

        Raises:
            DeftxError: an unknown mode, or a project name that W&B does not take.
        """
        if self.wandb not in _MODES:
            guess = did_you_mean(str(self.wandb), _MODES)
            raise DeftxError(f"logger.wandb is {self.wandb!r}; it can be {', '.join(_MODES)}{guess}")
        if not self.project or len(self.project) > 128 or re.search(r"[/\\#?%:]", self.project):
            raise DeftxError(f"logger.project is {self.project!r}; W&B takes 1 to 128 characters without / \\ # ? % :")


_MODES = ("off", "offline", "online")


class Tracker:
    """One W&B run for one job, as a context manager; every method does nothing when W&B is off.

    The run is a new one whatever other runs the process has or had, is finished when the block ends (exit
    code 1 when it ends by an exception), and never asks anything. Without an account, ``online`` becomes
    ``offline`` with a warning. W&B's own process completes the run's files a moment after the block ends.
    Publish an offline run with ``wandb sync RUN_DIR/wandb/offline-run-*`` from where it was made: its tables
    and artifacts are staged under ``RUN_DIR/wandb/staging`` and found by absolute path.

    Args:
        settings: where to log.
        run_dir: the run's directory.
        study: W&B group.
        job_type: ``run``, ``sft-language``, ``sft-task`` or ``eval``.
        name: name of the run.
        config: the knobs; nested ones are flattened, ``{"lang": {"rank": 16}}`` to ``lang/rank`` (W&B keys
            should hold no dots).
        tags: method, task, languages.

    Attributes:
        run: the ``wandb.Run``, or None.
        mode: what W&B really does: ``off``, ``offline`` or ``online``.
    """

    def __init__(
        self,
        settings: LoggerSettings,
        run_dir: str | os.PathLike[str],
        *,
        study: str,
        job_type: str = "run",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        settings.validate()
        self.settings = settings
        self.run_dir = Path(run_dir).absolute()
        self.study = study
        self.job_type = job_type
        self.name = settings.name or name
        self.config = _flat(plain(config or {}))
        self.tags = [tag[:64] for tag in dict.fromkeys([*tags, *settings.tags]) if tag]
        self.run: Any = None
        self.mode = "off"
        self._environment: dict[str, str | None] = {}
        self._curves: set[str] = set()

    @property
    def folder(self) -> Path:
        """The folder that holds W&B's own ``wandb`` folder."""
        return Path(self.settings.dir).expanduser().absolute() if self.settings.dir else self.run_dir

    def __enter__(self) -> Self:
        mode = min(self.settings.wandb, _environment_mode(), key=_MODES.index)
        if mode == "off" or not _is_first_rank():
            return self
        try:
            # wandb itself would fall back to the system's temporary folder, and lose the run there.
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeftxError(f"cannot write {self.folder}: {error.strerror}") from error
        if mode == "online":
            self._start("online")
        if self.run is None:
            # Error reports of wandb go over the network even when the run does not.
            self._set_environment("WANDB_ERROR_REPORTING", "false")
            self._start("offline")
        if self.run is None:
            self._restore_environment()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.run is not None:
                with self._forgiving("finishing the run"):
                    self.run.summary["status"] = "done" if kind is None else "failed"
                with self._forgiving("finishing the run"):
                    self.run.finish(exit_code=0 if kind is None else 1)
        finally:
            self.run = None
            self._restore_environment()

    def record(self, metrics: Sequence[Metric], *, extra: Mapping[str, Any] | None = None) -> None:
        """Put scores into the run.

        They become a summary entry ``metric/language/condition`` for each, means over the
        targets (``metric/mean/condition``, only where no target is missing), and the table ``results``, a row
        for each target and metric, a column for each condition.

        Args:
            metrics: scores as fractions.
            extra: other summary values under stable names, such as ``seconds/total``.
        """
        if self.run is None:
            return
        import wandb

        summary: dict[str, Any] = {}
        rows: dict[tuple[str, str, str], dict[str, Metric]] = {}
        for item in metrics:
            rows.setdefault((item.metric, item.split, item.language), {})[item.condition] = item
        asked = {item.condition: None for item in metrics}
        conditions = [name for name in CONDITIONS if name in asked] + [n for n in asked if n not in CONDITIONS]
        means: dict[tuple[str, str, str], list[float | None]] = {}
        for (metric, split, language), row in rows.items():
            for name in conditions:
                value = finite(row[name].value) if name in row else None
                means.setdefault((metric, split, name), []).append(value)
                if name in row:
                    summary[_summary_name(metric, split, language, name)] = value
        for (metric, split, name), values in means.items():
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                summary[_summary_name(metric, split, "mean", name)] = sum(known) / len(known)
        summary |= _flat(plain(extra or {}))
        with self._forgiving("logging the scores"):
            self.run.summary.update(summary)
            if rows:
                data: list[Any] = [
                    [language, split, metric, max(item.n for item in row.values())]
                    + [finite(row[name].value) if name in row else None for name in conditions]
                    for (metric, split, language), row in rows.items()
                ]
                table = wandb.Table(columns=["language", "split", "metric", "n", *conditions], data=data)
                with self._staging():
                    self.run.log({"results": table})

    def artifact(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str,
        kind: str = "sft",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Log a folder as an artifact, when ``settings.artifacts`` asks for it.

        Args:
            folder: the SFT's folder.
            name: artifact name; characters W&B does not take become ``-``.
            kind: artifact type.
            about: plain metadata.
        """
        if self.run is None or not self.settings.artifacts:
            return
        import wandb

        with self._forgiving(f"logging the artifact {name}"), self._staging():
            clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128]
            artifact = wandb.Artifact(clean, type=kind, metadata=plain(about or {}))
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
            self.run.log_artifact(artifact)

    def lightning_loggers(self, stage: str) -> list[Any]:
        """Return Lightning loggers for the trainer of one stage: CSV curves, and this W&B run when it is on.

        In W&B the stage's curves are ``STAGE/train/loss`` and so on over ``STAGE/step``; hyperparameters of
        modules are left out, the config is the job's. As CSV they are ``curves/STAGE/metrics.csv`` in the run
        directory.

        Args:
            stage: a stable name such as ``full/ace``; a repeated one gets a number.
        """
        if not _is_first_rank():
            return []
        loggers: list[Any] = []
        number = 1
        name = stage
        while name in self._curves or (self.run_dir / "curves" / name).exists():
            number += 1
            name = f"{stage}-{number}"
        self._curves.add(name)
        if self.settings.curves:
            from pytorch_lightning.loggers import CSVLogger

            loggers.append(CSVLogger(self.run_dir / "curves", name=name, version=""))
        if self.run is not None:
            loggers.append(_stage_logger(self, name))
        return loggers

    def log_curve(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Log points of a stage's curves at an optimizer step."""
        if self.run is not None:
            with self._forgiving("logging curves"):
                self.run.log({**{f"{stage}/{key}": value for key, value in values.items()}, f"{stage}/step": step})

    # ---------------------------------------------------------------------------------------------- the run

    def _start(self, mode: str) -> None:
        import wandb

        with self._forgiving(f"starting W&B {mode}"):
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("no W&B account on this machine; `wandb login` adds one")
            self.run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                id=os.urandom(4).hex(),
                dir=str(self.folder),
                project=self.settings.project,
                entity=self.settings.entity,
                group=self.settings.group or self.study,
                job_type=self.job_type,
                name=self.name,
                tags=self.tags,
                config=self.config,
                reinit="create_new",
                settings=wandb.Settings(
                    silent=mode == "offline",
                    quiet=True,
                    show_info=False,
                    console="off",
                    disable_code=True,
                    save_code=False,
                    init_timeout=30,
                ),
            )
            self.mode = mode
            if mode == "online":
                log.info("W&B: %s", self.run.url)

    @contextlib.contextmanager
    def _forgiving(self, doing: str) -> Iterator[None]:
        """Turn what wandb raises into a warning: the run's own files hold everything."""
        import wandb

        try:
            yield
        except (wandb.errors.Error, OSError, ValueError, TypeError, RuntimeError) as error:
            log.warning("%s: %s (result.json is complete without it)", doing, error)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        # Offline, tables and artifacts are uploaded from here later: keep them with the run.
        if "WANDB_DATA_DIR" in os.environ:
            yield
            return
        os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb" / "staging")
        try:
            yield
        finally:
            os.environ.pop("WANDB_DATA_DIR", None)

    def _set_environment(self, name: str, value: str) -> None:
        self._environment[name] = os.environ.get(name)
        os.environ[name] = value

    def _restore_environment(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()


def _summary_name(metric: str, split: str, language: str, condition: str) -> str:
    return f"{metric}/{language}/{condition}" + ("" if split == "test" else f"/{split}")


def _environment_mode() -> str:
    mode = os.environ.get("WANDB_MODE", "")
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(mode, "online")


def _is_first_rank() -> bool:
    """Whether this process is the one of a distributed training that logs."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return True


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{key}/")
        else:
            flat[f"{above}{key}".replace(".", "/")] = value
    return flat


def _stage_logger(tracker: Tracker, stage: str) -> Any:
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_only

    class StageLogger(Logger):
        """Passes a trainer's metrics to the job's W&B run, under the stage's name."""

        @property
        def name(self) -> str:
            return stage

        @property
        def version(self) -> str:
            return ""

        @property
        def experiment(self) -> Any:
            return tracker.run

        @rank_zero_only
        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Nothing: the config is the job's."""

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            tracker.log_curve(stage, metrics, step or 0)

    with tracker._forgiving("defining curves"):
        tracker.run.define_metric(f"{stage}/step", hidden=True)
        tracker.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return StageLogger()
