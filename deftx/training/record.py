"""What a fit tells: seeds of its batches, history, counts, a look for NaN, and a progress bar."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from deftx.errors import DeftxError
from deftx.heartbeat import Heartbeat, write_heartbeat
from deftx.seeds import seed_of
from deftx.training.modules import Encoder
from deftx.training.settings import TrainingSettings

log = logging.getLogger(__name__)

_FILE_SECONDS = 5.0
_LINE_SECONDS = 60.0


class FitRecord(pl.Callback):
    """Seeds each batch, keeps the history, looks for NaN now and then, and asks for the last step's validation.

    Batches are numbered over the whole phase, whatever part of it this process runs.

    Attributes:
        label: how messages name the fit.
        steps: optimizer steps of the phase.
        history: one dict for each record of the training loss and each validation, all with ``step``.
        tokens: tokens trained on, of complete steps, without padding; this device's until :meth:`gather`.
        cells: the same with padding.
        validation_seconds: time spent on validation.
        kept: gives the best weights' file, for messages.
    """

    def __init__(
        self, settings: TrainingSettings, label: str, seed: int, steps: int, loggers: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        self.settings, self.label, self.seed, self.steps = settings, label, seed, steps
        self.loggers = list(loggers)
        self.history: list[dict[str, float]] = []
        self.tokens = 0
        self.cells = 0
        self.validation_seconds = 0.0
        self.kept: Callable[[], Path | None] = lambda: None
        self._devices = 1
        self._step_tokens = 0
        self._step_cells = 0
        self._validation_started = 0.0
        self._logged_step = 0

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs, as of the last complete step; plain values."""
        return {
            "history": list(self.history),
            "tokens": self.tokens * self._devices,
            "cells": self.cells * self._devices,
            "validation_seconds": self.validation_seconds,
            "logged_step": self._logged_step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the loggers, which are new, get the history so far."""
        self.history = list(state["history"])
        self.tokens, self.cells = (state[name] // self._devices for name in ("tokens", "cells"))
        self.validation_seconds, self._logged_step = state["validation_seconds"], state["logged_step"]
        self.replay(self.loggers, self.history)

    def gather(self, trainer: pl.Trainer) -> None:
        """Count what all devices trained on; called on each of them."""
        if trainer.world_size > 1:
            counts = torch.tensor([self.tokens, self.cells], device=trainer.strategy.root_device)
            self.tokens, self.cells = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
            self._devices = 1

    @staticmethod
    def replay(loggers: Sequence[Any], history: Sequence[Mapping[str, float]]) -> None:
        """Tell a history to loggers that have not heard it."""
        for logger in loggers:
            for entry in history:
                metrics = {name: value for name, value in entry.items() if name != "step"}
                logger.log_metrics(metrics, int(entry["step"]))
            logger.save()

    def between_steps(self, trainer: pl.Trainer) -> bool:
        """Return whether the batch that just ended completed an optimizer step."""
        return (trainer.fit_loop.total_batch_idx + 1) % self.settings.accumulate == 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._devices = trainer.world_size

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(seed_of(self.seed, "dropout", trainer.fit_loop.total_batch_idx, trainer.global_rank))
        if trainer.fit_loop.total_batch_idx % self.settings.accumulate == 0:
            self._step_tokens = self._step_cells = 0
        self._step_tokens += batch["tokens"]
        self._step_cells += batch["input_ids"].numel()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.between_steps(trainer):
            return
        self.tokens += self._step_tokens
        self.cells += self._step_cells
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

    def _fail(self, step: int, event: str) -> None:
        checkpoint = self.kept()
        last = (
            f"the last good checkpoint is kept: {checkpoint}"
            if checkpoint is not None
            else "there is no good checkpoint yet (no validation came before)"
        )
        raise DeftxError(
            f"{self.label}: {event} at step {step} of {self.steps}; {last}\n"
            "next: lower learning_rate, or look at the data of that step"
        )


class Heartbeats(pl.Callback):
    """Tells how far a phase is: every few seconds a file beside the job's results, once a minute a line in the log.

    Reads nothing from the device.

    Args:
        record: What it tells of.
        file: The job's file; null writes none.
        line: Whether to write lines; a progress bar says the same.
    """

    def __init__(self, record: FitRecord, file: Path | None, *, line: bool) -> None:
        super().__init__()
        self._record, self._file, self._line = record, file, line
        self._began: tuple[float, int] | None = None
        self._written = self._logged = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, step = time.monotonic(), trainer.global_step
        if self._began is None:
            self._began = (now, step)
        due = [now - self._written >= _FILE_SECONDS, self._line and now - self._logged >= _LINE_SECONDS]
        if not any(due) or not trainer.is_global_zero:
            return
        began, first = self._began
        losses = (entry["train/loss"] for entry in reversed(self._record.history) if "train/loss" in entry)
        rate = (step - first) / (now - began) if now > began else None
        beat = Heartbeat(self._record.label, step, self._record.steps, next(losses, None), rate)
        if due[0]:
            write_heartbeat(beat, self._file)
            self._written = now
        if due[1]:
            log.info("%s", beat.line)
            self._logged = now


class ProgressBar(pl.Callback):
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
