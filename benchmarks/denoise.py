"""Denoising a change: eigenvectors of the float64 Gram matrix beside ``torch.linalg.svd`` in float32.

Both decompose and rebuild L of rank r (residual dropped). Masks are compared with a float64 SVD of the same matrices:
K coordinates of |L| each, as a Jaccard index; in float32 the plain side's own index is shown beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Goal, Row, Run, timed_row
from benchmarks.shapes import Shape
from deftx.core.denoise import decompose_all, denoise, denoised_names
from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy

DROP = ResidualPolicy.parse("drop")
EMBEDDING = "embeddings.word_embeddings.weight"
CHECKED = (32, 100, 300)


def ours(delta: Mapping[str, Tensor], ranks: Sequence[int]) -> list[dict[str, Tensor]]:
    """L of every matrix for each rank, from one decomposition."""
    known = decompose_all(delta)
    return [denoise(delta, RankPolicy.parse(rank), DROP, decompositions=known)[0] for rank in ranks]


def plain(
    delta: Mapping[str, Tensor], ranks: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[dict[str, Tensor]]:
    """L of every matrix for each rank, by one SVD in ``dtype``."""
    found = [dict(delta) for _ in ranks]
    for name in denoised_names(delta):
        u, s, v = torch.linalg.svd(delta[name].to(dtype), full_matrices=False)
        for low, rank in zip(found, ranks, strict=True):
            low[name] = ((u[:, :rank] * s[:rank]) @ v[:rank]).to(delta[name].dtype)
    return found


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor], k: int) -> float:
    """Shared over all coordinates of the two top-K masks."""
    first, second = select_topk(a, k), select_topk(b, k)
    shared = sum(int(torch.isin(first[name], second[name], assume_unique=True).sum()) for name in first)
    return shared / (2 * k - shared) if k else 1.0


def compare(delta: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[int, dict[str, float]]:
    """Mask Jaccard of both sides against a float64 SVD by rank; the density is that of a language SFT."""
    k = max(1, round(0.02764 * shapes.entries(dict(delta))))
    truth = plain(delta, ranks, torch.float64)
    sides = {"ours": ours(delta, ranks), "plain": plain(delta, ranks)}
    return {
        rank: {side: jaccard(low[place], truth[place], k) for side, low in sides.items()}
        for place, rank in enumerate(ranks)
    }


def ranks_of(shape: Shape) -> list[int]:
    """32, 100 and 300, as far as they lie below the width; the fixed rank of the timings is their middle one."""
    return [rank for rank in CHECKED if rank < shape.hidden] or [max(1, shape.hidden // 4)]


def measure(run: Run) -> Iterator[Row]:
    """Encoder matrices, embedding, an embedding with few rows, and five ranks from one decomposition."""
    run.say("making a change")
    delta = {name: tensor for name, tensor in shapes.change(run.shape).items() if tensor.dim() == 2}
    layers = {name: tensor for name, tensor in delta.items() if name.startswith("encoder.")}
    whole = {EMBEDDING: delta[EMBEDDING]}
    ranks = ranks_of(run.shape)
    rank = [ranks[len(ranks) // 2]]

    checked = layers
    if run.check and run.shape.judged:
        wide = [name for name, tensor in layers.items() if max(tensor.shape) > run.shape.hidden]
        names = [*wide[:1], *(name for name in layers if name not in wide[:1])][: run.check]
        checked = {name: layers[name] for name in names}
    run.say(f"float64 SVD of {len(checked)} matrices")
    agreement = compare(checked, ranks)
    exact = all(entry["ours"] == 1.0 for entry in agreement.values())
    shown = ", ".join(f"r = {r}: {entry['ours']:.6f} (plain {entry['plain']:.6f})" for r, entry in agreement.items())
    facts: dict[str, Any] = {"jaccard": agreement, "matrices_checked": sorted(checked), "exact": exact}

    faster = (Goal("speedup", 2.5),)

    def pair(name: str, tensors: Mapping[str, Tensor], **options: Any) -> Row:
        sides = {"ours": lambda: ours(tensors, rank), "plain": lambda: plain(tensors, rank)}
        return timed_row(name, run.alternate(name, sides), **options)

    yield pair(
        f"denoise {len(layers)} encoder matrices, r = {rank[0]}",
        layers,
        goals=faster,
        quoted="15.7 s → 7.8 s",
        note=f"mask Jaccard with float64 SVD on {len(checked)} matrices: {shown}",
        facts=facts,
    )
    yield pair(f"denoise embedding, r = {rank[0]}", whole, goals=faster, quoted="14.8 s → 4.7 s")
    share = 60_000 / 250_002
    generator = torch.Generator().manual_seed(2)
    few = {EMBEDDING: shapes.changed(tuple(delta[EMBEDDING].shape), generator, share)}
    yield pair(f"denoise embedding, {share:.0%} of the rows changed", few, quoted="→ 1.1 s")

    five = sorted({max(1, math.ceil(run.shape.hidden * share)) for share in (0.04, 0.08, 0.13, 0.26, 0.39)})
    every = {**layers, **whole}
    times = run.alternate("five ranks", {"ours": lambda: ours(every, five), "plain": lambda: ours(every, rank)})
    yield timed_row(
        "five ranks from one decomposition, beside one rank",
        times,
        goals=(Goal("share", 1.5),),
        note=f"encoder matrices and embedding, ranks {', '.join(map(str, five))}; both sides are deftx, plain has "
        f"the one rank {rank[0]}",
        facts={"ranks": five},
    )
