"""``python -m benchmarks [--shape mini|base]``: core operations against plain torch, medians of several, as ratios.

Each pair runs alternately in one process on the same tensors with the same threads; the plain side is what one would
write first with torch: ``torch.linalg.svd`` in float32, ``torch.topk`` on the concatenation, AdamW with a dense mask.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deftx.core.denoise import denoise
from deftx.core.optim import SparseAdamW
from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy

SHAPES = {
    "mini": {"embedding": (8000, 128), "matrices": [(128, 128)] * 8 + [(512, 128)] * 4},
    "base": {"embedding": (250002, 768), "matrices": [(768, 768)] * 48 + [(3072, 768)] * 24},
}
DENSITY = 0.0276
RANK = 100


def change(shape: str) -> dict[str, Tensor]:
    """A weight change with a decaying spectrum plus noise, float32, by name."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"embedding": SHAPES[shape]["embedding"]}
    sizes |= {f"matrix.{index}": size for index, size in enumerate(SHAPES[shape]["matrices"])}
    result = {}
    for name, (rows, columns) in sizes.items():
        signal = torch.randn(rows, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
        result[name] = 1e-4 * signal + 1e-4 * torch.randn(rows, columns, generator=generator)
    return result


def plain_denoise(delta: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Truncation by ``torch.linalg.svd`` in float32."""
    result = {}
    for name, matrix in delta.items():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        result[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return result


def plain_topk(delta: dict[str, Tensor], k: int) -> Tensor:
    """``torch.topk`` over the concatenation."""
    return torch.topk(torch.cat([tensor.abs().flatten() for tensor in delta.values()]), k).indices


def optimizers(delta: dict[str, Tensor], k: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step of SparseAdamW, and one of AdamW with a dense mask, on parameters of the same shapes."""
    selection = select_topk(delta, k)
    ours = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in delta.items()}
    dense = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in delta.items()}
    masks = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
    for name, index in selection.items():
        masks[name].view(-1)[index] = 1.0
    for name in delta:
        ours[name].grad = delta[name].clone()
        dense[name].grad = delta[name].clone()
    sparse = SparseAdamW(list(ours.values()), selections={ours[name]: selection[name] for name in ours}, lr=1e-4)
    adamw = torch.optim.AdamW(list(dense.values()), lr=1e-4, weight_decay=0.0)

    def masked_step() -> None:
        for name, parameter in dense.items():
            if parameter.grad is not None:
                parameter.grad.mul_(masks[name])
        adamw.step()

    return lambda: sparse.step(), masked_step


def alternate(ours: Callable[[], object], plain: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both sides, run in turn after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for side, function in enumerate((ours, plain)):
            started = time.perf_counter()
            function()
            if turn:
                times[side].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    delta = change(arguments.shape)
    k = round(DENSITY * sum(tensor.numel() for tensor in delta.values()))
    sparse_step, masked_step = optimizers(delta, k)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        f"denoise, rank {RANK}": (
            lambda: denoise(delta, RankPolicy.parse(RANK), ResidualPolicy.parse("drop")),
            lambda: plain_denoise(delta, RANK),
        ),
        f"select K = {k}": (lambda: select_topk(delta, k), lambda: plain_topk(delta, k)),
        "optimizer step": (sparse_step, masked_step),
    }
    rows = {name: alternate(ours, plain, arguments.repeats) for name, (ours, plain) in pairs.items()}
    table = Table(title=f"shape {arguments.shape}, {torch.get_num_threads()} threads, medians of {arguments.repeats}")
    for column in ("operation", "deftx, s", "plain torch, s", "ratio"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for name, (ours_seconds, plain_seconds) in rows.items():
        table.add_row(name, f"{ours_seconds:.4f}", f"{plain_seconds:.4f}", f"{plain_seconds / ours_seconds:.1f}")
    Console().print(table)
    if arguments.json:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        content = {"shape": arguments.shape, "facts": machine, "seconds": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
