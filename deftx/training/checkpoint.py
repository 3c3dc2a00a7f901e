"""What a phase keeps on disk: its best weights, and a state it resumes from with the same bits.

A state holds what the rest of a fit depends on: trained tensors, optimizer, schedule, step, best score, record. Batches
and dropout are functions of (seed, batch number), so no random state belongs to it. It is taken between optimizer
steps; one taken before the validation due after its step says so. The last state holds no tensors: best file and
record are all that is left of a finished phase.

A state names its best file, and another best file is removed only after the state that needs it no longer is on disk:
whenever the process dies, what is found fits together. Files appear whole (temporary file, fsync, rename), and a state
that is damaged or belongs to another fit is left aside with a warning.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from deftx import atomic
from deftx.errors import DeftxError
from deftx.training.modules import Encoder
from deftx.training.profile import StepProfile
from deftx.training.record import FitRecord

RESUME = "resume.ckpt"
_FORMAT = 1
_STALE = 900.0  # seconds after which an unfinished file has no writer any more
_SHARE = 20.0  # a state costs at most a twentieth of the time
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)

log = logging.getLogger(__name__)


class Checkpoints(pl.Callback):
    """Keeps the best weights and, now and then, a state; a fit that finds its own state goes on from there.

    Attributes:
        best_score: best value of the monitored metric so far, None before the first validation.
        best_step: optimizer step it was reached at.
        best_file: its weights.
        outcome: the last state, once the fit has come to its end.
    """

    def __init__(
        self,
        folder: Path,
        record: FitRecord,
        *,
        minutes: float,
        every: int,
        facts: Mapping[str, Any],
        profile: StepProfile | None,
        peak_memory: Callable[[], int],
    ) -> None:
        """Say where files go and what a state belongs to.

        Args:
            folder: of this phase alone.
            record: of the same fit.
            minutes: of training between two states; 0 keeps one after every step.
            every: optimizer steps between validations.
            facts: what a state must agree on; the model's weights and the trained tensors are added here.
            profile: of the same fit, if it has one.
            peak_memory: gives the bytes used so far.
        """
        super().__init__()
        self.folder, self.record, self.minutes, self.every = folder, record, minutes, every
        self.facts, self.profile, self.peak_memory = dict(facts), profile, peak_memory
        self.best_score: float | None = None
        self.best_step = 0
        self.best_file: Path | None = None
        self.outcome: dict[str, Any] | None = None
        self._named: str | None = None  # the best file that the state on disk names
        self._trained: dict[str, torch.nn.Parameter] = {}
        self._loss_sum = torch.tensor(0.0)
        self._step = 0
        self._validated = 0  # the step of the last validation
        self._started = self._written = time.perf_counter()
        self._seconds = 0.0  # of earlier attempts
        self._peak = 0
        self._cost = 0.0

    # What the fit does.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from a state where there is one: the model holds θ⁰ and the optimizer is made."""
        assert isinstance(pl_module, Encoder)
        self._started = self._written = time.perf_counter()
        self._trained = pl_module.trained()
        self.facts["start"] = _digest(dict(pl_module.model.named_parameters()))
        self.facts["selection"] = _digest(pl_module.selection or {})
        self.facts["trained"] = {name: list(p.shape) for name, p in self._trained.items()}
        state = self._own_state()
        if state is not None:
            self._restore(state, trainer, pl_module)
        trainer.strategy.barrier()  # all have read
        if trainer.is_global_zero:
            self._tidy()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first batch of what is left: the validation that the last attempt was not given time for."""
        if self._validation_due():
            loop = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: a state, where it is time and no validation is due first."""
        if not self.record.between_steps(trainer):
            return
        assert isinstance(pl_module, Encoder)
        self._boundary(trainer, pl_module)
        if self._step < self.record.steps and not self._validation_due() and self._due():
            self._keep(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if they are the best, then a state if it is time; after the last step always."""
        assert isinstance(pl_module, Encoder)
        self._boundary(trainer, pl_module)
        self._validated = self._step
        score = float(trainer.callback_metrics[pl_module.monitor])
        if self.best_score is None or (score < self.best_score if pl_module.mode == "min" else score > self.best_score):
            self.best_score, self.best_step = score, self._step
            self.best_file = self.folder / f"best-{self._step}.ckpt"
            if trainer.is_global_zero:
                weights = {name: p.detach() for name, p in self._trained.items()}
                write(self.best_file, {"state_dict": weights, "global_step": self._step})
                self._tidy()
        if self._step >= self.record.steps:
            self._finish(trainer)
        elif self._due():
            self._keep(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep a state when the process is asked to end (SIGTERM), which Lightning does after a batch of any kind."""
        if isinstance(exception, SIGTERMException) and 0 < self._step < self.record.steps:
            self._keep(trainer)
            log.warning(
                "%s: asked to end (SIGTERM); stops at step %d of %d, run it again to go on from there",
                self.record.label,
                self._step,
                self.record.steps,
            )

    # Writing.

    def _boundary(self, trainer: pl.Trainer, module: Encoder) -> None:
        self._step = trainer.global_step
        self._loss_sum = module.loss_sum.detach().clone()

    def _validation_due(self) -> bool:
        return self._step > 0 and self._step % self.every == 0 and self._validated != self._step

    def _due(self) -> bool:
        return time.perf_counter() - self._written >= (60 * self.minutes + _SHARE * self._cost if self.minutes else 0)

    def _state(self) -> dict[str, Any]:
        assert self.best_file is None or self.best_score is not None
        self._peak = max(self._peak, self.peak_memory())
        best = None
        if self.best_file is not None:
            best = {"file": self.best_file.name, "step": self.best_step, "score": self.best_score}
        return {
            "format": _FORMAT,
            "facts": self.facts,
            "step": self._step,
            "validated": self._validated,
            "best": best,
            "record": self.record.state(),
            "profile": self.profile.seconds if self.profile is not None else None,
            "seconds": self._seconds + time.perf_counter() - self._started,
            "peak_memory": self._peak,
        }

    def _keep(self, trainer: pl.Trainer) -> None:
        """Write a state; a disk that has no room for it costs the chance to resume, not the phase."""
        if not trainer.is_global_zero:
            return
        began = time.perf_counter()
        state = self._state() | {
            "trained": {name: p.detach() for name, p in self._trained.items()},
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "loss_sum": self._loss_sum,
        }
        try:
            write(self.folder / RESUME, state)
        except OSError as error:
            log.warning(
                "%s: no state to resume from could be kept at step %d (%s); training goes on",
                self.record.label,
                self._step,
                error.strerror or error,
            )
        else:
            self._named = self.best_file.name if self.best_file is not None else None
            self._tidy()
        self._written = time.perf_counter()
        self._cost = self._written - began

    def _finish(self, trainer: pl.Trainer) -> None:
        self.record.gather(trainer)
        self.outcome = self._state()
        if trainer.is_global_zero:
            write(self.folder / RESUME, self.outcome)
            self._named = self.outcome["best"]["file"]
            self._tidy()

    def _tidy(self) -> None:
        """Remove best files that neither this fit nor the state on disk needs, and what killed writers left."""
        needed = {self._named, self.best_file.name if self.best_file is not None else None}
        for path in self.folder.glob("best-*.ckpt"):
            if path.name not in needed:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
            except FileNotFoundError:
                continue

    # Reading.

    def _own_state(self) -> dict[str, Any] | None:
        """Return the state on disk if it is whole and this fit's own; warn if there is one and it is not."""
        path = self.folder / RESUME
        if not path.exists():
            return None
        try:
            state = read(path)
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']!r}")
            facts = state["facts"]
            other = [name for name in {**facts, **self.facts} if facts.get(name) != self.facts.get(name)]
            best = state["best"]
            if not other and best is not None:
                read(self.folder / best["file"])
        except _UNREADABLE as error:
            problem = f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        else:
            if not other:
                return state
            problem = f"belongs to another fit (other: {', '.join(sorted(other))})"
        log.warning("%s: the state in %s %s; starts from the beginning", self.record.label, path, problem)
        return None

    def _restore(self, state: Mapping[str, Any], trainer: pl.Trainer, module: Encoder) -> None:
        self._step = step = int(state["step"])
        self._validated = state["validated"]
        if state["best"] is not None:
            self.best_file = self.folder / state["best"]["file"]
            self.best_step, self.best_score = state["best"]["step"], state["best"]["score"]
            self._named = self.best_file.name
        self._seconds, self._peak = state["seconds"], state["peak_memory"]
        if self.profile is not None and state["profile"] is not None:
            self.profile.seconds = {part: list(values) for part, values in state["profile"].items()}
        self.record.restore(state["record"])
        if step >= self.record.steps:
            self.outcome = dict(state)
            log.info("%s: was already finished (%d steps)", self.record.label, step)
        else:
            module.load_trained(state["trained"])
            module.loss_sum.copy_(state["loss_sum"])
            self._loss_sum = module.loss_sum.clone()
            trainer.optimizers[0].load_state_dict(state["optimizer"])
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(state["schedule"])
            log.warning("%s: resumes at step %d of %d", self.record.label, step, self.record.steps)
        _count(trainer, step)


def _count(trainer: pl.Trainer, step: int) -> None:
    """Let Lightning's totals say that ``step`` optimizer steps are done; its epoch is then the rest of the stream.

    Lightning's own restart flags are left alone: they are for checkpoints in the middle of its epoch.
    """
    loop = trainer.fit_loop.epoch_loop
    for total, count in (
        (loop.automatic_optimization.optim_progress.optimizer.step.total, step),
        (loop.batch_progress.total, step * trainer.accumulate_grad_batches),
    ):
        total.reset()
        total.increment_by(count)
    loop._batches_that_stepped = step


def write(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a checkpoint that is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with atomic.file(path) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(dict(payload), stream)
        except RuntimeError as error:  # torch hides the reason of a failed write
            raise (error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error))) from error


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU; tensors and plain values only, every byte checked.

    Raises:
        OSError, ValueError and others: the file is no such checkpoint.
    """
    with zipfile.ZipFile(path) as archive:  # torch writes the sums and does not look at them
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"holds {type(content).__name__}")
    return content


def read_outcome(folder: Path, label: str) -> dict[str, Any]:
    """Return the last state of a fit that has ended in another process.

    Raises:
        DeftxError: it is not there, or damaged.
    """
    try:
        return read(folder / RESUME)
    except _UNREADABLE as error:
        raise DeftxError(f"{label}: the result cannot be read back from {folder}: {error}; run again") from error


def read_best(path: Path, label: str) -> dict[str, Any]:
    """Return the best weights of a fit that has ended.

    Raises:
        DeftxError: they are not there any more, or damaged.
    """
    try:
        return read(path)
    except _UNREADABLE as error:
        raise DeftxError(
            f"{label}: the best weights cannot be read back from {path}: {error}; was the folder changed by another "
            "process? run again"
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
