"""The optimizer step of the sparse phase, clipping included: SparseAdamW beside dense AdamW with a mask.

Ours gathers the selected gradients first, as backward's hook does. Plain multiplies the gradients with the mask, clips
with ``clip_grad_norm_`` and steps ``torch.optim.AdamW``, once as it comes (a loop on a CPU, ``foreach`` on a GPU) and
once with ``fused=True``. All sides update the same parameters from the same gradients; the limit halves from call to
call, so that every one of them really clips.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Goal, Row, Run, timed_row
from benchmarks.mlm_step import CLIP, LEARNING_RATE, dense_masks
from deftx.core.optim import SelectedGradients, SparseAdamW, clip_trained

Parameters = Mapping[str, torch.nn.Parameter]
Sided = tuple[Callable[[], object], torch.optim.Optimizer]


def parameters_of(tensors: Mapping[str, Tensor], seed: int = 1) -> dict[str, torch.nn.Parameter]:
    """Parameters that hold ``tensors``, with normal gradients."""
    made = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    gradients = shapes.noise({name: tuple(tensor.shape) for name, tensor in tensors.items()}, seed, 1e-3)
    for name, parameter in made.items():
        parameter.grad = gradients[name]
    return made


def ours(parameters: Parameters, selection: Mapping[str, Tensor], limits: Iterator[float]) -> Sided:
    """Gather, clip and step over the selected coordinates."""
    chosen: dict[Tensor, Tensor] = {parameters[name]: index for name, index in selection.items()}
    trained = list(parameters.values())
    dense = {parameter: parameter.grad for parameter in trained}
    gradients = SelectedGradients(chosen)
    optimizer = SparseAdamW(trained, selections=chosen, gradients=gradients, lr=LEARNING_RATE)

    def step() -> None:
        for parameter in chosen:
            gradients.gather(parameter)
        clip_trained(trained, chosen, next(limits), gradients)
        optimizer.step()
        gradients.values.clear()
        for parameter, gradient in dense.items():  # the other sides take it from there
            parameter.grad = gradient

    return step, optimizer


def plain(
    parameters: Parameters, selection: Mapping[str, Tensor], limits: Iterator[float], *, fused: bool = False
) -> Sided:
    """Mask, clip and step over everything."""
    trained = list(parameters.values())
    masks = dense_masks(parameters, selection)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=fused or None)

    def step() -> None:
        for parameter, mask in masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(trained, next(limits))
        optimizer.step()

    return step, optimizer


def state_bytes(optimizer: torch.optim.Optimizer, selection: Mapping[str, Tensor]) -> int:
    """Bytes of the optimizer's tensors; SparseAdamW's indices are part of its state, dense masks are not counted."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if isinstance(optimizer, SparseAdamW):
        tensors += list(selection.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(run: Run) -> list[Row]:
    """Seconds and state at the K of a language SFT, seconds at that of a task SFT."""
    rows = []
    parameters = parameters_of(shapes.noise(shapes.parameter_shapes(run.shape), 0))
    for k, quoted in ((run.shape.k, "2.0 s + 0.45 s mask → 0.20 s"), (run.shape.k_task, "→ 0.32 s")):
        run.say(f"selecting {k}")
        selection = shapes.mask(run.shape, k)
        limits = (CLIP * 0.5**call for call in itertools.count())
        sides = {
            "ours": ours(parameters, selection, limits),
            "plain": plain(parameters, selection, limits),
            "fused": plain(parameters, selection, limits, fused=True),
        }
        times = run.alternate(f"optimizer step, K = {k}", {name: side[0] for name, side in sides.items()})
        states = {name: state_bytes(side[1], selection) for name, side in sides.items()}
        row = timed_row(
            f"optimizer step, K = {k:,}",
            times,
            goals=(Goal("speedup", 8),),
            quoted=quoted,
            note="ours gathers, plain masks; both clip, the AdamW of plain is as it comes",
            facts={"k": k, "maskable": shapes.entries(dict(parameters))},
        )
        fused = timed_row(
            f"optimizer step, K = {k:,}, beside fused=True",
            {"ours": times["ours"], "plain": times["fused"]},
            goals=(Goal("speedup", 1),),
        )
        state = Row(
            f"optimizer state, K = {k:,}",
            states["ours"],
            states["plain"],
            "bytes",
            goals=(Goal("value", 24 * k),),
            quoted="2,219 MB → 121 to 151 MB" if k == run.shape.k else "",
            note=f"{states['ours'] / k:.1f} bytes a selected coordinate, its index included",
            facts=states,
        )
        rows += [row, fused, state]
        del sides
    return rows
