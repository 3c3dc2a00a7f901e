"""Logits of a classifier, and the task's metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from deftx.errors import DeftxError, did_you_mean
from deftx.training.encoder import model_inputs
from deftx.training.metrics import TASK_METRICS, confusion_of, macro_f1


def predict(model: Any, batches: Iterable[tuple[Sequence[int], Mapping[str, Any]]], *, rows: int) -> Tensor:
    """Return the classifier's logits for each row; they do not depend on the batches beyond float rounding.

    Args:
        model: a :class:`~deftx.training.modules.SequenceClassifier` or its transformers model, where it shall compute.
        batches: of each batch the places of its rows, and int64 [B, T] ``input_ids``, ``token_type_ids`` where the
            model has types, ``attention_mask`` where there is padding.
        rows: how many rows all batches hold.

    Returns:
        float32 [rows, labels] on the CPU.
    """
    network = getattr(model, "model", model)
    device = next(network.parameters()).device
    logits = torch.empty(rows, int(network.config.num_labels))
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            for row_indices, batch in batches:
                inputs = {name: tensor.to(device) for name, tensor in model_inputs(batch).items()}
                logits[torch.tensor(row_indices)] = network(**inputs).logits.float().cpu()
    finally:
        network.train(training)
    return logits


def score(metric: str, logits: Tensor, labels: Tensor | Sequence[int], num_labels: int | None = None) -> float:
    """Return a task's metric, in [0, 1].

    Args:
        metric: ``"macro_f1"`` (:func:`~deftx.training.metrics.macro_f1`) or ``"accuracy"``.
        logits: [rows, labels].
        labels: [rows], integer labels.
        num_labels: number of labels; None takes the logits' width.

    Raises:
        DeftxError: an unknown metric, or no rows.
    """
    target = torch.as_tensor(labels, dtype=torch.int64)
    if not len(target):
        raise DeftxError(f"{metric} of 0 rows is undefined; the test data is empty")
    count = num_labels or logits.shape[1]
    if metric == "macro_f1":
        return float(macro_f1(confusion_of(logits, target, count)))
    if metric == "accuracy":
        return float(multiclass_accuracy(logits, target, num_classes=count, average="micro"))
    hint = did_you_mean(metric, TASK_METRICS)
    raise DeftxError(f"unknown metric {metric!r}{hint}; available: {', '.join(TASK_METRICS)}")
