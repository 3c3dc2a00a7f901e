"""Cross entropy over a large vocabulary whose logits are never kept.

A masked language model's decoder is frozen (docs/method.md), so backward needs nothing of the logits but the gradient
of the decoder's input and bias, and both are known as soon as the logits are. With p = softmax(z), z = h Wᵀ + b and
q = p − onehot(target): ∂/∂h Σ -log p_target = q W and ∂/∂b = Σ_rows q. They are computed in forward, some rows at a
time in one buffer; the softmax is normalised after the product with W instead of before. In float32 alone: under
autocast the model's own way is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE = 1 << 24  # logits from which on it pays; below, autograd's way is as fast
_BUFFER = 1 << 27  # logits held at a time


def frozen_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy of ``hidden @ weight.T + bias``, differentiable in ``hidden`` and ``bias`` alone.

    Equals ``cross_entropy(..., reduction="sum")`` up to the rounding of float32 sums in another order. Extra memory:
    at most 2²⁷ logits (512 MiB), or one row of them.

    Args:
        hidden: float32 [N, H].
        weight: float32 [V, H]; gets no gradient.
        bias: float32 [V].
        targets: int64 [N], each in [0, V).

    Returns:
        float32 scalar; 0 for N = 0.
    """
    total: Tensor = _FrozenCrossEntropy.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return total


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        from_hidden, from_bias = torch.empty_like(hidden), torch.zeros_like(bias)
        step = min(hidden.shape[0], max(1, _BUFFER // weight.shape[0]))
        buffer = hidden.new_empty(step, weight.shape[0])
        for start in range(0, hidden.shape[0], step or 1):
            rows = slice(start, start + step)
            target = targets[rows]
            logits = torch.addmm(bias, hidden[rows], weight.T, out=buffer[: target.numel()])
            aimed = logits.gather(1, target[:, None])
            largest = logits.amax(1, keepdim=True)
            mass = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (mass.log() + (largest - aimed)).sum()
            logits.scatter_add_(1, target[:, None], -mass)  # mass times (p - onehot), before sums that would cancel
            torch.mm(logits, weight, out=from_hidden[rows]).div_(mass)
            from_bias += torch.mv(logits.T, mass.reciprocal().flatten())
        ctx.save_for_backward(from_hidden, from_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from_hidden, from_bias = ctx.saved_tensors
        return from_hidden * gradients[0], None, from_bias * gradients[0], None
