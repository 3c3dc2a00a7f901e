"""Where the time of a training step goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

PARTS = ("data", "forward", "head", "backward", "optimizer")


class StepProfile(pl.Callback):
    """Times the parts of every batch: data, forward (the encoder), head (and loss), backward, optimizer.

    ``head`` holds the decoder's share of backward where the loss keeps no logits (:mod:`~deftx.training.vocabulary`),
    ``optimizer`` holds L1, clipping and the step; ``data`` is the wait for the next batch. On a GPU each mark waits for
    the device, which costs a little speed: profiled runs are for looking, not for comparing totals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self._last = 0.0
        self._encoded = 0.0
        self._hook: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Watch the encoder's forward."""
        self._hook = pl_module.model.base_model.register_forward_hook(lambda *_: self._mark_encoded())
        self._last = self._now()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """End of ``data``."""
        self._end("data")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        """End of ``head``; the encoder's forward ended where its hook ran."""
        now = self._now()
        self.seconds["forward"].append(self._encoded - self._last)
        self.seconds["head"].append(now - self._encoded)
        self._last = now

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """End of ``backward``."""
        self._end("backward")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End of ``optimizer``."""
        self._end("optimizer")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Validation is nobody's part."""
        self._last = self._now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop watching."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _mark_encoded(self) -> None:
        if torch.is_grad_enabled():  # validation runs under no_grad
            self._encoded = self._now()

    def _end(self, part: str) -> None:
        now = self._now()
        self.seconds[part].append(now - self._last)
        self._last = now

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return median seconds a batch spends on each part; the first batch is left out where there are others."""
    return {part: round(statistics.median(values[1:] or values), 6) for part, values in seconds.items() if values}
