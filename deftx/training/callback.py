"""The method, as one Lightning callback: snapshot, L1, denoise, select, rewind, mask, emit φ.

Full phase: everything in M and the head trains, pulled to its start by λ/P · (Σ|θ − θ⁰| + Σ|h − h⁰|). From its change
Δ the K coordinates with the largest |Δ̂| are selected (Δ̂: denoised for DeFT-X, Δ itself for LT-SFT). Sparse phase: the
model returns to (θ⁰, h⁰) bit for bit, and only those coordinates and the head train. θ⁰ is what the module holds when
the full phase starts, so a task SFT on θ⁰ + φ_S needs nothing special.

There are three ways to drive it, and they give the same bits:

- one fit: ``full_steps`` and ``sparse_steps`` are given, and one ``Trainer`` runs both phases;
- two fits of one module, with :meth:`SparseFineTuning.begin_sparse` between them;
- two processes, as the stages do: :meth:`SparseFineTuning.full_state` is what to keep of the full phase,
  :func:`change_of` and :meth:`SparseFineTuning.select` turn it into a selection for a freshly loaded module.

Source: Ansell et al. (ACL 2022), section 3, and Simon & Jyothi (2025); the choices they leave are in docs/method.md.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from deftx.core.delta import SparseDelta
from deftx.core.denoise import Decomposition, MatrixReport, decompose_all, denoise
from deftx.core.optim import SparseAdamW, clip_trained
from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.errors import DeftxError
from deftx.training.parts import FoundParts, Parts

_BLOCK = 1 << 18  # entries at a time
_LIGHTNING_EPOCHS = 1000  # what Lightning takes where no limit is given
_PRECISIONS = ("32-true", "bf16-mixed")
_NONE = torch.empty(0, dtype=torch.int64)

log = logging.getLogger(__name__)


def change_of(state: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Return Δ = θ¹ − θ⁰ over M, float32.

    Args:
        state: θ¹, from :meth:`SparseFineTuning.full_state`.
        parts: Holds θ⁰: one of deftx's modules, freshly loaded (and composed).

    Raises:
        DeftxError: ``state`` is another model's.
    """
    lacking = sorted(set(parts.maskable) - set(state))
    if lacking:
        raise DeftxError(
            f"the full phase's result lacks {len(lacking)} parameters of this model, such as {lacking[0]!r}"
        )
    return {name: state[name] - p.detach().cpu() for name, p in parts.maskable.items()}


class SparseFineTuning(pl.Callback):
    """Makes a fit, or two, a sparse fine-tuning of the encoder in a LightningModule.

    Each phase gets optimizers of its own (``configure_optimizers`` is called again) and keeps its best weights, by
    ``monitor``. Whatever the optimizer, coordinates outside the selection keep their bits. A module, or data module,
    that defines ``on_phase_start(phase, steps)`` is told before each phase.

    Attributes:
        phase: ``"full"`` or ``"sparse"``.
        selection: Flat indices by base name, int64 and sorted, in the sparse phase.
        reports: One entry for each matrix that was denoised.
    """

    def __init__(
        self,
        *,
        k: int | None = None,
        density: float | None = None,
        rank: str | int | RankPolicy | None = "energy:0.9",
        residual: str | float | ResidualPolicy = "prune:0.05",
        exclude: Sequence[str] = (),
        full_steps: int | None = None,
        sparse_steps: int | None = None,
        l1_full: float = 0.0,
        l1_sparse: float = 0.0,
        clip_norm: float = 0.0,
        monitor: str | None = None,
        mode: str = "min",
        encoder: str | None = None,
        selection: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Say what is kept, and how the phases train.

        Args:
            k: Coordinates that the SFT may change, over all parameters together.
            density: The same as a share of M; give one of the two where the callback selects.
            rank: Rank policy, as in :class:`~deftx.core.settings.RankPolicy`; ``"none"`` is LT-SFT.
            residual: What of the higher-order part is kept, as in :class:`~deftx.core.settings.ResidualPolicy`.
            exclude: Patterns of names that are not denoised.
            full_steps: Optimizer steps of the full phase, where one fit runs both.
            sparse_steps: Optimizer steps of the sparse phase, where one fit runs both.
            l1_full: Weight λ of the L1 distance to the start in the full phase.
            l1_sparse: The same in the sparse phase.
            clip_norm: Largest norm of the gradients of what trains, computed in float64; 0 does not clip. deftx's own
                modules clip themselves.
            monitor: Logged validation metric by which each phase keeps its best weights; None keeps the last.
            mode: ``"min"`` or ``"max"``: which value of ``monitor`` is the best.
            encoder: Path of the encoder in the module; None finds its only transformers model.
            selection: Makes the next fit the sparse phase of these flat indices by base name.

        Raises:
            DeftxError: A value lies outside its range, or only one of two that belong together is given.
        """
        super().__init__()
        self.k, self.density = k, density
        self.rank, self.residual, self.exclude = RankPolicy.parse(rank), ResidualPolicy.parse(residual), list(exclude)
        self.full_steps, self.sparse_steps = full_steps, sparse_steps
        self.l1_full, self.l1_sparse, self.clip_norm = l1_full, l1_sparse, clip_norm
        self.monitor, self.mode, self.encoder = monitor, mode, encoder
        self._check_settings()
        self.phase = "full" if selection is None else "sparse"
        self.selection = None if selection is None else dict(selection)
        self.reports: list[MatrixReport] = []
        self._module: pl.LightningModule | None = None
        self._parts: Parts | None = None
        self._start: dict[str, Tensor] = {}  # θ⁰ and h⁰: all of M in the full phase, selected values in the sparse one
        self._start_selection: dict[str, Tensor] | None = None  # the selection self._start belongs to; None: all of M
        self._device_start: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}
        self._frozen: list[nn.Parameter] = []
        self._weight = 0.0
        self._selections: dict[Tensor, Tensor] = {}  # on the parameters' device
        self._whole: dict[Tensor, Tensor] = {}  # θ⁰ of partly trained parameters, for optimizers that move them
        self._hooks: list[Any] = []
        self._best: tuple[float, int, dict[str, Tensor]] | None = None
        self._validated = -1
        self._interrupted = False
        self._selects = True  # whether select() chose the coordinates

    def _check_settings(self) -> None:
        if (self.full_steps is None) != (self.sparse_steps is None):
            raise DeftxError("full_steps and sparse_steps belong together: give both, or neither and two fits")
        if self.k is not None and self.density is not None:
            raise DeftxError(f"k={self.k} and density={self.density} say the same thing twice; give one of them")
        if self.full_steps is not None and self.k is None and self.density is None:
            raise DeftxError("one fit of both phases needs k (a whole number) or density (a share of M)")
        if self.mode not in ("min", "max"):
            raise DeftxError(f"mode={self.mode!r}: must be min or max")
        for name, smallest in (("k", 0), ("full_steps", 1), ("sparse_steps", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
                raise DeftxError(f"{name}={value!r}: must be a whole number of at least {smallest}")
        if self.density is not None and not 0 < self.density <= 1:
            raise DeftxError(f"density={self.density}: must lie in (0, 1]")
        for name in ("l1_full", "l1_sparse", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise DeftxError(f"{name}={getattr(self, name)}: must be at least 0")

    @property
    def l1(self) -> float:
        """λ of this phase."""
        return self.l1_full if self.phase == "full" else self.l1_sparse

    # From the full phase to the selection.

    def full_state(self) -> dict[str, Tensor]:
        """Return what the full phase trained: M by base names, the head under ``head.<name>``; copies on the CPU."""
        return {name: _cpu_copy(parameter) for name, parameter in self._begun("full").named().items()}

    def change(self) -> dict[str, Tensor]:
        """Return Δ = θ¹ − θ⁰ over M after a full phase, float32 on the CPU."""
        return {name: p.detach().cpu() - self._start[name] for name, p in self._begun("full").maskable.items()}

    def decompose(
        self, change: Mapping[str, Tensor], *, progress: Callable[[str], None] | None = None
    ) -> dict[str, Decomposition]:
        """Return the singular values and vectors of each matrix of Δ that is denoised.

        Args:
            change: Δ over M, by base names.
            progress: Called with each matrix's name.
        """
        return decompose_all(change, exclude=self.exclude, progress=progress)

    def denoised(
        self, change: Mapping[str, Tensor], *, decompositions: Mapping[str, Decomposition] | None = None
    ) -> dict[str, Tensor]:
        """Return Δ̂, and note in ``reports`` how each matrix came to its rank.

        Args:
            change: Δ over M, by base names.
            decompositions: Known ones by name; others are computed.
        """
        denoised, self.reports = denoise(
            change, self.rank, self.residual, exclude=self.exclude, decompositions=decompositions
        )
        return denoised

    def select(self, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the flat indices of the K largest |Δ̂|: int64, sorted, by base name, every name of M.

        Raises:
            DeftxError: Neither ``k`` nor ``density`` was given.
        """
        if self.k is None and self.density is None:
            raise DeftxError("selecting needs SparseFineTuning(k=...) or SparseFineTuning(density=...)")
        maskable = sum(tensor.numel() for tensor in change.values())
        k = self.k if self.k is not None else max(1, round(float(self.density or 0) * maskable))
        return select_topk(self.denoised(change), k)

    def begin_sparse(self, selection: Mapping[str, Tensor] | None = None) -> None:
        """Make the next fit the sparse phase; it starts by rewinding the module to (θ⁰, h⁰).

        Args:
            selection: Flat indices by base name; None selects from what the full phase changed.
        """
        chosen = self.select(self.change()) if selection is None else selection
        self.phase, self.selection, self._selects = "sparse", dict(chosen), selection is None

    def rewind(self) -> None:
        """Rewind the module of the last fit to (θ⁰, h⁰), bit for bit."""
        if self._parts is None:
            raise RuntimeError("only the module of a fit can be rewound")
        self._put(self._parts, self._start, self._start_selection)

    # What the sparse phase gives.

    def delta(self, metadata: Mapping[str, Any] | None = None) -> SparseDelta:
        """Return φ after a sparse phase: θ² − θ⁰ on the selection, and the trained head.

        Args:
            metadata: What its ``sft.json`` will say, plain JSON, such as ``{"kind": "language", "language": "xyz"}``.
                Of a module that is not deftx's, how it was made is added.

        Raises:
            RuntimeError: Something outside the selection changed (a defect, never a user's mistake).
        """
        parts = self._begun("sparse")
        self.verify()
        assert self.selection is not None
        indices, values, shapes = {}, {}, {}
        for name, index in self.selection.items():
            if index.numel():
                parameter = parts.maskable[name].detach()
                indices[name] = index.cpu()
                values[name] = parameter.flatten()[index.to(parameter.device)].cpu() - self._start[name]
                shapes[name] = tuple(parameter.shape)
        head = {name: _cpu_copy(parameter) for name, parameter in parts.head.items()}
        facts = {**self._facts(), **(metadata or {})}
        return SparseDelta(indices=indices, values=values, shapes=shapes, head=head, metadata=facts)

    def _facts(self) -> dict[str, Any]:
        if not isinstance(self._parts, FoundParts) or self.selection is None:
            return {}
        denoised = {"method": "deftx", "rank": str(self.rank), "residual": str(self.residual)}
        how = {"method": "ltsft"} if self.rank.kind == "none" else denoised
        return {
            "base_fingerprint": self._parts.base_fingerprint,
            **(how if self._selects else {}),  # of a selection that was given, nothing is known
            "k": sum(index.numel() for index in self.selection.values()),
            "maskable": sum(parameter.numel() for parameter in self._parts.maskable.values()),
        }

    def verify(self) -> None:
        """Check, after a sparse phase, that every bit outside the selection and the head is the start's.

        Raises:
            RuntimeError: It is not.
        """
        parts = self._begun("sparse")
        changed = [name for name, digest in self._outside(parts).items() if digest != self._digests[name]]
        if changed:
            raise RuntimeError(f"parameters changed outside the selection: {', '.join(changed[:5])}")

    # What the fit does around each phase.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before weights move to a device: snapshot (full), or rewind and freeze the rest (sparse)."""
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        if self.full_steps is not None:
            self._begin_both(trainer)
        self.begin(pl_module)
        self._announce_phase(trainer, pl_module)

    def snapshot(self, module: pl.LightningModule) -> None:
        """Note what a fit that ran in other processes started from: the module holds it."""
        self.begin(module)
        self._release()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizers are made and weights are where they train."""
        self.watch(trainer.optimizers[0])
        if self.full_steps is not None and self.sparse_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self.full_steps + self.sparse_steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the sparse phase before its first batch where one fit runs both."""
        if self.full_steps is not None and self.phase == "full" and trainer.global_step >= self.full_steps:
            self._finish_phase(trainer)
            self._start_sparse(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Once per optimizer step: gradients outside the selection go, the L1 term's come, then all are clipped."""
        parts = self._parts
        assert parts is not None
        if self._whole:
            self._mask_gradients()
        if self._weight:
            self.add_l1(parts)
        if self.clip_norm and isinstance(parts, FoundParts):
            clip_trained(parts.trained().values(), self._selections, self.clip_norm)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if they are the phase's best so far."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise DeftxError(
                f"monitor={self.monitor!r} was not logged in validation; available: {', '.join(sorted(metrics))}"
            )
        score = float(metrics[self.monitor])
        if not math.isfinite(score):
            raise DeftxError(
                f"{self.monitor} is {score} after step {trainer.global_step} of the {self.phase} phase; lower the "
                "learning rate, or look for rows that are empty"
            )
        self._validated = trainer.global_step
        if self._best is None or (score < self._best[0] if self.mode == "min" else score > self._best[0]):
            assert self._parts is not None
            self._best = score, trainer.global_step, self._values(self._parts, self.selection)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the phase's best weights in the module."""
        if self.full_steps is not None and self.sparse_steps is not None:
            total = self.full_steps + self.sparse_steps
            if trainer.global_step < total:
                raise DeftxError(
                    f"the fit ended after {trainer.global_step} of {total} optimizer steps, in the {self.phase} phase; "
                    "full_steps and sparse_steps alone decide the length, so leave out what stops it earlier"
                )
        self._finish_phase(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give frozen parameters their gradients back; an output embedding stays untied from the input embedding."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which Lightning leaves out after an error."""
        self._release()
        self._interrupted = True

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to train on from a checkpoint of Lightning's: it knows nothing of θ⁰ and of the selection.

        Raises:
            DeftxError: Always, in a fit.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        raise DeftxError(
            "SparseFineTuning does not resume from a checkpoint of Lightning's; start the fit again without ckpt_path, "
            "or let `deftx sft` train it, which resumes"
        )

    # Both phases in one fit.

    def _begin_both(self, trainer: pl.Trainer) -> None:
        assert self.full_steps is not None
        assert self.sparse_steps is not None
        total, loop = self.full_steps + self.sparse_steps, trainer.fit_loop
        if getattr(trainer, "fast_dev_run", False):
            raise DeftxError("fast_dev_run ends the fit early; leave it out, and try full_steps=1, sparse_steps=1")
        for name, value, fitting in (
            ("max_steps", loop.max_steps, (-1, total)),
            ("max_epochs", loop.max_epochs, (None, -1, _LIGHTNING_EPOCHS)),
        ):
            if value not in fitting:
                raise DeftxError(
                    f"Trainer({name}={value}) contradicts full_steps + sparse_steps = {total}; leave {name} out"
                )
        self.phase, self.selection = "full", None
        loop.max_epochs = -1
        loop.epoch_loop.max_steps = self.full_steps  # what configure_optimizers is told of the phase's length

    def _start_sparse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Select, rewind, and give the sparse phase optimizers of its own."""
        assert self.sparse_steps is not None
        log.info("full phase: %d steps; now denoises, selects and rewinds", trainer.global_step)
        self.begin_sparse()
        self._release(free_norms=False)
        self.begin(module)
        self._announce_phase(trainer, module)
        module.zero_grad(set_to_none=True)  # frozen parameters would keep theirs for the whole phase
        loop, total = trainer.fit_loop.epoch_loop, trainer.max_steps
        loop.max_steps = self.sparse_steps
        trainer.strategy.setup_optimizers(trainer)
        loop.max_steps = total
        self.watch(trainer.optimizers[0])

    def _finish_phase(self, trainer: pl.Trainer) -> None:
        """Validate where the last step was not, and take the best weights."""
        if self.monitor is None:
            return
        if self._validated != trainer.global_step and trainer.enable_validation:
            connector = trainer._logger_connector
            first = connector._first_loop_iter  # as Lightning's own validation within an epoch keeps it
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
            connector._first_loop_iter = first
        if self._best is None:
            raise DeftxError(f"monitor={self.monitor!r} chooses the best weights, and no validation ran")
        assert self._parts is not None
        score, step, values = self._best
        log.info("%s phase: best %s %.6g at step %d", self.phase, self.monitor, score, step)
        self._put(self._parts, values, self.selection)
        self._best, self._validated = None, -1

    # The parts of it.

    def _refuse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse what this callback cannot keep its promises with."""
        name = type(module).__name__
        if not module.automatic_optimization:
            raise DeftxError(f"{name} optimizes manually; SparseFineTuning needs automatic_optimization = True")
        if trainer.world_size > 1 and (self.full_steps is not None or not isinstance(module, Parts)):
            raise DeftxError(
                f"the Trainer has {trainer.world_size} devices; SparseFineTuning needs Trainer(devices=1) around "
                f"{name} (deftx run trainer.devices={trainer.world_size} trains on several)"
            )
        if trainer.precision not in _PRECISIONS:
            raise DeftxError(
                f"precision={trainer.precision}: SparseFineTuning needs float32 weights and gradients that are not "
                f"scaled; available: {', '.join(_PRECISIONS)}"
            )

    def begin(self, module: pl.LightningModule) -> None:
        """Start a phase: snapshot, or rewind and freeze the rest."""
        again, parts = self._module is module, self._parts
        if again and self.phase == "full" and self._interrupted:
            log.warning("the last fit of this module was interrupted; it starts from the weights that are left of it")
        self._best, self._validated, self._interrupted = None, -1, False
        if isinstance(module, Parts):
            parts = module
        elif not (again and isinstance(parts, FoundParts) and parts.frozen):
            fingerprint = parts.base_fingerprint if again and isinstance(parts, FoundParts) else None
            parts = FoundParts(module, self.encoder, base_fingerprint=fingerprint if self.phase == "sparse" else None)
        self._parts = parts
        if self.phase == "full":
            self._start, self._start_selection = _start_of(parts), None
            parts.selection = None
        else:
            self._begin_sparse(parts, again)
        self._module = module
        self._device_start = {}
        self._weight = self.l1 / sum(parameter.numel() for parameter in parts.model.parameters())

    def _begin_sparse(self, parts: Parts, again: bool) -> None:
        assert self.selection is not None
        unknown = sorted(set(self.selection) - set(parts.maskable))
        if unknown:
            raise DeftxError(
                f"the selection names {len(unknown)} parameters this model has not, such as {unknown[0]!r}"
            )
        if again:
            self._put(parts, self._start, self._start_selection)
        self._start_selection = self.selection
        self._start = {}
        for name, parameter in parts.maskable.items():
            index = self.selection.get(name)
            if index is None or not index.numel():
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
        self._start = self._values(parts, self.selection)
        parts.selection = self.selection
        self._digests = self._outside(parts)

    def _announce_phase(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Tell module and data module which phase starts, and how many optimizer steps it has."""
        steps = {"full": self.full_steps, "sparse": self.sparse_steps}[self.phase]
        if steps is None:
            steps = trainer.max_steps
        for listener in (module, getattr(trainer, "datamodule", None)):
            hook = getattr(listener, "on_phase_start", None)
            if not callable(hook):
                continue
            if steps < 0:  # Trainer(max_epochs=...)
                length = trainer.estimated_stepping_batches
                if not math.isfinite(length):
                    raise DeftxError("the length of the phase is not known; give Trainer(max_steps=...)")
                steps = int(length)
            hook(self.phase, steps)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer train this phase: what it moves outside the selection is put back after each step.

        Raises:
            DeftxError: It evaluates the loss itself, or trains nothing of the encoder.
        """
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise DeftxError(
                f"{type(optimizer).__name__} evaluates the loss several times in a step, where no mask and no L1 term "
                "would reach; use an optimizer whose step needs no closure, such as AdamW or SGD"
            )
        parts = self._parts
        assert parts is not None
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        wanted = [
            parameter
            for name, parameter in parts.maskable.items()
            if self.phase == "full" or ((self.selection or {}).get(name, _NONE).numel())
        ]
        if wanted and held.isdisjoint(map(id, wanted)):
            raise DeftxError(
                f"no parameter of the encoder in {type(parts.model).__name__} is in its optimizer; "
                "configure_optimizers has to give one optimizer of what requires gradients"
            )
        self._selections, self._whole = {}, {}
        if self.phase == "full" or self.selection is None:
            return
        if isinstance(optimizer, SparseAdamW):
            self._selections = optimizer.selections
        else:
            self._selections = {
                parts.maskable[name]: index.to(parts.maskable[name].device)
                for name, index in self.selection.items()
                if index.numel()
            }
            self._whole = {parameter: parameter.detach().clone() for parameter in self._selections}
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._restore()))

    def _mask_gradients(self) -> None:
        for parameter, index in self._selections.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise DeftxError("gradients of an embedding with sparse=True cannot be masked; use sparse=False")
            if not gradient.is_contiguous():
                gradient = parameter.grad = gradient.contiguous()
            flat = gradient.view(-1)
            selected = flat.index_select(0, index)
            flat.zero_().index_copy_(0, index, selected)

    @torch.no_grad()
    def _restore(self) -> None:
        """Put back the start's bits outside the selection: weight decay moves what has no gradient, too."""
        for parameter, whole in self._whole.items():
            index, flat = self._selections[parameter], parameter.view(-1)
            selected = flat.index_select(0, index)
            flat.copy_(whole.view(-1)).index_copy_(0, index, selected)

    def add_l1(self, parts: Parts) -> None:
        """Add λ/P · sign(θ − θ⁰) to the gradient of everything that trains."""
        gathered = parts.gradients.values if parts.gradients is not None else {}
        for name, parameter in parts.trained().items():
            selected, gradient = gathered.get(parameter), parameter.grad
            if selected is None and gradient is None:
                continue  # untouched by the loss of this step: an optimizer leaves it alone, too
            start = self._device_start.get(name)
            if start is None:
                start = self._device_start[name] = self._start[name].to(parameter.device)
            value = parameter.detach()
            index = self._selections.get(parameter)
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

    def _release(self, *, free_norms: bool = True) -> None:
        """Let frozen parameters train again, and forget what only a fit needs; ``free_norms`` frees the norms, too."""
        parts = self._parts
        norms = parts.frozen if free_norms and isinstance(parts, FoundParts) else []
        for parameter in [*self._frozen, *norms]:
            parameter.requires_grad_(True)
        norms.clear()
        self._frozen.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._device_start, self._selections, self._whole = {}, {}, {}
        if parts is not None:
            parts.end_fit()

    def _begun(self, phase: str) -> Parts:
        if self._parts is None or self.phase != phase:
            raise RuntimeError(f"call this after a fit of the {phase} phase")
        return self._parts

    @staticmethod
    def _values(parts: Parts, selection: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return copies, on the CPU, of what a phase trains: whole tensors, or the selected values [count]."""
        values = {f"head.{name}": _cpu_copy(parameter) for name, parameter in parts.head.items()}
        for name, parameter in parts.maskable.items():
            index = None if selection is None else selection.get(name)
            if selection is None:
                values[name] = _cpu_copy(parameter)
            elif index is not None and index.numel():
                values[name] = parameter.detach().flatten()[index.to(parameter.device)].cpu()
        return values

    @staticmethod
    def _put(parts: Parts, values: Mapping[str, Tensor], selection: Mapping[str, Tensor] | None) -> None:
        """Put back what :meth:`_values` gave."""
        if selection is None:
            parts.load_trained(values)
            return
        parts.load_trained({name: tensor for name, tensor in values.items() if name.startswith("head.")})
        with torch.no_grad():
            for name, index in selection.items():
                if index.numel():
                    flat = parts.maskable[name].view(-1)
                    flat[index.to(flat.device)] = values[name].to(flat.device)

    def _outside(self, parts: Parts) -> dict[str, str]:
        """Return the digest of each parameter's bits with the selected coordinates at their start; heads are left out.

        A digest, so that no second copy of θ⁰ has to stay in memory for the length of a phase.
        """
        names = {id(parameter): name for name, parameter in parts.maskable.items()}
        heads = {id(parameter) for parameter in parts.head.values()}
        digests = {}
        for full_name, parameter in parts.model.named_parameters():
            if id(parameter) in heads:
                continue
            name = names.get(id(parameter), full_name)
            tensor = parameter.detach().cpu()
            index = (self.selection or {}).get(name)
            if index is not None and index.numel():
                tensor = tensor.clone()
                tensor.view(-1)[index.cpu()] = self._start[name]
            digests[full_name] = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        return digests


def _start_of(parts: Parts) -> dict[str, Tensor]:
    """Copies of M and the head; a frozen twin that the model itself holds, such as its decoder's, is not made again.

    Nobody writes into a frozen parameter while a phase runs; a model that moves to a GPU leaves this storage behind.
    """
    maskable = {id(parameter) for parameter in parts.maskable.values()}
    frozen = {
        parameter.shape: parameter.detach()
        for parameter in parts.model.parameters()
        if parameter.dim() == 2 and not parameter.requires_grad and id(parameter) not in maskable
    }
    start = {}
    for name, parameter in parts.named().items():
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
