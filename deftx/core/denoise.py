"""Truncated SVD of a weight change: low-order directions are signal, of the rest the largest entries stay.

Step 2 of docs/method.md (DeFT-X, Simon & Jyothi 2025). For a matrix Δ = U Σ Vᵀ, L = U_r Σ_r V_rᵀ is rebuilt
as the projection Δ V_r V_rᵀ, so nothing but the eigenvectors of the smaller Gram matrix (ΔᵀΔ or ΔΔᵀ) is
needed: they are computed in float64 and take min(m, n)² numbers, whatever the longer side. Rows and columns
of zeros, such as embeddings of tokens that never occurred, change neither spectrum nor projection and are
left out first. R = Δ − L; with the share p kept by magnitude Δ̂ is Δ on the kept entries, bit for bit, and
L elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.errors import DeftxError

_BLOCK = 1 << 19  # entries converted to float64 at a time
_BLOCK_CUDA = 1 << 27
_PANEL = 192  # columns of the Gram matrix computed at a time

Side = Literal["rows", "columns"]
Method = Literal["gram", "svd"]


@dataclass(frozen=True)
class Decomposition:
    """The spectrum of one matrix and the singular vectors of its smaller side; what a cache has to keep of it.

    Attributes:
        shape: (m, n) of the whole matrix.
        rows: m', how many rows have a nonzero entry.
        columns: n', how many columns have a nonzero entry.
        singular_values: float64 of shape (d,), descending, d = min(m', n'); the others are zero.
        side: which singular vectors are held: ``columns`` (right, V) if m' >= n', otherwise ``rows`` (left,
            U); both of the matrix without its zero rows and columns.
        vectors: float64 of shape (d, d), one singular vector in each column, in the order of the values.
    """

    shape: tuple[int, int]
    rows: int
    columns: int
    singular_values: Tensor
    side: Side
    vectors: Tensor


@dataclass(frozen=True)
class MatrixReport:
    """What denoising did to one matrix.

    Attributes:
        name: the parameter's name.
        shape: (m, n).
        rank: how many singular directions were kept, of min(m', n') after zero rows and columns.
        energy: kept share of the energy, Σ_{i<=r} σᵢ² / Σ σᵢ², in [0, 1]; 1 for a matrix of zeros.
        residual_kept: how many entries of R were added back.
        singular_values: float64 of shape (min(m', n'),), descending; see :class:`Decomposition`.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energy: float
    residual_kept: int
    singular_values: Tensor


def denoised_names(delta: Mapping[str, Tensor], exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of the matrices (2-D, not empty) that match none of the ``fnmatch`` patterns ``exclude``."""
    return [
        name
        for name, tensor in delta.items()
        if tensor.dim() == 2 and tensor.numel() and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]


def decompose(matrix: Tensor, *, method: Method = "gram") -> Decomposition:
    """Return singular values and smaller-side singular vectors of a matrix, computed in float64.

    Args:
        matrix: (m, n), floating point, finite.
        method: ``gram``: eigenvectors of the smaller Gram matrix, accumulated block by block (extra memory
            min(m, n)² and one block); absolute errors of σ are about 1e-8 σ₁, far below float32 weights.
            ``svd``: ``torch.linalg.svd`` of the whole matrix in float64, the reference it is tested against.

    Raises:
        DeftxError: the matrix holds NaN or infinity.
        ValueError: not a matrix, or an unknown method.
    """
    if matrix.dim() != 2 or method not in ("gram", "svd"):
        raise ValueError(f"expected a matrix and method gram or svd, got shape {tuple(matrix.shape)} and {method!r}")
    matrix = matrix.detach()
    compact = _Compact.of(matrix)
    if method == "svd":
        whole = matrix.new_zeros(0, compact.d).double()
        if compact.d:
            whole = torch.cat([block.clone() for _, block in compact.blocks()])
        _, values, right = torch.linalg.svd(whole, full_matrices=False)
        vectors = right.T.contiguous()
    else:
        gram = torch.zeros(compact.d, compact.d, dtype=torch.float64, device=matrix.device)
        for _, block in compact.blocks():
            for first in range(0, compact.d, _PANEL):  # the upper triangle; the lower one is the same
                panel = slice(first, first + _PANEL)
                gram[panel, first:].addmm_(block[:, panel].T, block[:, first:])
        squares, vectors = torch.linalg.eigh(gram, UPLO="U")
        values, vectors = squares.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1).contiguous()
    m, n = matrix.shape
    return Decomposition((m, n), compact.rows.numel(), compact.columns.numel(), values, compact.side, vectors)


def decompose_all(
    delta: Mapping[str, Tensor],
    *,
    exclude: Sequence[str] = (),
    method: Method = "gram",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Decomposition]:
    """:func:`decompose` for every matrix of a change that is to be denoised; what a sweep over ranks computes once.

    Raises:
        DeftxError: a matrix holds NaN or infinity (its name is in the message).
    """
    decompositions = {}
    for name in denoised_names(delta, exclude):
        if progress is not None:
            progress(name)
        decompositions[name] = _decompose_named(name, delta[name], method)
    return decompositions


def pack_decompositions(decompositions: Mapping[str, Decomposition]) -> dict[str, Tensor]:
    """Return decompositions as a flat dict of tensors for a safetensors file; see :func:`unpack_decompositions`."""
    packed = {}
    for name, decomposition in decompositions.items():
        m, n = decomposition.shape
        facts = [m, n, decomposition.rows, decomposition.columns, int(decomposition.side == "columns")]
        packed[f"{name}.facts"] = torch.tensor(facts, dtype=torch.int64)
        packed[f"{name}.singular_values"] = decomposition.singular_values
        packed[f"{name}.vectors"] = decomposition.vectors
    return packed


def unpack_decompositions(tensors: Mapping[str, Tensor]) -> dict[str, Decomposition]:
    """Return the decompositions that :func:`pack_decompositions` made into ``tensors``, sorted by name."""
    decompositions = {}
    for key in sorted(tensors):
        if key.endswith(".facts"):
            name = key.removesuffix(".facts")
            m, n, rows, columns, is_columns = tensors[key].tolist()
            decompositions[name] = Decomposition(
                (m, n),
                rows,
                columns,
                tensors[f"{name}.singular_values"],
                "columns" if is_columns else "rows",
                tensors[f"{name}.vectors"],
            )
    return decompositions


def gavish_donoho_coefficient(beta: float) -> float:
    """ω(β): the optimal hard threshold in units of the median singular value, the noise being unknown.

    ω(β) = λ*(β) / sqrt(μ_β) with λ*(β) = sqrt(2(β+1) + 8β / (β+1+sqrt(β²+14β+1))) and μ_β the median of the
    Marčenko–Pastur distribution. With x = 1 + β + 2√β cos θ its tail mass has a closed form in θ, so the
    median is found by bisection to machine precision. ω(1) = 2.858. Source: Gavish & Donoho,
    "The optimal hard threshold for singular values is 4/√3", IEEE Trans. Inf. Theory 60(8), 2014.

    Args:
        beta: aspect ratio min(m, n) / max(m, n), in (0, 1].
    """
    if not 0 < beta <= 1:
        raise ValueError(f"the aspect ratio must lie in (0, 1], not {beta}")
    root = math.sqrt(beta)

    def tail(theta: float) -> float:  # mass of the distribution above x(θ)
        angle = math.atan((1 - root) / (1 + root) * math.tan(theta / 2))
        return ((1 + beta) * theta - 2 * root * math.sin(theta) - 2 * (1 - beta) * angle) / (2 * math.pi * beta)

    low, high = 0.0, math.pi
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) < 0.5 else (low, middle)
    median = 1 + beta + 2 * root * math.cos(low)
    optimal = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
    return optimal / math.sqrt(median)


def resolve_rank(decomposition: Decomposition, rank: RankPolicy) -> int:
    """Return how many singular directions a policy keeps of one matrix, in [0, min(m, n)].

    fixed: r, at most min(m, n). fraction: f · min(m, n), rounded half up, at least 1. energy: the smallest r
    with Σ_{i<=r} σᵢ² >= e · Σ σᵢ². gavish_donoho: how many σ exceed ω(β) · median(σ), zero rows and columns
    having been removed before β and the median are taken; may be 0. none: min(m, n). A matrix of zeros has
    rank 0 under energy and gavish_donoho.
    """
    small = min(decomposition.shape)
    values = decomposition.singular_values
    if rank.kind == "none":
        return small
    if rank.value is not None and rank.kind == "fixed":
        return min(int(rank.value), small)
    if rank.value is not None and rank.kind == "fraction":
        return min(small, max(1, math.floor(rank.value * small + 0.5)))
    if not values.numel() or not float(values[0]) > 0:
        return 0
    if rank.value is not None:
        energies = values.square().cumsum(0)
        return int((energies < rank.value * energies[-1]).sum()) + 1
    inner, outer = sorted((decomposition.rows, decomposition.columns))
    median = float(values[(inner - 1) // 2] + values[inner // 2]) / 2
    return int((values > gavish_donoho_coefficient(inner / outer) * median).sum())


def denoise(
    delta: Mapping[str, Tensor],
    rank: RankPolicy,
    residual: ResidualPolicy,
    *,
    exclude: Sequence[str] = (),
    decompositions: Mapping[str, Decomposition] | None = None,
    method: Method = "gram",
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, Tensor], list[MatrixReport]]:
    """Denoise a weight change: Δ̂ = L + the largest entries of R, matrix by matrix.

    A matrix whose kept rank reaches the number of its singular values comes back as it is, the same tensor;
    so do vectors, excluded matrices, and everything under rank ``none``. The residual keeps round(p · m · n)
    entries of each matrix, ties broken by flat index. Peak extra memory: R of one matrix in float64 (without
    its zero rows) and the result.

    Args:
        delta: the change θ¹ − θ⁰ by parameter name, floating point, any device; not modified.
        rank: how many singular directions of each matrix are signal.
        residual: which share of R is added back.
        exclude: ``fnmatch`` patterns of names that are not denoised, such as ``embeddings.*``.
        decompositions: results of :func:`decompose_all` for the same change; what is missing is computed.
        method: how missing decompositions are computed, see :func:`decompose`.
        progress: called with the name of each matrix before it is worked on.

    Returns:
        The denoised change, with the names, order, shapes and dtypes of ``delta``, and one report for each
        denoised matrix (none under rank ``none``).

    Raises:
        DeftxError: a fixed rank above the largest min(m, n) of the denoised matrices; NaN or infinity in a
            matrix; a decomposition that belongs to another change.

    Source: DeFT-X, arXiv 2505.15090; the share p and the treatment of embeddings are choices of this project.
    """
    names = [] if rank.kind == "none" else denoised_names(delta, exclude)
    largest = max((min(delta[name].shape) for name in names), default=0)
    if names and rank.kind == "fixed" and rank.value is not None and rank.value > largest:
        raise DeftxError(
            f"rank {rank.value} is above {largest}, the largest min(m, n) of {len(names)} matrices to denoise: "
            f"choose a rank from 1 to {largest}, or rank=none for no denoising"
        )
    result = dict(delta)
    reports = []
    for name in names:
        if progress is not None:
            progress(name)
        matrix = delta[name].detach()
        precomputed = (decompositions or {}).get(name)
        decomposition = (
            _decompose_named(name, matrix, method) if precomputed is None else _checked(name, matrix, precomputed)
        )
        r = min(resolve_rank(decomposition, rank), decomposition.singular_values.numel())
        energies = decomposition.singular_values.square()
        share, residual_kept = 1.0, 0
        if r < energies.numel():
            share = float(energies[:r].sum() / energies.sum())
            result[name], residual_kept = _truncate(matrix, decomposition, r, residual.keep)
        reports.append(
            MatrixReport(name, decomposition.shape, r, share, residual_kept, decomposition.singular_values.cpu())
        )
    return result, reports


@dataclass(frozen=True)
class _Compact:
    """A matrix without its zero rows and columns, read in float64 with the shorter side last."""

    matrix: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Compact:
        # the extremes of each row, because (matrix != 0) would take a copy
        extremes = torch.stack([matrix.amin(1), matrix.amax(1)])
        if not bool(extremes.isfinite().all()):
            raise DeftxError("the matrix holds NaN or infinity")
        rows = extremes.any(0).nonzero().flatten()
        # nearly always a few rows show that no column is empty; only columns still empty are looked at further
        empty = torch.ones(matrix.shape[1], dtype=torch.bool, device=matrix.device)
        start, stop = 0, 64
        while start < rows.numel() and bool(empty.any()):
            left = empty.nonzero().flatten()
            empty[left] = (matrix[rows[start:stop]][:, left] == 0).all(0)
            start, stop = stop, 4 * stop
        return cls(matrix, rows, (~empty).nonzero().flatten())

    @property
    def side(self) -> Side:
        return "columns" if self.rows.numel() >= self.columns.numel() else "rows"

    @property
    def d(self) -> int:
        return min(self.rows.numel(), self.columns.numel())

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the pieces of the longer side, each as (piece, d); a piece is overwritten by the next."""
        along, across = (self.rows, self.columns) if self.side == "columns" else (self.columns, self.rows)
        whole = self.matrix if self.side == "columns" else self.matrix.T
        complete = (along.numel() == whole.shape[0], across.numel() == whole.shape[1])
        step = max(1, (_BLOCK_CUDA if whole.is_cuda else _BLOCK) // max(1, self.d))
        room = whole.new_empty(min(step, along.numel()), self.d, dtype=torch.float64)
        for start in range(0, along.numel(), step):
            part = slice(start, min(start + step, along.numel()))
            piece = whole[part] if complete[0] else whole[along[part]]
            yield part, room[: part.stop - start].copy_(piece if complete[1] else piece[:, across])

    def spread(self, compact: Tensor) -> Tensor:
        """Return the compact matrix in its place, zeros around it."""
        if compact.shape == self.matrix.shape:
            return compact
        result = torch.zeros(self.matrix.shape, dtype=compact.dtype, device=compact.device)
        result[self.rows[:, None], self.columns] = compact
        return result


def _decompose_named(name: str, matrix: Tensor, method: Method) -> Decomposition:
    try:
        return decompose(matrix, method=method)
    except DeftxError as error:
        raise DeftxError(f"{name}: {error}. The full phase has diverged; lower its learning rate") from error


def _checked(name: str, matrix: Tensor, decomposition: Decomposition) -> Decomposition:
    squared = _squared_norm(matrix)
    energy = float(decomposition.singular_values.square().sum())
    if decomposition.shape != tuple(matrix.shape) or not math.isclose(squared, energy, rel_tol=1e-6):
        raise DeftxError(
            f"{name}: the decomposition given is of a {decomposition.shape} matrix with squared norm {energy:.6g}, "
            f"this change is {tuple(matrix.shape)} with {squared:.6g}; decompose this change again"
        )
    if decomposition.vectors.device == matrix.device:
        return decomposition
    values, vectors = (tensor.to(matrix.device) for tensor in (decomposition.singular_values, decomposition.vectors))
    return Decomposition(
        decomposition.shape, decomposition.rows, decomposition.columns, values, decomposition.side, vectors
    )


def _squared_norm(matrix: Tensor) -> float:
    """Σ of the squared entries in float64, block by block: torch would convert a copy of the whole."""
    flat = matrix.reshape(-1)
    size = _BLOCK_CUDA if matrix.is_cuda else _BLOCK
    room = flat.new_empty(min(size, flat.numel()), dtype=torch.float64)
    total = room.new_zeros(())
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        piece = room[: block.numel()].copy_(block)
        total += torch.dot(piece, piece)
    return float(total)


def _truncate(matrix: Tensor, decomposition: Decomposition, r: int, keep: float) -> tuple[Tensor, int]:
    """L plus the largest entries of R, and how many those are."""
    compact = _Compact.of(matrix)
    shape = (compact.rows.numel(), compact.columns.numel())
    count = min(math.floor(keep * matrix.numel() + 0.5), shape[0] * shape[1])
    vectors = decomposition.vectors
    # project on the smaller set of directions; the other part is what is left of Δ
    low_is_smaller = 2 * r <= compact.d
    basis = (vectors[:, :r] if low_is_smaller else vectors[:, r:]).contiguous()
    low = torch.empty(shape, dtype=matrix.dtype, device=matrix.device)
    residue = torch.empty(shape if count else (0, 0), dtype=torch.float64, device=matrix.device)
    turned = (low, residue) if compact.side == "columns" else (low.T, residue.T)
    for part, block in compact.blocks():
        projected = torch.mm(block @ basis, basis.T, out=turned[1][part] if count and not low_is_smaller else None)
        if low_is_smaller:
            turned[0][part] = projected
            if count:
                torch.sub(block, projected, out=turned[1][part])
        else:
            turned[0][part] = block.sub_(projected)
    if count:
        selected = select_topk({"R": residue}, count)["R"]
        row, column = compact.rows[selected // shape[1]], compact.columns[selected % shape[1]]
        low.view(-1)[selected] = matrix[row, column]
    return compact.spread(low), count
