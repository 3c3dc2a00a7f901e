"""AdamW that trains only selected coordinates and holds state for nothing else (docs/method.md, step 5).

For a parameter with a selection the step gathers gradient and value at the chosen coordinates, applies
AdamW's own sequence of operations to those K numbers and scatters the values back. What was not selected is
neither read nor
written: weight decay and clipping cannot reach it, and its bits stay. Elementwise float operations do not
depend on where a number lies in a tensor, so the result equals a dense ``torch.optim.AdamW`` with masked
gradients and restored values, bit for bit; the tests hold both halves of that sentence. AdamW: Loshchilov &
Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from deftx.errors import DeftxError

_BLOCK = 1 << 18  # coordinates at a time: the temporaries stay in a CPU's cache
_BLOCK_CUDA = 1 << 26


class SparseAdamW(torch.optim.Optimizer):
    """AdamW over selected coordinates of some parameters and all of the others.

    Bitwise equal to ``torch.optim.AdamW(foreach=False, fused=False)`` whose gradients are zeroed, and whose
    values are restored after each step, outside the selection. State for a selection of K coordinates: two
    vectors of K values (in the parameter's dtype) and the K int64 indices. Gradients are never modified.

    Args:
        params: parameters or parameter groups, as for any optimizer.
        selections: for a parameter trained in part, the sorted flat indices trained (int64, shape (K,)); an
            empty one freezes the parameter. A parameter that is not a key, such as a head's, is trained as a
            whole.
        lr: learning rate.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, applied to what is trained.

    Raises:
        ValueError: a hyperparameter outside its range; a selection that is not sorted, repeats or exceeds
            its parameter, or belongs to no parameter of ``params``; a partly trained parameter that is not
            contiguous.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        *,
        selections: Mapping[Tensor, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        known = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter, index in selections.items():
            if parameter not in known:
                raise ValueError(f"a selection is for a tensor of shape {tuple(parameter.shape)} that is not optimized")
            if not parameter.is_contiguous():
                raise ValueError(f"a partly trained parameter of shape {tuple(parameter.shape)} is not contiguous")
            _check_selection(index, parameter)
        self._selections = {parameter: index.to(parameter.device) for parameter, index in selections.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Keep the selections when the optimizer is copied or pickled."""
        return {**super().__getstate__(), "_selections": self._selections}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update what is trained; parameters without a gradient are skipped.

        Args:
            closure: recomputes the loss with gradients enabled, and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                index = self._selections.get(parameter)
                if index is None:
                    self._update(group, parameter, None)
                elif index.numel():
                    if index.device != parameter.device:  # the model was moved after the optimizer was made
                        index = self._selections[parameter] = index.to(parameter.device)
                    self._update(group, parameter, index)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as of any optimizer, plus a digest of the selections that it belongs to."""
        return {**super().state_dict(), "selection": self._digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state made with the same selections.

        Raises:
            DeftxError: the state was made with other selections.
        """
        saved = state_dict.get("selection")
        if saved != self._digest():
            raise DeftxError(
                f"the optimizer state belongs to selection {saved}, this run selects {self._digest()}: "
                "K, the ranks or the full phase have changed; start the sparse phase afresh"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "selection"})

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                index = self._selections.get(parameter)
                digest.update(b"whole" if index is None else index.numel().to_bytes(8, "little"))
                if index is not None:
                    digest.update(index.cpu().numpy().data)
        return digest.hexdigest()[:16]

    def _update(self, group: dict[str, Any], parameter: Tensor, index: Tensor | None) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse:
            raise ValueError("sparse gradients are not supported: use sparse=False for embeddings")
        beta1, beta2 = group["betas"]
        rate, decay, eps = float(group["lr"]), group["weight_decay"], group["eps"]
        state = self.state[parameter]
        if not state:
            like = parameter if index is None else parameter.view(-1)[: index.numel()]
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        state["step"] += 1
        step = state["step"].item()  # on the host, as in torch.optim.AdamW: no synchronization
        step_size = rate / (1 - beta1**step)
        scale = (1 - beta2**step) ** 0.5
        for value, grad, mean, square, write in _pieces(parameter, gradient, state, index):
            if decay != 0:
                value.mul_(1 - rate * decay)
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            value.addcdiv_(mean, square.sqrt().div_(scale).add_(eps), value=-step_size)
            write(value)


def trained_norm(params: Iterable[Tensor], selections: Mapping[Tensor, Tensor]) -> Tensor:
    """L2 norm, in float64, of the gradients over what is trained.

    Args:
        params: parameters; those without a gradient are skipped.
        selections: flat indices by parameter, as for :class:`SparseAdamW`; other parameters count as a whole.

    Returns:
        float64 scalar on the device of the first gradient; nothing waits for that device.
    """
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64)
        for gradient, index in _trained_gradients(params, selections)
        for piece in _gathered(gradient, index)
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm


def clip_trained(params: Iterable[Tensor], selections: Mapping[Tensor, Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of what is trained, in place, so that their norm is at most ``max_norm``.

    The coefficient is that of ``torch.nn.utils.clip_grad_norm_``, min(1, max_norm / (norm + 1e-6)), from the
    float64 norm. Gradients outside the selections keep their values.

    Returns:
        The norm before clipping, as of :func:`trained_norm`; nothing waits for the device.
    """
    params = list(params)
    norm = trained_norm(params, selections)
    with torch.no_grad():
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient, index in _trained_gradients(params, selections):
            factor = coefficient.to(gradient.device, gradient.dtype)
            if index is None:
                gradient.mul_(factor)
                continue
            flat = gradient.view(-1) if gradient.is_contiguous() else gradient
            for part in _parts(index.numel(), gradient.is_cuda):
                where = index[part]
                if flat.dim() == 1:
                    flat.index_copy_(0, where, flat.index_select(0, where).mul_(factor))
                else:
                    flat.put_(where, flat.take(where).mul_(factor))
    return norm


def _check_selection(index: Tensor, parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"the selection for shape {shape} must be a vector of int64, not {index.dtype} {index.shape}")
    if index.numel():
        if int(index[0]) < 0 or int(index[-1]) >= parameter.numel():
            raise ValueError(f"the selection for shape {shape} holds indices outside its {parameter.numel()} entries")
        if not bool((index[1:] > index[:-1]).all()):
            raise ValueError(f"the selection for shape {shape} must be sorted, without repetition")


def _parts(count: int, is_cuda: bool) -> Iterator[slice]:
    size = _BLOCK_CUDA if is_cuda else _BLOCK
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _pieces(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], index: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], object]]]:
    """Value, gradient, both moments, and how to write the value back: block by block."""
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    if index is None and not (parameter.is_contiguous() and gradient.is_contiguous()):
        yield parameter, gradient, mean, square, lambda value: None
        return
    values, grads = parameter.view(-1), gradient.reshape(-1)
    if index is None:
        mean, square = mean.view(-1), square.view(-1)
        for part in _parts(values.numel(), parameter.is_cuda):
            yield values[part], grads[part], mean[part], square[part], lambda value: None
        return
    for part in _parts(index.numel(), parameter.is_cuda):
        where = index[part]
        yield (
            values.index_select(0, where),
            grads.index_select(0, where),
            mean[part],
            square[part],
            lambda value, where=where: values.index_copy_(0, where, value),  # type: ignore[misc]
        )


def _trained_gradients(
    params: Iterable[Tensor], selections: Mapping[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for parameter in params:
        index = selections.get(parameter)
        if parameter.grad is not None and (index is None or index.numel()):
            yield parameter.grad, None if index is None else index.to(parameter.grad.device)


def _gathered(gradient: Tensor, index: Tensor | None) -> Iterator[Tensor]:
    if index is None:
        yield gradient
        return
    flat = gradient.reshape(-1)
    for part in _parts(index.numel(), gradient.is_cuda):
        yield flat.index_select(0, index[part])
