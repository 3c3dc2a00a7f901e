"""One sparse fine-tuning around two fits: snapshot, L1, select, rewind, freeze the rest, emit φ.

Full phase: everything in M and the head trains, pulled to its start by λ/P · (Σ|θ − θ⁰| + Σ|h − h⁰|). From its change
Δ the K coordinates with the largest |Δ̂| are selected (Δ̂: denoised for DeFT-X, Δ itself for LT-SFT). Sparse phase: the
model returns to (θ⁰, h⁰) bit for bit, and only those coordinates and the head train.

The two phases may run in one process (one callback, :meth:`SparseFineTuning.begin_sparse` between two fits) or
in two: :func:`full_state` is what to keep of the full phase, :func:`change_of` and :func:`select` turn it into a
selection for a freshly loaded model. θ⁰ is what the module holds when a fit starts, so a task SFT on θ⁰ + φ_S
needs nothing special.

Source: Ansell et al. (ACL 2022), section 3, and Simon & Jyothi (2025); the choices they leave are in docs/method.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from deftx.core.delta import SparseDelta
from deftx.core.denoise import Decomposition, MatrixReport, denoise
from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.errors import DeftxError
from deftx.training.modules import Encoder

_BLOCK = 1 << 18  # entries at a time


@dataclass
class Selection:
    """The K coordinates of M a sparse phase may change, and how denoising came to them.

    Attributes:
        indices: base name -> sorted flat indices, int64; every name of M, possibly empty.
        reports: one entry for each denoised matrix.
    """

    indices: dict[str, Tensor]
    reports: list[MatrixReport]

    @property
    def k(self) -> int:
        """How many coordinates are selected."""
        return sum(index.numel() for index in self.indices.values())


def full_state(module: Encoder) -> dict[str, Tensor]:
    """Return copies of what the full phase trained: M by base names, the head under ``head.<name>``; on the CPU."""
    named = {**module.maskable, **{f"head.{name}": p for name, p in module.head.items()}}
    return {name: _cpu_copy(parameter) for name, parameter in named.items()}


def change_of(state: Mapping[str, Tensor], module: Encoder) -> dict[str, Tensor]:
    """Return Δ = θ¹ − θ⁰ over M, float32.

    Args:
        state: θ¹, from :func:`full_state`.
        module: freshly loaded (and composed), it holds θ⁰.

    Raises:
        DeftxError: ``state`` is another model's.
    """
    lacking = sorted(set(module.maskable) - set(state))
    if lacking:
        raise DeftxError(
            f"the full phase's result lacks {len(lacking)} parameters of this model, such as {lacking[0]!r}"
        )
    return {name: state[name] - p.detach().cpu() for name, p in module.maskable.items()}


def select(
    change: Mapping[str, Tensor],
    *,
    rank: RankPolicy,
    residual: ResidualPolicy,
    k: int,
    exclude: Sequence[str] = (),
    decompositions: Mapping[str, Decomposition] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Denoise Δ and select the K coordinates with the largest |Δ̂|.

    Args:
        change: Δ over M, by base names.
        rank: rank policy; ``none`` is LT-SFT.
        residual: what of the higher-order part is kept.
        k: how many coordinates, over all parameters together.
        exclude: patterns of names that are not denoised.
        decompositions: known decompositions by name.
        progress: called with each matrix's name.
    """
    denoised, reports = denoise(
        change, rank, residual, exclude=exclude, decompositions=decompositions, progress=progress
    )
    return Selection(select_topk(denoised, k), reports)


class SparseFineTuning(pl.Callback):
    """Turns a fit of :class:`MaskedLM` or :class:`SequenceClassifier` into a phase of a sparse fine-tuning.

    Attributes:
        phase: ``"full"`` or ``"sparse"``.
        l1: λ of this phase.
        selection: flat indices by base name in the sparse phase.
    """

    def __init__(self, phase: str = "full", *, l1: float = 0.0, selection: Mapping[str, Tensor] | None = None) -> None:
        """Say which phase the next fit is.

        Args:
            phase: ``"full"`` or ``"sparse"``.
            l1: weight λ of the L1 distance to the start.
            selection: needed for ``"sparse"``; from :func:`select`.
        """
        super().__init__()
        if phase not in ("full", "sparse"):
            raise ValueError(f"phase is {phase!r}; available: full, sparse")
        if (phase == "sparse") != (selection is not None):
            raise ValueError("a selection belongs to the sparse phase, and to it alone")
        self.phase = phase
        self.l1 = l1
        self.selection = dict(selection) if selection is not None else None
        self._module: Encoder | None = None
        self._start: dict[str, Tensor] = {}  # θ⁰ and h⁰: all of M in the full phase, selected values in the sparse one
        self._start_selection: dict[str, Tensor] | None = None  # the selection self._start belongs to; None: all of M
        self._device_start: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}
        self._frozen: list[torch.nn.Parameter] = []
        self._weight = 0.0

    def begin_sparse(self, selection: Mapping[str, Tensor], *, l1: float = 0.0) -> None:
        """Make the next fit the sparse phase; it starts by rewinding the module to (θ⁰, h⁰)."""
        self.phase, self.l1, self.selection = "sparse", l1, dict(selection)

    def change(self) -> dict[str, Tensor]:
        """Return Δ = θ¹ − θ⁰ over M after a full phase, float32 on the CPU."""
        module = self._begun("full")
        return {name: p.detach().cpu() - self._start[name] for name, p in module.maskable.items()}

    def delta(self, metadata: Mapping[str, Any] | None = None) -> SparseDelta:
        """Return φ after a sparse phase: θ² − θ⁰ on the selection, and the trained head.

        Raises:
            RuntimeError: something outside the selection changed (a defect, never a user's mistake).
        """
        module = self._begun("sparse")
        self.verify()
        assert self.selection is not None
        indices, values, shapes = {}, {}, {}
        for name, index in self.selection.items():
            if index.numel():
                parameter = module.maskable[name].detach()
                indices[name] = index.cpu()
                values[name] = parameter.flatten()[index.to(parameter.device)].cpu() - self._start[name]
                shapes[name] = tuple(parameter.shape)
        head = {name: _cpu_copy(parameter) for name, parameter in module.head.items()}
        return SparseDelta(indices=indices, values=values, shapes=shapes, head=head, metadata=dict(metadata or {}))

    def verify(self) -> None:
        """Check, after a sparse phase, that every bit outside the selection and the head is the start's.

        Raises:
            RuntimeError: it is not.
        """
        module = self._begun("sparse")
        changed = [name for name, digest in self._outside(module).items() if digest != self._digests[name]]
        if changed:
            raise RuntimeError(f"parameters changed outside the selection: {', '.join(changed[:5])}")

    def rewind(self, module: Encoder) -> None:
        """Return the module of the last fit to (θ⁰, h⁰), bit for bit."""
        if self._module is not module:
            raise RuntimeError("only the module of the last fit can be rewound")
        if self._start_selection is None:
            module.load_trained(self._start)
            return
        module.load_trained({name: tensor for name, tensor in self._start.items() if name.startswith("head.")})
        with torch.no_grad():
            for name, index in self._start_selection.items():
                if index.numel():
                    flat = module.maskable[name].view(-1)
                    flat[index.to(flat.device)] = self._start[name].to(flat.device)

    # What the fit does around each phase.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before weights move to a device: snapshot (full), or rewind and freeze the rest (sparse)."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Encoder):
            raise TypeError(f"SparseFineTuning needs a MaskedLM or SequenceClassifier, not {type(pl_module).__name__}")
        self._begin(pl_module)

    def snapshot(self, module: Encoder) -> None:
        """Note what a fit that ran in other processes started from: the module holds it."""
        self._begin(module)
        self._release()

    def _begin(self, module: Encoder) -> None:
        if self.phase == "full":
            self._start, self._start_selection = _start_of(module), None
            module.selection = None
        else:
            self._begin_sparse(module)
        self._module = module
        self._device_start = {}
        self._weight = self.l1 / sum(parameter.numel() for parameter in module.model.parameters())

    def _begin_sparse(self, module: Encoder) -> None:
        assert self.selection is not None
        unknown = sorted(set(self.selection) - set(module.maskable))
        if unknown:
            raise DeftxError(
                f"the selection names {len(unknown)} parameters this model has not, such as {unknown[0]!r}"
            )
        if self._module is module:
            self.rewind(module)
        self._start_selection = self.selection
        self._start = {f"head.{name}": _cpu_copy(parameter) for name, parameter in module.head.items()}
        for name, parameter in module.maskable.items():
            index = self.selection.get(name)
            if index is None or not index.numel():
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
            else:
                self._start[name] = parameter.detach().flatten()[index.to(parameter.device)].cpu()
        module.selection = self.selection
        self._digests = self._outside(module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the L1 term, λ/P · sign(θ − θ⁰), once per optimizer step and before clipping."""
        if self._weight:
            assert isinstance(pl_module, Encoder)
            self.add_l1(pl_module)

    def add_l1(self, module: Encoder) -> None:
        """Add λ/P · sign(θ − θ⁰) to the gradient of everything that trains."""
        gathered = module.gradients.values if module.gradients is not None else {}
        for name, parameter in module.trained().items():
            selected, gradient = gathered.get(parameter), parameter.grad
            if selected is None and gradient is None:
                continue  # untouched by the loss, so still at its start
            start = self._device_start.get(name)
            if start is None:
                start = self._device_start[name] = self._start[name].to(parameter.device)
            value = parameter.detach()
            index = module._selections.get(parameter)
            if index is None:
                if gradient is not None:
                    _pull(gradient, value, start, self._weight)
                continue
            pull = torch.sign(value.view(-1).index_select(0, index) - start)
            if selected is not None:
                selected.add_(pull, alpha=self._weight)
            elif gradient is not None:
                if not gradient.is_contiguous():
                    gradient = parameter.grad = gradient.contiguous()
                flat = gradient.view(-1)
                flat.index_copy_(0, index, flat.index_select(0, index).add_(pull, alpha=self._weight))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give frozen parameters their gradients back; the module is as it was but for its values."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which Lightning leaves out after an error."""
        self._release()

    def _release(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self._device_start = {}
        if self._module is not None:
            self._module.end_fit()

    def _begun(self, phase: str) -> Encoder:
        if self._module is None or self.phase != phase:
            raise RuntimeError(f"call this after a fit of the {phase} phase")
        return self._module

    def _outside(self, module: Encoder) -> dict[str, str]:
        """Digest of each parameter's bits with the selected coordinates at their start; heads are left out.

        A digest, so that no second copy of θ⁰ has to stay in memory for the length of a phase.
        """
        names = {id(parameter): name for name, parameter in module.maskable.items()}
        heads = {id(parameter) for parameter in module.head.values()}
        digests = {}
        for full_name, parameter in module.model.named_parameters():
            if id(parameter) in heads:
                continue
            name = names.get(id(parameter), full_name)
            tensor = parameter.detach().cpu()
            index = (self.selection or {}).get(name)
            if index is not None and index.numel():
                tensor = tensor.clone()
                tensor.view(-1)[index.cpu()] = self._start[name]
            digests[full_name] = hashlib.sha256(tensor.contiguous().numpy()).hexdigest()
        return digests


def _start_of(module: Encoder) -> dict[str, Tensor]:
    """:func:`full_state`, but a frozen copy that the model itself holds, such as its decoder's, is not made twice.

    Nobody writes into a frozen parameter while a phase runs; a model that moves to a GPU leaves this storage behind.
    """
    maskable = {id(parameter) for parameter in module.maskable.values()}
    frozen = {
        parameter.shape: parameter.detach()
        for parameter in module.model.parameters()
        if parameter.dim() == 2 and not parameter.requires_grad and id(parameter) not in maskable
    }
    named = {**module.maskable, **{f"head.{name}": p for name, p in module.head.items()}}
    start = {}
    for name, parameter in named.items():
        twin = frozen.get(parameter.shape)
        same = twin is not None and _same_bits(twin, parameter.detach())
        start[name] = twin if twin is not None and same else _cpu_copy(parameter)
    return start


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or not (a.is_cpu and b.is_cpu and a.is_contiguous() and b.is_contiguous()):
        return False
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _pull(gradient: Tensor, value: Tensor, start: Tensor, weight: float) -> None:
    """Add weight · sign(value − start) to a gradient, block by block: the difference never leaves a CPU's cache."""
    if gradient.is_cuda or not (gradient.is_contiguous() and value.is_contiguous()):
        gradient.add_((value - start).sign_(), alpha=weight)
        return
    grad, now, before = gradient.view(-1), value.view(-1), start.view(-1)
    for first in range(0, grad.numel(), _BLOCK):
        part = slice(first, first + _BLOCK)
        grad[part].add_((now[part] - before[part]).sign_(), alpha=weight)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
