"""The W&B run of a job, and the CSV files of its curves."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deftx.errors import DeftxError
from deftx.knobs import refuse
from deftx.tracking import names
from deftx.tracking.artifacts import declare, is_input, result_artifact, sft_artifact
from deftx.tracking.media import draw_mask_density, draw_spectra
from deftx.tracking.results import RunRecord, plain, status_of
from deftx.tracking.settings import MODES, LoggerSettings
from deftx.tracking.summary import results_rows, summarise

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Tracker"]


log = logging.getLogger(__name__)


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
        job_type: ``run``, ``stage``, ``sft-language``, ``sft-task`` or ``eval``.
        name: name of the run.
        config: the knobs; nested ones are flattened, ``{"lang": {"rank": 16}}`` to ``lang/rank`` (W&B keys
            should hold no dots). Those of :data:`deftx.tracking.names.KNOBS` are always there.
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
        refuse(settings, "logger.")
        self.settings = settings
        self.run_dir = Path(run_dir).absolute()
        self.study = study
        self.job_type = job_type
        self.name = settings.name or name
        self.config = {**dict.fromkeys(names.KNOBS), **_flat(plain(config or {}))}
        self.tags = [tag[:64] for tag in dict.fromkeys([*tags, *settings.tags]) if tag]
        self.run: Any = None
        self.mode = "off"
        self._cleanup = contextlib.ExitStack()
        self._curves: set[str] = set()
        self._told: set[str] = set()
        self._lost = False
        self._handed: tuple[RunRecord, pd.DataFrame | None, Mapping[str, Path]] | None = None

    @property
    def folder(self) -> Path:
        """The folder that holds W&B's own ``wandb`` folder."""
        return Path(self.settings.dir).expanduser().absolute() if self.settings.dir else self.run_dir

    def __enter__(self) -> Self:
        mode = min(self.settings.wandb, _environment_mode(), key=MODES.index)
        if mode == "off":
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeftxError(f"cannot write {self.folder}: {error.strerror}") from error
        if not self._can_write():
            return self
        if mode == "online":
            self._start("online")
        if self.run is None:
            # Error reports of wandb go over the network even when the run does not.
            self._cleanup.enter_context(_environment("WANDB_ERROR_REPORTING", "false"))
            self._start("offline")
        if self.run is None:
            self._cleanup.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.run is not None:
                with self._forgiving("finishing the run"):
                    self.run.summary[names.STATUS] = status_of(kind)
                if self._handed is not None and not self._lost:
                    self._log(*self._handed, failed=kind is not None)
                with self._forgiving("finishing the run"):
                    self.run.finish(exit_code=0 if kind is None else 1)
                if self._lost:
                    self._leave_service()
        finally:
            self.run = None
            self._cleanup.close()

    def finish_run(
        self,
        record: RunRecord,
        diagnostics: pd.DataFrame | None = None,
        sfts: Mapping[str, Path] | None = None,
    ) -> None:
        """Hand over what the job made. It is logged when the block ends, after ``result.json`` has been written.

        Summary values have the names of :mod:`deftx.tracking.names`; beside them come the table ``results`` (a row for
        each target and metric, a column for each condition), two pictures, and artifacts with their lineage. Settings
        that became known since the run began go into its config.

        Args:
            record: the run's record; read at the end, so it may still be unfinished.
            diagnostics: the frame of ``diagnostics.parquet``.
            sfts: key -> folder of each SFT in ``record.sfts``.
        """
        self._handed = (record, diagnostics, dict(sfts or {}))

    def lightning_loggers(self, stage: str) -> list[Any]:
        """Return Lightning loggers for the trainer of one stage: CSV curves, and this W&B run when it is on.

        In W&B the stage's curves are ``STAGE/train/loss`` and so on over ``STAGE/step``; hyperparameters of
        modules are left out, the config is the job's. As CSV they are ``curves/STAGE/metrics.csv`` in the run
        directory.

        Args:
            stage: a stable name such as ``full/ace``; a repeated one gets a number.
        """
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
        if self.run is not None and not self._lost:
            with self._forgiving("logging curves"):
                points = {names.curve(stage, key): value for key, value in values.items()}
                self.run.log({**points, names.curve(stage, "step"): step})

    # ---------------------------------------------------------------------------------------------- the run

    def _log(
        self, record: RunRecord, diagnostics: pd.DataFrame | None, sfts: Mapping[str, Path], *, failed: bool
    ) -> None:
        import wandb

        with self._forgiving("completing the config"):
            late = {name: value for name, value in _flat(plain(record.settings)).items() if name not in self.config}
            if late:
                self.run.config.update(late)
        with self._forgiving("logging the summary"):
            self.run.summary.update(summarise(record, diagnostics))
        logged: dict[str, Any] = {}
        with self._forgiving("making the table"), self._staging():
            columns, data = results_rows(record.metrics)
            if data:
                logged[names.RESULTS] = wandb.Table(columns=columns, data=data)
        if self.settings.pictures and diagnostics is not None and len(diagnostics):
            for name, draw in ((names.MASK_DENSITY, draw_mask_density), (names.SPECTRA, draw_spectra)):
                with self._forgiving(f"drawing {name}"), self._staging():
                    pixels = draw(record, diagnostics)
                    if pixels is not None:
                        logged[name] = wandb.Image(pixels)
        with self._forgiving("logging tables and pictures"), self._staging():
            if logged:
                self.run.log(logged)
        if not failed:
            self._declare(record, sfts)

    def _declare(self, record: RunRecord, sfts: Mapping[str, Path]) -> None:
        """Artifacts: SFTs as inputs or outputs, a composing job's result as output."""
        artifact_names: list[str] = []
        whole = self.settings.artifacts
        for sft in (sft for sft in record.sfts if sft.key in sfts):
            with self._forgiving(f"logging the artifact of {sft.name}"), self._staging():
                artifact = sft_artifact(sft, sfts[sft.key], whole=whole)
                declare(self.run, artifact, used=is_input(record, sft))
                artifact_names.append(artifact.name)
        if record.metrics:
            with self._forgiving("logging the artifact of the result"), self._staging():
                declare(self.run, result_artifact(record, self.run_dir, artifact_names, whole=whole), used=False)

    def _can_write(self) -> bool:
        # wandb itself would fall back to the system's temporary folder, and lose the run there.
        folder = self.folder / "wandb"
        with self._forgiving(f"writing {folder}"):
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(1 << 16))
            return True
        return False

    def _start(self, mode: str) -> None:
        import wandb

        instead = " (it goes on offline: `wandb sync` publishes the run later)" if mode == "online" else ""
        with self._forgiving(f"starting W&B {mode}{instead}"):
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
                    x_save_requirements=False,  # result.json names the versions that count; listing all takes 0.2 s
                    init_timeout=30,
                ),
            )
            self.mode = mode
            if mode == "online":
                log.info("W&B: %s", self.run.url)

    @contextlib.contextmanager
    def _forgiving(self, doing: str) -> Iterator[None]:
        """Turn what wandb raises into a warning, one for each reason: the run's own files hold everything."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # wandb and matplotlib raise many kinds, bare Exception among them
            # W&B's own process has died: whatever follows would fail as well.
            self._lost |= isinstance(error, ConnectionError) or type(error).__name__ == "MailboxClosedError"
            reason = f"{type(error).__name__}: {error}"
            if reason not in self._told:
                log.warning("W&B: %s failed (%s); result.json is complete without it", doing, reason)
            self._told.add(reason)

    def _leave_service(self) -> None:
        """Forget W&B's dead process: a sweep's next job starts another, and nothing is said of it at the end."""
        import wandb

        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)

    def _staging(self) -> contextlib.AbstractContextManager[None]:
        # Offline, tables and artifacts are uploaded from here later: keep them with the run.
        if "WANDB_DATA_DIR" in os.environ:
            return contextlib.nullcontext()
        return _environment("WANDB_DATA_DIR", str(self.folder / "wandb" / "staging"))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _environment_mode() -> str:
    mode = os.environ.get("WANDB_MODE", "")
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(mode, "online")


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

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Do nothing: the config is the job's."""

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            tracker.log_curve(stage, metrics, step or 0)

    with tracker._forgiving("defining curves"):
        step = names.curve(stage, "step")
        tracker.run.define_metric(step, hidden=True)
        tracker.run.define_metric(names.curve(stage, "*"), step_metric=step)
    return StageLogger()
