"""AdamW that trains only selected coordinates and holds state for nothing else (docs/method.md, step 5).

For a parameter with a selection the step gathers gradient and value at the chosen coordinates, applies
AdamW's own sequence of operations to those K numbers and scatters the values back. What was not selected is
neither read nor written: weight decay and clipping cannot reach it, and its bits stay. With
:class:`SelectedGradients` the K gradients are gathered once, as backward makes them, and the dense gradient is
freed on the spot. Elementwise float operations do not
depend on where a number lies in a tensor, so the result equals a dense ``torch.optim.AdamW`` with masked
gradients and restored values, bit for bit; the tests hold both halves of that sentence. AdamW: Loshchilov &
Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from deftx.errors import DeftxError

_BLOCK = 1 << 17  # coordinates at a time: the temporaries stay in a CPU's cache
_BLOCK_CUDA = 1 << 26
_AT_ONCE = {"cuda": _BLOCK_CUDA}  # coordinates of many tensors: launching kernels one by one takes longest

Item = TypeVar("Item")


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
        gradients: where the gradients of partly trained parameters are gathered; None reads ``.grad``.
        lr: learning rate.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, applied to what is trained.

    Attributes:
        selections: as given, on the parameters' device.

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
        gradients: SelectedGradients | None = None,
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
        optimized = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter, index in selections.items():
            if parameter not in optimized:
                raise ValueError(f"a selection is for a tensor of shape {tuple(parameter.shape)} that is not optimized")
            if not parameter.is_contiguous():
                raise ValueError(f"a partly trained parameter of shape {tuple(parameter.shape)} is not contiguous")
            _check_selection(index, parameter)
        self.selections = {parameter: index.to(parameter.device) for parameter, index in selections.items()}
        self._gradients = gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, the gathered ones too."""
        super().zero_grad(set_to_none)
        if self._gradients is not None:
            self._gradients.values.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the selections when the optimizer is copied or pickled; a copy reads ``.grad``."""
        return {**super().__getstate__(), "selections": self.selections, "_gradients": None}

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
            for pieces in _batches(self._pieces(group), lambda piece: (piece.value, piece.step)):
                _update(group, pieces)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as of any optimizer, plus a digest of the selections that it belongs to."""
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
                index = self.selections.get(parameter)
                digest.update(b"whole" if index is None else index.numel().to_bytes(8, "little"))
                if index is not None:
                    digest.update(index.cpu().numpy().data)
        return digest.hexdigest()[:16]

    def _pieces(self, group: Mapping[str, Any]) -> Iterator[_Piece]:
        """Yield what one step updates of a group's parameters, block by block."""
        for parameter in group["params"]:
            gathered = self._gradients.values.get(parameter) if self._gradients is not None else None
            gradient = gathered if gathered is not None else parameter.grad
            index = self.selections.get(parameter)
            if gradient is None or (index is not None and not index.numel()):
                continue
            if gradient.is_sparse:
                raise ValueError("sparse gradients need SelectedGradients, or sparse=False for embeddings")
            if index is not None and index.device != parameter.device:  # the model moved after this optimizer was made
                index = self.selections[parameter] = index.to(parameter.device)
            state = self.state[parameter]
            if not state:
                like = parameter if index is None else parameter.view(-1)[: index.numel()]
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            state["step"] += 1
            yield from _pieces_of(parameter, gradient, state, index, gathered=gathered is not None)


class _Piece(NamedTuple):
    """Values that one step updates, of shape (n,) unless a parameter's memory layout forbids it."""

    value: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    step: float  # on the host, as in torch.optim.AdamW: no synchronization
    write: Callable[[Tensor], object]


def _update(group: Mapping[str, Any], pieces: Sequence[_Piece]) -> None:
    """AdamW's sequence of operations on pieces that are at the same step."""
    beta1, beta2 = group["betas"]
    rate, decay, step = float(group["lr"]), group["weight_decay"], pieces[0].step
    values, gradients, means, squares = (
        list(tensors) for tensors in zip(*(piece[:4] for piece in pieces), strict=True)
    )
    if decay != 0:
        torch._foreach_mul_(values, 1 - rate * decay)
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_addcdiv_(values, means, roots, value=-rate / (1 - beta1**step))
    for piece in pieces:
        piece.write(piece.value)


class SelectedGradients:
    """Gradients of the selected coordinates, gathered the moment backward has made a parameter's gradient.

    The dense gradient is freed at once (``.grad`` stays None), so that of all partly trained parameters together K
    numbers are held, and clipping, L1 and the step read and write those alone. The gradient of an embedding made with
    ``sparse=True`` is taken as it is: rows that did not occur cost nothing, and the bits are the dense gradient's.
    Several backward passes add up, as in ``.grad``. Not for distributed training, which reduces the dense gradients.

    Args:
        selections: as for :class:`SparseAdamW`; empty ones are left out.

    Attributes:
        values: by parameter, the gathered gradient, of shape (K,), in the order of the selection.
    """

    def __init__(self, selections: Mapping[Tensor, Tensor]) -> None:
        self.values: dict[Tensor, Tensor] = {}
        self._selections = {parameter: index for parameter, index in selections.items() if index.numel()}
        self._rows: dict[Tensor, Tensor] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self.gather)  # type: ignore[no-untyped-call]
            for parameter in self._selections
        ]

    def remove(self) -> None:
        """Let gradients gather in ``.grad`` again; what was gathered is forgotten."""
        for hook in self._hooks:
            hook.remove()
        self.values.clear()

    @torch.no_grad()
    def gather(self, parameter: Tensor) -> None:
        """Add the selected entries of a parameter's ``.grad`` to ``values``, and free it; what backward's hook does."""
        gradient, index = parameter.grad, self._selections.get(parameter)
        if gradient is None or index is None:
            return
        if index.device != gradient.device:
            index = self._selections[parameter] = index.to(gradient.device)
        if gradient.is_sparse:
            selected = self._from_rows(parameter, gradient, index)
        else:
            pieces = list(_gathered(gradient, index))
            selected = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        parameter.grad = None
        held = self.values.get(parameter)
        self.values[parameter] = selected if held is None else held.add_(selected)

    def _from_rows(self, parameter: Tensor, gradient: Tensor, index: Tensor) -> Tensor:
        """Return selected entries of a row-sparse gradient of a matrix; zero where the row did not occur."""
        width = parameter.shape[1]
        starts = self._rows.get(parameter)  # of each row's selected entries within the selection
        if starts is None:
            bounds = torch.arange(parameter.shape[0] + 1, device=index.device) * width
            starts = self._rows[parameter] = torch.searchsorted(index, bounds)
        # Occurrences are added up in order, as in a dense gradient: the same bits, which coalesce() would not give.
        rows, where = torch.unique(gradient._indices()[0], return_inverse=True)
        values = gradient._values().new_zeros(rows.numel(), width).index_add_(0, where, gradient._values())
        counts = starts[rows + 1] - starts[rows]
        total = int(counts.sum())
        # place of every selected entry of the rows that occurred: each row's run, one after the other
        shift = starts[rows] - (counts.cumsum(0) - counts)
        positions = torch.arange(total, device=index.device) + shift.repeat_interleave(counts, output_size=total)
        row_of = torch.arange(rows.numel(), device=index.device).repeat_interleave(counts, output_size=total)
        selected = torch.zeros(index.numel(), dtype=values.dtype, device=index.device)
        selected[positions] = values[row_of, index[positions] - rows[row_of] * width]
        return selected


def trained_norm(
    params: Iterable[Tensor], selections: Mapping[Tensor, Tensor], gradients: SelectedGradients | None = None
) -> Tensor:
    """L2 norm, in float64, of the gradients over what is trained.

    Args:
        params: parameters; those without a gradient are skipped.
        selections: flat indices by parameter, as for :class:`SparseAdamW`; other parameters count as a whole.
        gradients: where selected gradients were gathered, if they were.

    Returns:
        float64 scalar on the device of the first gradient; nothing waits for that device.
    """
    pieces = (
        piece
        for gradient, index in _trained_gradients(params, selections, gradients)
        for piece in _gathered(gradient, index)
    )
    norms = [
        norm
        for batch in _batches(pieces, lambda piece: (piece, None))
        for norm in torch._foreach_norm(batch, 2, dtype=torch.float64)
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm


def clip_trained(
    params: Iterable[Tensor],
    selections: Mapping[Tensor, Tensor],
    max_norm: float,
    gradients: SelectedGradients | None = None,
) -> Tensor:
    """Scale the gradients of what is trained, in place, so that their norm is at most ``max_norm``.

    The coefficient is that of ``torch.nn.utils.clip_grad_norm_``, min(1, max_norm / (norm + 1e-6)), from the
    float64 norm. Gradients outside the selections keep their values.

    Returns:
        The norm before clipping, as of :func:`trained_norm`; nothing waits for the device.
    """
    params = list(params)
    norm = trained_norm(params, selections, gradients)
    with torch.no_grad():
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if not coefficient.is_cuda and float(coefficient) == 1.0:
            return norm  # times 1 changes no bit; on a GPU, asking would wait for it
        trained = list(_trained_gradients(params, selections, gradients))
        whole = (gradient for gradient, index in trained if index is None)
        for batch in _batches(whole, lambda gradient: (gradient, gradient.dtype)):
            torch._foreach_mul_(batch, coefficient.to(batch[0].device, batch[0].dtype))
        for gradient, index in trained:
            if index is None:
                continue
            factor = coefficient.to(gradient.device, gradient.dtype)
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


def _batches(items: Iterable[Item], of: Callable[[Item], tuple[Tensor, object]]) -> Iterator[list[Item]]:
    """Batch what is computed at once: one item, or many where ``_AT_ONCE`` says so.

    Args:
        items: what is computed, each on one device.
        of: a tensor of an item, which tells device and size, and what else all items of a batch must share.
    """
    batch: list[Item] = []
    shared: object = None
    size = 0
    for item in items:
        tensor, kind = of(item)
        most = _AT_ONCE.get(tensor.device.type)
        if most is None:
            yield [item]
            continue
        if batch and ((tensor.device, kind) != shared or size + tensor.numel() > most):
            yield batch
            batch, size = [], 0
        batch.append(item)
        shared, size = (tensor.device, kind), size + tensor.numel()
    if batch:
        yield batch


def _pieces_of(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], index: Tensor | None, *, gathered: bool
) -> Iterator[_Piece]:
    """Yield value, gradient, both moments, and how to write the value back: block by block."""
    mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
    if index is None and not (parameter.is_contiguous() and gradient.is_contiguous()):
        yield _Piece(parameter, gradient, mean, square, step, lambda value: None)
        return
    values, grads = parameter.view(-1), gradient.reshape(-1)
    if index is None:
        mean, square = mean.view(-1), square.view(-1)
        for part in _parts(values.numel(), parameter.is_cuda):
            yield _Piece(values[part], grads[part], mean[part], square[part], step, lambda value: None)
        return
    for part in _parts(index.numel(), parameter.is_cuda):
        where = index[part]
        yield _Piece(
            values.index_select(0, where),
            grads[part] if gathered else grads.index_select(0, where),
            mean[part],
            square[part],
            step,
            lambda value, where=where: values.index_copy_(0, where, value),  # type: ignore[misc]
        )


def _trained_gradients(
    params: Iterable[Tensor], selections: Mapping[Tensor, Tensor], gradients: SelectedGradients | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield each gradient of what is trained, with the coordinates that count; None: all of them."""
    for parameter in params:
        if gradients is not None and parameter in gradients.values:
            yield gradients.values[parameter], None
            continue
        index = selections.get(parameter)
        if parameter.grad is not None and (index is None or index.numel()):
            yield parameter.grad, None if index is None else index.to(parameter.grad.device)


def _gathered(gradient: Tensor, index: Tensor | None) -> Iterator[Tensor]:
    """Yield what counts of a gradient, block by block: a float64 norm of the whole would convert a copy of it."""
    if index is None and not gradient.is_contiguous():
        yield gradient
        return
    flat = gradient.reshape(-1)
    for part in _parts(flat.numel() if index is None else index.numel(), gradient.is_cuda):
        yield flat[part] if index is None else flat.index_select(0, index[part])
