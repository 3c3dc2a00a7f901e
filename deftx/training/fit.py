"""One phase as one Lightning fit: exact number of steps, validation, best checkpoint, quiet and repeatable.

The data module's training loader is one long stream, so that a fit is a single Lightning epoch of exactly the steps it
should have; batch number i is a pure function of (seed, i). Dropout is seeded for each batch the same way, so that
validation cannot move it. An interrupted phase starts again from its beginning.

Best checkpoint on validation per phase is the papers' rule (method.md, "Settings of the reference").
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from deftx.errors import DeftxError
from deftx.training.callback import SparseFineTuning
from deftx.training.modules import Encoder
from deftx.training.profile import StepProfile
from deftx.training.settings import TrainerSettings, TrainingSettings, refuse


@dataclass
class PhaseResult:
    """What a fit gave; the module holds the best weights when it is returned.

    Attributes:
        best_score: best value of the monitored validation metric.
        best_step: optimizer step it was reached at.
        steps: optimizer steps run.
        seconds: wall time of the fit.
        peak_memory: bytes, the largest so far: allocated on the GPU where there is one, else resident in the process.
        profile: median seconds a batch spends on ``data``, ``forward``, ``head``, ``backward`` and ``optimizer``, where
            ``trainer.profile`` asked for it.
        tokens_per_second: tokens that are no padding, over the wall time of training (validation left out).
        history: one dict for each record of the training loss and each validation, all with ``step``.
        checkpoint: file of the best weights (what was trained, keys as ``Encoder.trained``).
        padding: share of padding among all tokens trained on.
        train_examples: rows or blocks of the training data.
    """

    best_score: float
    best_step: int
    steps: int
    seconds: float
    tokens_per_second: float
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
        scratch: folder of this phase's checkpoint; nothing is written elsewhere.
        seed: decides the order of the data, the masking and dropout.
        loggers: Lightning loggers of this phase.
        label: how progress bar and errors name the phase.

    Raises:
        DeftxError: settings out of range, no accelerator, or a loss that is not finite.
    """
    refuse(settings)
    refuse(trainer)
    accelerator = _accelerator(trainer)
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
    checkpoint = ModelCheckpoint(
        dirpath=scratch,
        filename="best",
        monitor=module.monitor,
        mode=module.mode,
        save_top_k=1,
        save_weights_only=True,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    record = _Record(settings, label or "training", seed, steps, checkpoint, loggers)
    callbacks: list[pl.Callback] = [record, checkpoint]
    if callback is not None:
        callbacks.insert(0, callback)
    if trainer.progress and sys.stderr.isatty():
        callbacks.append(_Progress(label or "training", steps, module.monitor))
    parts = StepProfile() if trainer.profile else None
    if parts is not None:
        callbacks.append(parts)
    interval = (settings.eval_every or epoch) * settings.accumulate
    with _surroundings(trainer), computing(module, trainer):
        fitter = pl.Trainer(
            accelerator=accelerator,
            devices=trainer.devices,
            precision=trainer.precision,  # type: ignore[arg-type]
            max_steps=steps,
            max_epochs=1,
            accumulate_grad_batches=settings.accumulate,
            val_check_interval=interval,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic="warn" if trainer.deterministic else None,
            default_root_dir=scratch,
        )
        started = time.perf_counter()
        handler = signal.getsignal(signal.SIGINT)
        try:
            fitter.fit(module, datamodule=data_module)
        except SystemExit as stop:
            # Lightning's answer to Ctrl-C: it ignores further ones and exits with 1, as if the run had failed.
            with contextlib.suppress(ValueError):  # only the main thread may
                signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from stop
        except OSError as error:
            raise DeftxError(
                f"{label or 'training'}: cannot write the checkpoint in {scratch}: {error.strerror or error}; "
                "free space or choose another cache folder, then run again"
            ) from error
        seconds = time.perf_counter() - started
    best = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
    module.load_trained(best["state_dict"])
    module.zero_grad(set_to_none=True)
    training_seconds = max(1e-9, seconds - record.validation_seconds)
    return PhaseResult(
        best_score=float(checkpoint.best_model_score),  # type: ignore[arg-type]
        best_step=int(best["global_step"]),
        steps=int(fitter.global_step),
        seconds=seconds,
        tokens_per_second=record.tokens / training_seconds,
        history=record.history,
        checkpoint=Path(checkpoint.best_model_path),
        padding=1.0 - record.tokens / max(1, record.cells),
        train_examples=data_module.examples,
        peak_memory=_peak_memory(accelerator),
        profile=parts.medians() if parts is not None else {},
    )


class _Record(pl.Callback):
    """Seeds each batch, keeps the history, looks for NaN now and then, and asks for the last step's validation."""

    def __init__(
        self,
        settings: TrainingSettings,
        label: str,
        seed: int,
        steps: int,
        checkpoint: ModelCheckpoint,
        loggers: Sequence[Any],
    ) -> None:
        super().__init__()
        self.settings, self.label, self.seed, self.steps = settings, label, seed, steps
        self.checkpoint, self.loggers = checkpoint, list(loggers)
        self.history: list[dict[str, float]] = []
        self.tokens = 0
        self.cells = 0
        self.validation_seconds = 0.0
        self._validation_started = 0.0
        self._logged_step = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(_seed(self.seed, "dropout", batch_idx, trainer.global_rank))
        self.tokens += batch["tokens"]
        self.cells += batch["input_ids"].numel()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.settings.accumulate:
            return
        step = trainer.global_step
        if step % self.settings.log_every == 0 or step >= self.steps:
            self._check(pl_module)
            loss = pl_module.take_loss(step - self._logged_step)
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._add(step, {"train/loss": loss, "train/lr": float(rate)})
            self._logged_step = step
        if step >= self.steps:
            trainer.should_stop = True  # makes Lightning validate after the last step, whatever the interval

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._check(pl_module)
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._add(trainer.global_step, metrics)
        self.validation_seconds += time.perf_counter() - self._validation_started
        if not all(math.isfinite(value) for value in metrics.values()):
            self._fail(trainer.global_step, "the validation loss is not finite")

    def _add(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append({"step": step, **metrics})
        for logger in self.loggers:
            logger.log_metrics(metrics, step)
            logger.save()  # now: a phase that is killed leaves its curve

    def _check(self, module: Encoder) -> None:
        step = int(module.first_bad)
        if step >= 0:
            self._fail(step, "the loss or its gradient is not finite (NaN or infinity)")

    def _fail(self, step: int, what: str) -> None:
        kept = self.checkpoint.best_model_path
        last = (
            f"the last good checkpoint is kept: {kept}"
            if kept
            else "there is no good checkpoint yet (no validation came before)"
        )
        raise DeftxError(
            f"{self.label}: {what} at step {step} of {self.steps}; {last}\n"
            "next: lower learning_rate, or look at the data of that step"
        )


class _Progress(pl.Callback):
    """A rich progress bar with the phase's label; reads nothing from the device but the validation score."""

    def __init__(self, label: str, steps: int, monitor: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        self.steps, self.monitor = steps, monitor
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[score]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(label, total=steps, score="")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.bar.update(self.task, completed=trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None:
            self.bar.update(self.task, score=f"{self.monitor} {float(score):.4f}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.bar.stop()


@contextlib.contextmanager
def computing(module: Encoder, trainer: TrainerSettings) -> Iterator[None]:
    """The encoder compiled, or recomputing its layers in backward, for the length of a fit.

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


def _peak_memory(accelerator: str) -> int:
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _accelerator(trainer: TrainerSettings) -> str:
    if trainer.accelerator == "gpu":
        if not torch.cuda.is_available():
            raise DeftxError("accelerator is gpu, but torch sees no CUDA device; use accelerator=cpu or auto")
        return "cuda"
    if trainer.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return trainer.accelerator


def _seed(*parts: Any) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


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
