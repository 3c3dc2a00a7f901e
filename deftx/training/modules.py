"""The two LightningModules, on one small base: masked language model and sequence classifier.

The base owns what both phases share: which parameters train, AdamW or :class:`~deftx.core.optim.SparseAdamW`, linear
decay over the exact number of steps, clipping over what is trained (norm in float64), and a watch for NaN that never
waits for the device. The masked language model computes logits at the masked positions only: with 15 % of the tokens
masked and a vocabulary of 250k that is most of the step's time and memory. Of a vocabulary that large training keeps no
logits at all (:mod:`~deftx.training.vocabulary`).

A batch's ``normalizer`` is a share of the *step's* examples or masked tokens, so that a step computed in several
batches (accumulation) or on several devices has the gradient of the whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from deftx.core.delta import SparseDelta
from deftx.core.optim import SelectedGradients, SparseAdamW, clip_trained
from deftx.errors import DeftxError, did_you_mean
from deftx.training.encoder import (
    base_parameters,
    head_logits,
    head_parameters,
    maskable_parameters,
    model_inputs,
)
from deftx.training.metrics import TASK_METRICS, MacroF1
from deftx.training.parts import Parts
from deftx.training.settings import TrainerSettings, TrainingSettings
from deftx.training.vocabulary import LARGE, frozen_cross_entropy


class Encoder(Parts, pl.LightningModule, ABC):
    """A training model whose parameters are known as M (maskable) and head.

    Attributes:
        model: the transformers model.
        maskable: M, by base names. Fixed here: phases that freeze parameters for a while do not change it.
        head: trained head tensors, by full names.
        selection: flat indices by base name in the sparse phase, None elsewhere (set by ``SparseFineTuning``).
        gradients: where the sparse phase gathers selected gradients, None elsewhere.
        total_steps: optimizer steps of the fit, the length of the decay (see :meth:`begin_fit`).
        options: what the fit runs on; chooses between ways to compute the same.
        monitor: validation metric that chooses the checkpoint.
        mode: ``"min"`` or ``"max"``.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(self, model: Any, settings: TrainingSettings, *, everything: bool = False) -> None:
        """Keep the model and note what of it trains.

        Args:
            model: from :func:`~deftx.training.encoder.load_masked_lm` or ``load_classifier``.
            settings: learning rate, weight decay, clipping; plain values only.
            everything: train all parameters (pretraining), LayerNorm and a tied decoder included.
        """
        super().__init__()
        self.save_hyperparameters(asdict(settings))
        self.model = model
        self.settings = settings
        self.maskable: dict[str, nn.Parameter] = {} if everything else maskable_parameters(model)
        self.head: dict[str, nn.Parameter] = dict(model.named_parameters()) if everything else head_parameters(model)
        self.selection: dict[str, Tensor] | None = None
        self.gradients: SelectedGradients | None = None
        self.total_steps = 0
        self.options = TrainerSettings()
        self.strict_loading = False  # checkpoints hold what is trained
        self.first_bad: Tensor
        self.loss_sum: Tensor
        self._selections: dict[Tensor, Tensor] = {}
        self.register_buffer("first_bad", torch.tensor(-1), persistent=False)
        self.register_buffer("loss_sum", torch.tensor(0.0), persistent=False)

    def begin_fit(self, steps: int, options: TrainerSettings | None = None) -> None:
        """Set the length of the coming fit in optimizer steps, and forget what the last one noted.

        Dropout is switched on here: transformers loads models in evaluation mode, and Lightning keeps modes as
        it finds them.
        """
        self.train()
        self.total_steps = steps
        self.options = options or TrainerSettings()
        self.first_bad.fill_(-1)
        self.loss_sum.zero_()

    def on_phase_start(self, phase: str, steps: int) -> None:
        """Prepare a phase that :class:`~deftx.training.callback.SparseFineTuning` starts in a person's own Trainer."""
        self.begin_fit(steps, self.options)

    def selections(self) -> dict[Tensor, Tensor]:
        """Return parameter -> selected flat indices on its device; empty outside the sparse phase."""
        if self.selection is None:
            return {}
        return {self.maskable[n]: i.to(self.maskable[n].device) for n, i in self.selection.items() if i.numel()}

    def configure_optimizers(self) -> Any:
        """AdamW, or SparseAdamW where a selection is set; linear decay to zero over ``total_steps``."""
        settings = self.settings
        parameters = list(self.trained().values())
        self._selections = self.selections()
        if self.selection is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                fused=self.options.fused,
                foreach=None if self.options.fused else False,
            )
        else:
            self._gather_gradients()
            optimizer = SparseAdamW(
                parameters,
                selections=self._selections,
                gradients=self.gradients,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
            )
        warmup, total = settings.warmup_steps, max(1, self.total_steps)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return max(0.0, (total - step) / max(1, total - warmup))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _gather_gradients(self) -> None:
        several = self._trainer is not None and self.trainer.world_size > 1
        if not self.options.sparse_gradients or several:  # several devices reduce dense gradients
            return
        self.gradients = SelectedGradients(self._selections)
        embedding = self.model.get_input_embeddings()
        # The rows' gradient pays where a dense one would be zero nearly everywhere; a GPU zeroes faster than it sorts.
        if embedding.weight in self._selections and not embedding.weight.is_cuda and self.takes_sparse_rows():
            embedding.sparse = True

    def takes_sparse_rows(self) -> bool:
        """Return whether backward can give the embedding's gradient by rows."""
        return not self.options.compile

    def end_fit(self) -> None:
        """Let gradients be what torch makes them again."""
        self.selection = None
        if self.gradients is not None:
            self.gradients.remove()
            self.gradients = None
            self.model.get_input_embeddings().sparse = False

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip to ``clip_norm`` over what is trained (method.md, Sparse phase); a non-finite norm is noted."""
        if self.settings.clip_norm > 0:
            parameters = list(self.trained().values())
            self.note(clip_trained(parameters, self._selections, self.settings.clip_norm, self.gradients))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and free the gradients at once: Lightning would keep them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the batch's share of the step's loss."""
        loss: Tensor = self.loss(batch, reduction="sum") / batch["normalizer"]
        self.note(loss.detach())
        self.loss_sum += loss.detach()
        return loss

    @abstractmethod
    def loss(self, batch: Mapping[str, Any], *, reduction: str = "mean") -> Tensor:
        """Return the cross entropy of a batch, a scalar; ``reduction`` as in torch's ``cross_entropy``."""

    def note(self, value: Tensor) -> None:
        """Remember the first optimizer step whose ``value`` is not finite, without waiting for the device."""
        step = self.trainer.global_step + 1 if self._trainer is not None else 0
        bad = ~torch.isfinite(value) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, torch.full_like(self.first_bad, step), self.first_bad)

    def take_loss(self, steps: int) -> float:
        """Return the mean training loss of the last ``steps`` optimizer steps and start a new sum (waits)."""
        batches = max(1, steps * self.settings.accumulate)
        total = self.loss_sum
        if self._trainer is not None and self.trainer.world_size > 1:
            total = self.trainer.strategy.reduce(total.clone(), reduce_op="mean")
        mean = float(total) / batches
        self.loss_sum.zero_()
        return mean

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained only: the frozen decoder copy alone would double a multilingual base's file."""
        checkpoint["state_dict"] = {name: p.detach() for name, p in self.trained().items()}


class WeightedMean(Metric):
    """Mean over all examples (or tokens) of all batches and devices, in float64; NaN stays NaN.

    torchmetrics' own drops the weights (1.9, ``nan_strategy="disable"``), or waits for the device to look for NaN.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, weight: int) -> None:
        """Add a batch: its mean, and over how many."""
        self.total += mean.detach().double() * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean so far, float32."""
        return (self.total / self.weight).float()


class MaskedLM(Encoder):
    """Masked language model: mean cross entropy over the masked tokens, logits at those positions only.

    A batch holds ``input_ids`` int64 [B, T], ``positions`` int64 [N] into the flattened B·T tokens, ``targets`` int64
    [N], ``normalizer`` float32 scalar, and ``attention_mask`` [B, T] where there is padding.
    """

    def __init__(self, model: Any, settings: TrainingSettings, *, everything: bool = False) -> None:
        """See :class:`Encoder`; raises :class:`DeftxError` for a model without output embeddings."""
        super().__init__(model, settings, everything=everything)
        if model.get_output_embeddings() is None:
            raise DeftxError(f"masked language modelling needs output embeddings; {type(model).__name__} has none")
        self.val_loss = WeightedMean()

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return logits at the masked positions, [N, vocabulary]."""
        hidden = self.model.base_model(**model_inputs(batch)).last_hidden_state
        if not self.options.masked_logits:
            return head_logits(self.model, hidden).flatten(0, 1).index_select(0, batch["positions"])
        return head_logits(self.model, hidden.flatten(0, 1).index_select(0, batch["positions"]))

    def loss(self, batch: Mapping[str, Any], *, reduction: str = "mean") -> Tensor:
        """Return the cross entropy of the masked tokens."""
        if reduction == "sum" and self._keeps_no_logits(batch):
            decoder = self.model.get_output_embeddings()
            decoder.forward = lambda features: features  # families name the head's other layers differently
            try:
                features = self(batch)
            finally:
                del decoder.forward
            return frozen_cross_entropy(features, decoder.weight, decoder.bias, batch["targets"])
        return cross_entropy(self(batch).float(), batch["targets"], reduction=reduction)

    def _keeps_no_logits(self, batch: Mapping[str, Any]) -> bool:
        """Return whether this batch's loss is worth, and can be, computed with its gradient."""
        decoder = self.model.get_output_embeddings()
        weight = decoder.weight
        return (
            self.options.masked_logits
            and batch["targets"].numel() * weight.shape[0] >= LARGE
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(weight.device.type)
            and not weight.requires_grad
            and weight.dtype == torch.float32
            and decoder.bias is not None
        )

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the batch's masked tokens to ``val/loss``, the mean over all of them."""
        count = batch["targets"].numel()
        if count:
            self.val_loss.update(self.loss(batch), weight=count)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``."""
        self.log("val/loss", self.val_loss, logger=False)


class SequenceClassifier(Encoder):
    """Classifier over whole texts or pairs: cross entropy; macro-F1 or accuracy chooses the checkpoint.

    A batch holds ``input_ids`` int64 [B, T], ``labels`` int64 [B], ``normalizer`` float32 scalar, ``token_type_ids``
    where the tokenizer makes them, ``attention_mask`` [B, T] where there is padding. With several source languages it
    also says ``source``, and is computed on θ + φ_S of that language: the parameters stay θ (method.md, multi-source).
    """

    mode = "max"

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings,
        *,
        metric: str = "macro_f1",
        source_sfts: Sequence[SparseDelta] = (),
    ) -> None:
        """Keep model, metric and language SFTs; see :class:`Encoder`.

        Args:
            model: from :func:`~deftx.training.encoder.load_classifier`.
            settings: as there.
            metric: the task's, ``"macro_f1"`` or ``"accuracy"``.
            source_sfts: φ_S of each source language, in the order of the batches' ``source``. Empty: every batch is
                computed on what the model holds.

        Raises:
            DeftxError: an unknown metric.
        """
        super().__init__(model, settings)
        base = {id(parameter): name for name, parameter in base_parameters(model).items()}
        names = {base[id(p)]: name for name, p in model.named_parameters() if id(p) in base}
        self._shifts = [
            {names[name]: (index, sft.values[name]) for name, index in sft.indices.items()} for sft in source_sfts
        ]
        if metric not in TASK_METRICS:
            hint = did_you_mean(metric, TASK_METRICS)
            raise DeftxError(f"unknown task metric {metric!r}{hint}; available: {', '.join(TASK_METRICS)}")
        self.monitor = f"val/{metric}"
        classes = model.config.num_labels
        self.val_loss = WeightedMean()
        self.val_metrics = MetricCollection(
            {
                "val/macro_f1": MacroF1(classes, validate_args=False),
                "val/accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            },
            compute_groups=False,
        )

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return logits, [B, labels]."""
        inputs = model_inputs(batch)
        if self._shifts:
            output: Any = functional_call(self.model, self._shifted(batch["source"]), args=(), kwargs=inputs)
        else:
            output = self.model(**inputs)
        logits: Tensor = output.logits
        return logits

    def takes_sparse_rows(self) -> bool:
        """As for any; a shifted embedding is computed from the weight, which must get a dense gradient."""
        return not self._shifts and super().takes_sparse_rows()

    def _shifted(self, source: int) -> dict[str, Tensor]:
        """θ + φ_S by full name, for the parameters φ_S changes; its gradient with respect to θ is the identity."""
        parameters = dict(self.model.named_parameters())
        shifted = {}
        for name, (index, values) in self._shifts[source].items():
            parameter = parameters[name]
            moved = index.to(parameter.device), values.to(parameter.device)
            self._shifts[source][name] = moved
            shifted[name] = parameter.flatten().index_add(0, *moved).view_as(parameter)
        return shifted

    def loss(self, batch: Mapping[str, Any], *, reduction: str = "mean") -> Tensor:
        """Return the cross entropy of the batch's labels."""
        return cross_entropy(self(batch).float(), batch["labels"], reduction=reduction)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the batch to ``val/loss``, ``val/macro_f1`` and ``val/accuracy``."""
        logits = self(batch).float()
        labels = batch["labels"]
        self.val_loss.update(cross_entropy(logits, labels), weight=labels.numel())
        self.val_metrics.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the three metrics."""
        self.log("val/loss", self.val_loss, logger=False)
        self.log_dict(self.val_metrics, logger=False)
