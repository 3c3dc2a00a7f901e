"""Rules that turn several changes of one base into one: what is added to θ⁰ instead of their plain sum.

A rule is a pure function from terms (an SFT and its weight) to one SFT. ``sum`` is task and language arithmetic
(Ilharco et al. 2023, arXiv 2212.04089; Ansell et al. 2022). ``ties`` elects a sign for each coordinate (Yadav et al.
2023, arXiv 2306.01708), ``dare`` drops entries at random and rescales the rest (Yu et al. 2024, arXiv 2311.03099),
``tsv`` concatenates truncated singular vectors and makes them orthogonal (Gargiulo et al. 2025, arXiv 2412.00081), and
``denoised_sum`` truncates the singular values of the summed change (ours). Sums are taken in float64 in the order of
the terms' names, so the order in which terms are given leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deftx.core.delta import SparseDelta
from deftx.core.denoise import Decomposition, Side, decompose, denoise, resolve_rank
from deftx.core.selection import select_topk
from deftx.core.settings import MERGE_OPTIONS, MERGE_RANGES, RankPolicy, ResidualPolicy, part_of
from deftx.errors import DeftxError, did_you_mean, listed
from deftx.seeds import seed_of

__all__ = ["RULES", "Rule", "Term", "merge"]


@dataclass(frozen=True)
class Term:
    """One change that takes part in a merge.

    Attributes:
        name: Such as ``task`` or ``language``; it orders the terms and seeds what is drawn.
        delta: The change.
        weight: λ, finite.
        layers: λ for parts of the model, by the names of :func:`deftx.core.settings.part_of` (``embeddings``,
            ``layer.0``, ...), in place of ``weight`` there.
    """

    name: str
    delta: SparseDelta
    weight: float = 1.0
    layers: Mapping[str, float] = field(default_factory=dict)

    def weight_of(self, parameter: str) -> float:
        """Return λ for a parameter."""
        return self.layers.get(part_of(parameter), self.weight)


@dataclass(frozen=True)
class _Aligned:
    """The terms' values of one parameter, side by side.

    Attributes:
        name: Of the parameter.
        shape: Of the parameter.
        index: Sorted flat indices that any term changes, int64 [count].
        values: float64 [terms, count]; 0 where a term changes nothing; weights are not applied.
        weights: float64 [terms, 1].
    """

    name: str
    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    weights: Tensor

    @property
    def weighted(self) -> Tensor:
        """The values times their term's weight, float64 [terms, count]."""
        return self.values * self.weights

    def dense(self, values: Tensor) -> Tensor:
        """Return values of the coordinates, [count], as a float64 tensor of the parameter's shape."""
        whole = values.new_zeros(math.prod(self.shape))
        return whole.index_copy_(0, self.index, values).view(self.shape)


_Change = tuple[Tensor, Tensor]  # sorted flat indices and values, of one parameter
_Rule = Callable[[_Aligned, Mapping[str, Any]], _Change]


@dataclass(frozen=True)
class Rule:
    """One way to merge.

    Attributes:
        title: What tables call it.
        merged: Merges the terms' values of one parameter.
        computed: The options it reads beside those that a person sets: ``parameters``, ``seed``.
        trims: Whether each term first keeps the ``density`` of all the base's parameters that are largest in magnitude.
        dense: Whether it changes all entries of a matrix, so that the result takes memory like the base.
    """

    title: str
    merged: _Rule
    computed: tuple[str, ...] = ()
    trims: bool = False
    dense: bool = False


def merge(rule: str, terms: Sequence[Term], **options: Any) -> SparseDelta:
    """Merge changes of one base.

    Args:
        rule: A key of :data:`RULES`.
        terms: At least one, with names of their own.
        **options: Those that the rule reads. ``density``: share of all ``parameters`` that each term keeps, in (0, 1].
            ``parameters``: how many the base has. ``elect``: ``mass`` (the sign of the weighted sum) or ``count`` (of
            the majority). ``drop``: share of entries that are dropped, in [0, 1). ``seed``. ``rank``: a
            :class:`RankPolicy` of what each term (``tsv``) or the sum (``denoised_sum``) keeps of a matrix.

    Returns:
        The change that is added to θ⁰: float32 values on the sorted coordinates that are not 0, the head of the only
        term that has one, and metadata with the base's fingerprint and what was merged how.

    Raises:
        DeftxError: An unknown rule; no terms, or two of one name; a weight that is not finite, or of a part that no
            term has; terms of different bases or shapes; two heads; a value out of its range.
    """
    if rule not in RULES:
        raise DeftxError(f"unknown rule {rule!r}{did_you_mean(rule, RULES)}; available: {', '.join(RULES)}")
    chosen = RULES[rule]
    terms = sorted(terms, key=lambda term: term.name)
    _check(terms)
    reads = (*MERGE_OPTIONS[rule], *chosen.computed)
    if unread := sorted(set(options) - set(reads)):
        raise DeftxError(f"the rule {rule} reads no {listed(unread)}; it reads {', '.join(reads) or 'weights only'}")
    if missing := sorted(set(reads) - set(options)):
        raise DeftxError(f"the rule {rule} needs {listed(missing)}")
    _check_options(options)
    kept = [_trimmed(term.delta, options) for term in terms] if chosen.trims else [term.delta for term in terms]
    options = {**options, "names": [term.name for term in terms]}
    indices, values, shapes = {}, {}, {}
    for name in sorted({name for delta in kept for name in delta.indices}):
        aligned = _aligned(name, kept, [term.weight_of(name) for term in terms])
        index, change = chosen.merged(aligned, options)
        rounded = change.float()
        changed = rounded != 0
        if bool(changed.any()):
            indices[name], values[name], shapes[name] = index[changed], rounded[changed], aligned.shape
    heads = [term.delta.head for term in terms if term.delta.head]
    merged = {
        term.name: {"weight": term.weight, **({"layers": dict(term.layers)} if term.layers else {})} for term in terms
    }
    facts = {"base_fingerprint": terms[0].delta.base_fingerprint, "merged": {"rule": rule, "terms": merged}}
    return SparseDelta(indices, values, shapes, dict(heads[0]) if heads else {}, facts)


def _check(terms: Sequence[Term]) -> None:
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise DeftxError(
            f"a merge needs at least one term, each with a name of its own; it has {', '.join(names) or 'none'}"
        )
    first = terms[0].delta
    parts = {part_of(name) for term in terms for name in term.delta.indices}
    for term in terms:
        weights = {"weight": term.weight, **term.layers}
        for what, weight in weights.items():
            if not math.isfinite(weight):
                raise DeftxError(f"the weight of {term.name} ({what}) must be a finite number, not {weight}")
        unknown = sorted(set(term.layers) - parts)
        if unknown:
            raise DeftxError(
                f"{term.name}: what is merged has no part {listed(unknown)}; its parts: {', '.join(sorted(parts))}"
            )
        if term.delta.base_fingerprint != first.base_fingerprint:
            raise DeftxError(
                f"{terms[0].name} and {term.name} belong to different bases, {first.base_fingerprint} and "
                f"{term.delta.base_fingerprint}: merge SFTs that were trained on one base"
            )
        for name, shape in term.delta.shapes.items():
            if name in first.shapes and tuple(shape) != tuple(first.shapes[name]):
                raise DeftxError(
                    f"{name} has shape {list(first.shapes[name])} in {terms[0].name}, {list(shape)} in {term.name}"
                )
    heads = [term.name for term in terms if term.delta.head]
    if len(heads) > 1:
        raise DeftxError(f"{listed(heads)} bring a head each: merge at most one task SFT, or average SFTs of one head")


def _check_options(options: Mapping[str, Any]) -> None:
    problems = [MERGE_RANGES[name].problem(name, value) for name, value in options.items() if name in MERGE_RANGES]
    if any(problems):
        raise DeftxError("\n".join(filter(None, problems)))


def _trimmed(delta: SparseDelta, options: Mapping[str, Any]) -> SparseDelta:
    """Keep the coordinates of largest magnitude, ``density`` of all the base's parameters."""
    k = max(1, math.floor(options["density"] * options["parameters"] + 0.5))
    if k >= delta.k:
        return delta
    kept = {name: position for name, position in select_topk(delta.values, k).items() if position.numel()}
    return SparseDelta(
        {name: delta.indices[name][position] for name, position in kept.items()},
        {name: delta.values[name][position] for name, position in kept.items()},
        {name: delta.shapes[name] for name in kept},
        delta.head,
        delta.metadata,
    )


def _aligned(name: str, deltas: Sequence[SparseDelta], weights: Sequence[float]) -> _Aligned:
    present = [delta for delta in deltas if name in delta.indices]
    index = present[0].indices[name]
    if len(present) > 1:
        index = torch.unique(torch.cat([delta.indices[name] for delta in present]))
    values = torch.zeros(len(deltas), index.numel(), dtype=torch.float64)
    for row, delta in zip(values, deltas, strict=True):
        if name in delta.indices:
            row[torch.searchsorted(index, delta.indices[name])] = delta.values[name].double()
    shape = tuple(present[0].shapes[name])
    return _Aligned(name, shape, index, values, torch.tensor(weights, dtype=torch.float64)[:, None])


def _added_up(weighted: Tensor) -> Tensor:
    """Add the rows up one after the other, so that the bits do not depend on how torch splits a reduction."""
    total = torch.zeros_like(weighted[0])
    for row in weighted:
        total += row
    return total


def _sum(terms: _Aligned, options: Mapping[str, Any]) -> _Change:
    """Σ λᵢ φᵢ."""
    return terms.index, _added_up(terms.weighted)


def _ties(terms: _Aligned, options: Mapping[str, Any]) -> _Change:
    """Of each coordinate the mean of the weighted values that have the elected sign; terms without it do not count."""
    weighted = terms.weighted
    elected = _added_up(weighted if options["elect"] == "mass" else weighted.sign()).sign()
    # a tie by count is settled by mass
    elected = torch.where(elected == 0, _added_up(weighted).sign(), elected)
    agreeing = (weighted.sign() == elected) & (weighted != 0)
    count = agreeing.sum(0).clamp_(min=1)
    return terms.index, _added_up(weighted * agreeing) / count


def _dare(terms: _Aligned, options: Mapping[str, Any]) -> _Change:
    """Σ λᵢ mᵢ φᵢ / (1 − p), with mᵢ drawn anew for each term and parameter; an entry survives with 1 − p."""
    drop = options["drop"]
    kept = torch.empty(terms.values.shape, dtype=torch.float64)
    for name, row in zip(options["names"], kept, strict=True):
        generator = torch.Generator().manual_seed(seed_of(options["seed"], "dare", name, terms.name))
        # drawn for every coordinate of the union: which other terms there are must not move a term's draws
        row.copy_(_uniform_at(terms, generator) >= drop)
    return terms.index, _added_up(terms.weighted * kept / (1 - drop))


def _uniform_at(terms: _Aligned, generator: torch.Generator) -> Tensor:
    """Return one draw from [0, 1) for each coordinate, the same whatever other coordinates there are."""
    whole = torch.rand(math.prod(terms.shape), generator=generator)
    return whole[terms.index]


def _tsv(terms: _Aligned, options: Mapping[str, Any]) -> _Change:
    """TSV-Merge of matrices, the mean of everything else.

    Each term's matrix keeps its first r singular triplets; those of all terms stand side by side, U [m, Σr] and
    V [n, Σr]; each is replaced by its nearest matrix with orthogonal columns (Procrustes), and the sum is U Σ Vᵀ.
    """
    weighted = terms.weighted
    if len(terms.shape) != 2:
        present = (weighted != 0).any(1).sum().clamp(min=1)
        return terms.index, _added_up(weighted) / present
    lefts, sizes, rights = [], [], []
    for row in weighted:
        if not bool(row.any()):
            continue
        left, size, right = torch.linalg.svd(terms.dense(row), full_matrices=False)
        rank: RankPolicy = options["rank"]
        kept = min(_rank_of(rank, size, terms.shape), size.numel())
        lefts.append(left[:, :kept])
        sizes.append(size[:kept])
        rights.append(right[:kept].T)
    if not sizes:
        return terms.index[:0], weighted.new_zeros(0)
    change = (_nearest_orthogonal(torch.cat(lefts, 1)) * torch.cat(sizes)) @ _nearest_orthogonal(torch.cat(rights, 1)).T
    return torch.arange(change.numel()), change.reshape(-1)


def _rank_of(rank: RankPolicy, size: Tensor, shape: Sequence[int]) -> int:
    rows, columns = shape
    side: Side = "columns" if rows >= columns else "rows"
    return resolve_rank(Decomposition((rows, columns), rows, columns, size, side, size.new_zeros(0, 0)), rank)


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix with orthonormal columns (or rows, if it is wide) that is nearest in the Frobenius norm."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _denoised_sum(terms: _Aligned, options: Mapping[str, Any]) -> _Change:
    """The low-rank part of Σ λᵢ φᵢ, without its residual; vectors are summed."""
    total = _added_up(terms.weighted)
    if len(terms.shape) != 2:
        return terms.index, total
    # float32 is what a composition adds to the base; the decomposition itself is taken in float64
    dense = terms.dense(total).float()
    rank: RankPolicy = options["rank"]
    if rank.kind == "fixed" and rank.value is not None and rank.value >= min(terms.shape):
        return terms.index, total
    low, _ = denoise({terms.name: dense}, rank, ResidualPolicy(0.0), decompositions={terms.name: decompose(dense)})
    return torch.arange(dense.numel()), low[terms.name].reshape(-1).double()


RULES: dict[str, Rule] = {
    "sum": Rule("sum", _sum),
    "ties": Rule("TIES", _ties, ("parameters",), trims=True),
    "dare": Rule("DARE", _dare, ("seed",)),
    "tsv": Rule("TSV-Merge", _tsv, dense=True),
    "denoised_sum": Rule("denoised sum", _denoised_sum, dense=True),
}
"""How changes are merged, by the name that ``compose=`` takes."""
