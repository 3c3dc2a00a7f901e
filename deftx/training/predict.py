"""Scores of a classifier on texts, and the task's metric.

Rows are sorted by length and padded to the longest of their batch, which on short texts saves most of the arithmetic;
logits come back in the order of the rows. The result does not depend on the batch size beyond float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from deftx.errors import DeftxError, did_you_mean
from deftx.training.encoder import model_inputs
from deftx.training.modules import TASK_METRICS


def predict(
    model: Any,
    texts: Sequence[str],
    text_pairs: Sequence[str | None] | None = None,
    *,
    tokenizer: Any,
    batch_size: int = 32,
    max_length: int = 128,
    device: str | torch.device | None = None,
) -> Tensor:
    """Return the classifier's logits for each row.

    Args:
        model: a :class:`~deftx.training.modules.SequenceClassifier` or its transformers model.
        texts: first texts.
        text_pairs: second texts, or None (missing values in every row count as None).
        tokenizer: the model's fast tokenizer.
        batch_size: rows computed at once.
        max_length: tokens a row is truncated to, the longer of a pair first.
        device: where to compute; None stays where the model is. The model stays there.

    Returns:
        float32 [rows, labels] on the CPU, in the order of the rows.

    Raises:
        DeftxError: some rows have a second text and others have none.
    """
    network = getattr(model, "model", model)
    if device is not None:
        network.to(device)
    where = next(network.parameters()).device
    labels = int(network.config.num_labels)
    if not len(texts):
        return torch.empty(0, labels)
    second = None
    if text_pairs is not None:
        present = [isinstance(pair, str) for pair in text_pairs]
        if any(present) and not all(present):
            raise DeftxError(f"row {present.index(False)} has no second text (text_pair) while other rows have one")
        second = list(text_pairs) if all(present) else None
    encoded = tokenizer(
        list(texts),
        second,
        truncation="longest_first" if second is not None else True,
        max_length=max_length,
        padding=False,
    )
    # Longest first: the largest batch comes at once, and memory only falls from there.
    order = sorted(range(len(texts)), key=lambda row: (-len(encoded["input_ids"][row]), row))
    logits = torch.empty(len(texts), labels)
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                batch = _pad({name: [column[row] for row in rows] for name, column in encoded.items()}, tokenizer)
                inputs = model_inputs({name: tensor.to(where) for name, tensor in batch.items()})
                logits[torch.tensor(rows)] = network(**inputs).logits.float().cpu()
    finally:
        network.train(training)
    return logits


def _pad(columns: dict[str, list[list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    longest = max(len(row) for row in columns["input_ids"])
    padded = {
        name: torch.tensor([row + [fill[name]] * (longest - len(row)) for row in rows])
        for name, rows in columns.items()
        if name in fill
    }
    if all(len(row) == longest for row in columns["input_ids"]):
        padded.pop("attention_mask", None)
    return padded


def score(metric: str, logits: Tensor, labels: Tensor | Sequence[int], num_labels: int | None = None) -> float:
    """Return a task's metric, in [0, 1].

    Args:
        metric: ``"macro_f1"`` (unweighted mean of the labels' F1 scores) or ``"accuracy"``.
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
        return float(multiclass_f1_score(logits, target, num_classes=count, average="macro"))
    if metric == "accuracy":
        return float(multiclass_accuracy(logits, target, num_classes=count, average="micro"))
    hint = did_you_mean(metric, TASK_METRICS)
    raise DeftxError(f"unknown metric {metric!r}{hint}; available: {', '.join(TASK_METRICS)}")
