"""The metrics of classification tasks; macro-F1 over the labels that the gold rows hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

TASK_METRICS = ("macro_f1", "accuracy")


def macro_f1(counts: Tensor) -> Tensor:
    """Return the unweighted mean of the F1 scores of the labels that the gold rows hold.

    A prediction of a label that no gold row holds is an error of the row's own label, and no class of its own: one
    stray prediction must not cost a whole class, and a label without rows has no score.

    Args:
        counts: Confusion counts [C, C]; rows are labels, columns predictions.

    Returns:
        A scalar in [0, 1], float32; NaN without rows.
    """
    counts = counts.double()
    gold, hits = counts.sum(dim=1), counts.diagonal()
    held = gold > 0
    return (2 * hits / (gold + counts.sum(dim=0)))[held].mean().float()


class MacroF1(MulticlassConfusionMatrix):
    """:func:`macro_f1` over all batches and devices."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the score so far, float32."""
        return macro_f1(super().compute())


def confusion_of(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the confusion counts, int64 [C, C], of logits [rows, C] and labels [rows]."""
    metric: Any = MulticlassConfusionMatrix(classes, validate_args=False)
    metric.update(logits, labels)
    return torch.as_tensor(metric.compute())
