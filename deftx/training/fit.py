"""One phase as one Lightning fit: exact number of steps, validation, best checkpoint, quiet and repeatable.

The data module's training loader is one long stream, so that a fit is a single Lightning epoch of exactly the steps it
should have; batch number i is a pure function of (seed, i). Dropout is seeded for each batch the same way, so that
validation cannot move it. An interrupted phase goes on from its last state (:mod:`~deftx.training.checkpoint`) and ends
with the bits of one that was not.

Best checkpoint on validation per phase is the papers' rule (method.md, "Settings of the reference").
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import distributed

from deftx.errors import DeftxError
from deftx.heartbeat import heartbeat_file
from deftx.knobs import refuse
from deftx.memory import peak_memory
from deftx.training.callback import SparseFineTuning
from deftx.training.checkpoint import Checkpoints, read_best, read_outcome
from deftx.training.devices import run_on_devices
from deftx.training.modules import Encoder
from deftx.training.profile import StepProfile, medians
from deftx.training.record import FitRecord, Heartbeats, ProgressBar
from deftx.training.settings import TrainerSettings, TrainingSettings


@dataclass
class PhaseResult:
    """What a fit gave; the module holds the best weights when it is returned. As it begins: nothing was trained.

    Attributes:
        best_score: best value of the monitored validation metric; None where nothing was trained.
        best_step: optimizer step it was reached at.
        steps: optimizer steps run.
        seconds: wall time of the fit; of a resumed one, over all attempts, up to the state each left.
        peak_memory: bytes, the largest so far: allocated on the GPU where there is one, else resident in the process.
        profile: median seconds a batch spends on ``data``, ``forward``, ``head``, ``backward`` and ``optimizer``, where
            ``trainer.profile`` asked for it.
        tokens_per_second: tokens that are no padding, over the wall time of training (validation left out).
        history: one dict for each record of the training loss and each validation, all with ``step``.
        checkpoint: file of the best weights (what was trained, keys as ``Encoder.trained``).
        padding: share of padding among all tokens trained on.
        train_examples: rows or blocks of the training data.
    """

    best_score: float | None = None
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: Path = Path()
    padding: float = 0.0
    train_examples: int = 0
    peak_memory: int = 0
    profile: dict[str, float] = field(default_factory=dict)


def phase_steps(settings: TrainingSettings, epoch: int) -> int:
    """Return the optimizer steps of a phase: clamp(epochs × steps per epoch, min_steps, max_steps).

    Args:
        settings: epochs and limits.
        epoch: steps of one epoch; its last, smaller batch counts as a step.

    Raises:
        DeftxError: there are no examples.
    """
    if epoch < 1:
        raise DeftxError("there is no training data: 0 examples")
    steps = max(settings.epochs * epoch, settings.min_steps)
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    return steps


def fit_phase(
    module: Encoder,
    data_module: Any,
    callback: SparseFineTuning | None,
    settings: TrainingSettings,
    trainer: TrainerSettings,
    scratch: Path,
    *,
    seed: int,
    loggers: Sequence[Any] = (),
    label: str = "",
) -> PhaseResult:
    """Train one phase and leave the best weights in the module.

    Args:
        module: masked language model or classifier, on the CPU.
        data_module: :class:`~deftx.data.module.TextDataModule` or its like.
        callback: makes the fit a phase of a sparse fine-tuning; None trains everything the module trains.
        settings: how to train.
        trainer: what to run on.
        scratch: folder of this phase's checkpoints; nothing is written elsewhere. The fit resumes from
            what an interrupted attempt at it left there; what another fit left is replaced.
        seed: decides the order of the data, the masking and dropout.
        loggers: Lightning loggers of this phase.
        label: how progress bar and errors name the phase.

    Raises:
        DeftxError: settings out of range, no accelerator, or a loss that is not finite.
    """
    refuse(settings)
    refuse(trainer)
    _accelerator(trainer)  # refused before anything is prepared
    epoch = data_module.epoch_steps(settings.batch_size)
    steps = phase_steps(settings, epoch)
    data_module.schedule(
        batch_size=settings.batch_size,
        steps=steps,
        accumulate=settings.accumulate,
        seed=seed,
        num_workers=trainer.num_workers,
        buckets=settings.length_buckets,
    )
    module.begin_fit(steps, trainer)
    scratch = Path(scratch)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeftxError(f"cannot write checkpoints to {scratch}: {error.strerror or error}") from error
    job = _Job(
        module,
        data_module,
        callback,
        settings,
        trainer,
        scratch,
        seed,
        steps,
        epoch,
        label or "training",
        heartbeat_file(),
    )
    outcome = _run(job, loggers) if trainer.devices == 1 else _run_on_devices(job, loggers)
    checkpoint = scratch / outcome["best"]["file"]
    module.load_trained(read_best(checkpoint, job.label)["state_dict"])
    module.zero_grad(set_to_none=True)
    record = outcome["record"]
    training_seconds = max(1e-9, outcome["seconds"] - record["validation_seconds"])
    return PhaseResult(
        best_score=outcome["best"]["score"],
        best_step=outcome["best"]["step"],
        steps=outcome["step"],
        seconds=outcome["seconds"],
        tokens_per_second=record["tokens"] / training_seconds,
        history=record["history"],
        checkpoint=checkpoint,
        padding=1.0 - record["tokens"] / max(1, record["cells"]),
        train_examples=data_module.examples,
        peak_memory=outcome["peak_memory"],
        profile=medians(outcome["profile"]) if trainer.profile and outcome["profile"] else {},
    )


@dataclass
class _Job:
    """A fit, ready to run."""

    module: Encoder
    data_module: Any
    callback: SparseFineTuning | None
    settings: TrainingSettings
    trainer: TrainerSettings
    scratch: Path
    seed: int
    steps: int
    epoch: int
    label: str
    heartbeats: Path | None = None

    def facts(self) -> dict[str, Any]:
        """Return what a state on disk must agree on to be this fit's."""
        settings = asdict(self.settings)
        del settings["log_every"]
        return {
            "phase": self.callback.phase if self.callback is not None else "everything",
            "l1": self.callback.l1 if self.callback is not None else 0.0,
            "steps": self.steps,
            "steps of an epoch": self.epoch,
            "seed": self.seed,
            "settings": settings,
            "precision": self.trainer.precision,
            "monitor": self.module.monitor,
            "data": self.data_module.fingerprint(),
        }


def _run_on_devices(job: _Job, loggers: Sequence[Any]) -> dict[str, Any]:
    """As :func:`_run`, in a process for each device; the loggers hear the curve when it has ended.

    This process's module stays at θ⁰, from which the callback learns what the fit started from.
    """
    devices, accelerator = job.trainer.devices, _accelerator(job.trainer)
    if job.data_module.valid_examples < devices:
        raise DeftxError(
            f"{job.label}: {job.data_module.valid_examples} validation examples for {devices} devices; each needs one"
        )
    run_on_devices(_run, job, devices, on_gpu=accelerator == "cuda", label=job.label)
    outcome = read_outcome(job.scratch, job.label)
    if job.callback is not None:
        job.callback.snapshot(job.module)
    FitRecord.replay(loggers, outcome["record"]["history"])
    return outcome


def _run(job: _Job, loggers: Sequence[Any] = ()) -> dict[str, Any]:
    """Run a fit, or what is left of it, and return its last state (see :class:`Checkpoints`)."""
    module, settings, trainer = job.module, job.settings, job.trainer
    accelerator = _accelerator(trainer)
    every = settings.eval_every or job.epoch
    record = FitRecord(settings, job.label, job.seed, job.steps, loggers)
    parts = StepProfile() if trainer.profile else None
    checkpoints = Checkpoints(
        job.scratch,
        record,
        minutes=trainer.checkpoint_minutes,
        every=every,
        facts=job.facts(),
        profile=parts,
        peak_memory=torch.cuda.max_memory_allocated if accelerator == "cuda" else lambda: peak_memory() or 0,
    )
    record.kept = lambda: checkpoints.best_file
    callbacks: list[pl.Callback] = [record]
    if job.callback is not None:
        callbacks.insert(0, job.callback)
    bar = trainer.progress and sys.stderr.isatty() and not _rank()
    callbacks.append(Heartbeats(record, job.heartbeats, line=not bar))
    if bar:
        callbacks.append(ProgressBar(job.label, job.steps, module.monitor))
    if parts is not None:
        callbacks.append(parts)
    callbacks.append(checkpoints)  # last: a state holds what the others noted
    # Lightning took it from the environment, where it may be that of a launcher which started independent jobs.
    rank_zero_only.rank = _rank()  # type: ignore[attr-defined]
    with _surroundings(trainer), computing(module, trainer):
        fitter = pl.Trainer(
            accelerator=accelerator,
            devices=trainer.devices,
            strategy=_strategy(trainer),
            precision=trainer.precision,  # type: ignore[arg-type]
            max_steps=job.steps,
            max_epochs=1,
            accumulate_grad_batches=settings.accumulate,
            val_check_interval=every * settings.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic="warn" if trainer.deterministic else None,
            default_root_dir=job.scratch,
            plugins=[LightningEnvironment()],  # within a SLURM job too: it is the job's business who runs where
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            fitter.fit(module, datamodule=job.data_module)
        except SystemExit as stop:
            # Lightning's answer to Ctrl-C: it ignores further ones and exits with 1, as if the run had failed.
            with contextlib.suppress(ValueError):  # only the main thread may
                signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from stop
        except OSError as error:
            raise DeftxError(
                f"{job.label}: cannot write the checkpoint in {job.scratch}: {error.strerror or error}; "
                "free space or choose another cache folder, then run again"
            ) from error
    assert checkpoints.outcome is not None
    return checkpoints.outcome


@contextlib.contextmanager
def computing(module: Encoder, trainer: TrainerSettings) -> Iterator[None]:
    """Compile the encoder, or let it recompute its layers in backward, for the length of a fit.

    Compiled graphs go when it ends, all of this process.
    """
    encoder = module.model.base_model
    if trainer.checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if trainer.compile:
        if not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            raise DeftxError("trainer.compile=true needs a C++ compiler (g++ or clang++), and none is on the PATH")
        encoder.compile(dynamic=True, options={"fallback_random": True})  # the dropout of every other run
    try:
        yield
    finally:
        if trainer.compile:
            encoder._compiled_call_impl = None
            torch.compiler.reset()  # or later fits of this process meet dynamo's limit of graphs and run uncompiled
        if trainer.checkpointing:
            module.model.gradient_checkpointing_disable()


def _accelerator(trainer: TrainerSettings) -> str:
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise DeftxError("accelerator is gpu, but torch sees no CUDA device; use accelerator=cpu or auto")
    if trainer.devices > torch.cuda.device_count():
        raise DeftxError(f"devices is {trainer.devices}, but torch sees {torch.cuda.device_count()} CUDA device(s)")
    return "cuda"


def _strategy(trainer: TrainerSettings) -> Any:
    """Return how several devices share a fit; one needs none."""
    if trainer.devices == 1:
        return "auto"
    # Buffers are constants or each device's own counts, and validation runs unequal numbers of batches.
    return DDPStrategy(broadcast_buffers=False)


def _rank() -> int:
    """Return which of a fit's own processes this is; 0 where there is one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


@contextlib.contextmanager
def _surroundings(trainer: TrainerSettings) -> Iterator[None]:
    """Threads, determinism, random states, warnings and Lightning's own messages, all put back afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pytorch_lightning\.|lightning_fabric\.|torch\.utils\.data\.")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            if trainer.threads is not None:
                torch.set_num_threads(trainer.threads)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark = benchmark
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            else:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
