"""One step of masked language modelling, in the full and in the sparse phase.

Ours is what ``fit_phase`` does for each step, without Lightning's loop: the masked positions' loss, fused AdamW or
SparseAdamW, clipping over what is trained. Plain is the reference recipe (Ansell et al. 2022, composable-sft):
``forward(labels=...)`` of transformers with logits at all positions, ``clip_grad_norm_``, ``torch.optim.AdamW`` as it
comes (a loop on a CPU, ``foreach`` on a GPU); in the sparse phase the gradients are multiplied with a dense mask first
(moments and weight decay are zero outside it, so there is nothing to restore). Both hold θ⁰, which Δ and φ need, in the
host's memory, both freeze LayerNorm and the decoder's copy, attend by sdpa, and are given the same weights, batch,
threads and autocast; the L1 term is left out of both.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import device, shapes
from benchmarks.harness import Goal, Row, Run, one_side, timed_row
from benchmarks.shapes import Batch, Shape
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import maskable_parameters
from deftx.training.modules import MaskedLM
from deftx.training.settings import TrainingSettings

LEARNING_RATE = 5e-5
CLIP = 1.0
Step = Callable[[Batch], Tensor]


def ours(model: Any, selection: Mapping[str, Tensor] | None = None) -> Step:
    """Deftx's step: the full phase, or the sparse one where a selection is given."""
    module = device.put(MaskedLM(model, TrainingSettings(learning_rate=LEARNING_RATE, clip_norm=CLIP)))
    phase = SparseFineTuning(selection=selection)
    hooks: Any = phase  # Lightning passes its trainer, which these hooks do not read
    hooks.begin(module)
    module.begin_fit(100_000)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def step(batch: Batch) -> Tensor:
        with device.autocast():
            loss: Tensor = module.training_step(batch, 0)
        module.optimizer_zero_grad(0, 0, optimizer)  # the other side may share the model and keep its gradients
        loss.backward()
        hooks.on_before_optimizer_step(None, module, optimizer)
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()  # as Encoder.optimizer_step
        scheduler.step()
        return loss.detach()

    return step


def plain(model: Any, selection: Mapping[str, Tensor] | None = None) -> Step:
    """The reference recipe's step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    masks = dense_masks(maskable_parameters(model), selection or {})
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100_000)
    model.train()

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        with device.autocast():
            loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        for parameter, mask in masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        scheduler.step()
        return loss.detach()

    step.start = start  # type: ignore[attr-defined]  # θ⁰ is held for as long as the phase runs
    return step


def dense_masks(
    parameters: Mapping[str, Tensor], selection: Mapping[str, Tensor]
) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Parameter and float mask for each selected name, as the reference recipe multiplies with."""
    pairs = []
    for name, index in selection.items():
        mask = torch.zeros(parameters[name].numel(), device=parameters[name].device)
        mask[index] = 1.0
        pairs.append((parameters[name], mask.view_as(parameters[name])))
    return pairs  # type: ignore[return-value]


def labelled(batch: Batch) -> Batch:
    """The batch with transformers' labels: the token where it is predicted, -100 elsewhere."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["positions"]] = batch["targets"]
    return {**batch, "labels": labels}


SIDES = {"ours": ours, "plain": plain}
PHASES = ("full", "sparse")
MEMORY = {"cpu": "of the process", "cuda": "allocated on the GPU"}


def prepare(shape: Shape, side: str, phase: str) -> Callable[[], object]:
    """One side alone, for a fresh process."""
    selection = shapes.mask(shape, shape.k) if phase == "sparse" else None
    step = SIDES[side](shapes.masked_lm(shape), selection)
    batch = labelled(shapes.masked_batch(shape))
    return lambda: step(batch)


def times(run: Run) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step by phase and side; measured once a run, because the sweep's row needs them too."""
    if "mlm_step" not in run.memo:
        # One model for both sides of the full phase, or base would not fit into 24 GB; the sparse phase of ours takes
        # gradients away where backward makes them, so there each side has its own.
        batch, found = labelled(shapes.masked_batch(run.shape)), {}
        for phase in PHASES:
            selection = shapes.mask(run.shape, run.shape.k) if phase == "sparse" else None
            model = shapes.masked_lm(run.shape)
            other = copy.deepcopy(model) if phase == "sparse" else model
            steps = {"ours": ours(model, selection), "plain": plain(other, selection)}
            calls = {side: (lambda step=step: step(batch)) for side, step in steps.items()}
            found[phase] = run.alternate(f"MLM step, {phase} phase", calls)
            del model, other, steps, calls
        run.memo["mlm_step"] = found
    return dict(run.memo["mlm_step"])


def measure(run: Run) -> Iterator[Row]:
    """Seconds and peak memory of both phases."""
    found = times(run)
    tokens = run.shape.batch * run.shape.length
    goals = {"full": ((Goal("speedup", 2.3),), (Goal("share", 0.65),)), "sparse": ((), ())}
    quoted = {"full": ("21.9 s → 9.4 to 11.4 s", "14.7 GiB → 9.3 GiB"), "sparse": ("", "")}
    for phase in PHASES:
        speed = {side: tokens / statistics.median(seconds) for side, seconds in found[phase].items()}
        note = f"{speed['ours']:.0f} and {speed['plain']:.0f} tokens/s, {run.shape.batch} × {run.shape.length}"
        yield timed_row(
            f"MLM step, {phase} phase",
            found[phase],
            goals=goals[phase][0],
            quoted=quoted[phase][0],
            note=f"{note}; plain: logits at all positions, AdamW as it comes" + ", dense mask" * (phase == "sparse"),
            facts={"tokens_per_second": speed},
        )
        peaks = {side: run.peak_memory("mlm_step", side, phase) for side in SIDES}
        yield Row(
            f"MLM step, {phase} phase: peak memory",
            peaks["ours"]["peak"],
            peaks["plain"]["peak"],
            "bytes",
            goals=goals[phase][1],
            quoted=quoted[phase][1],
            note=f"{MEMORY[device.current().kind]}; the steps alone took {peaks['ours']['extra'] / 2**20:.0f} and "
            f"{peaks['plain']['extra'] / 2**20:.0f} MiB more than what was there before them",
            facts=peaks,
        )


if __name__ == "__main__":
    one_side(prepare)
