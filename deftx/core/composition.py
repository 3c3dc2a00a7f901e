"""Adding sparse fine-tunings up on one model, and how two of them meet.

A :class:`Composition` owns one model and sets it to θ⁰ + Σ scale · φ. The sum is taken in float64 in the
order of the terms' names and rounded once, so neither the order of adding and removing nor what came before
leaves a trace in the bits. Composition by addition: Ansell et al. 2022 (arXiv 2110.07560). Overlaps and
signs of the terms say how far they stand in each other's way.

Changing a term walks the model once, window by window: the coordinates of one window and the parameter's entries
there fit into a core's cache, and each thread has windows of its own. Where two terms meet is found by marking the
coordinates of one in a window and reading the marks at the other's. Only there is a sum of several terms needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from deftx.core.delta import SparseDelta, need_float32
from deftx.errors import DeftxError, did_you_mean, listed

__all__ = ["Composition", "Overlap", "OverlapReport", "compare"]

_WINDOW = 1 << 17  # entries of a parameter worked on at a time: they and their coordinates fit a core's cache
_WINDOW_CUDA = 1 << 30
_MARKED = 1 << 20  # entries marked at a time, a byte each


class Composition:
    """One model kept at θ⁰ + Σ scale · φ over named terms.

    The sum is taken in float64 over the terms in the order of their names and rounded once. So the model's
    bits are a function of the terms alone: every order of adding, removing and scaling ends at the same
    bits, and without terms they are the base's. Each term remembers the base's values at its own coordinates
    (4 bytes each) and where it meets the other terms; nothing else of the model is copied. While a
    composition lives, nobody else may change the parameters it touches.

    Args:
        parameters: the model's float32 parameters by the base model's own names, at θ⁰; changed in place.
        base_fingerprint: :func:`fingerprint` of the base.

    Raises:
        DeftxError: a parameter is not float32 (a half-precision base could not represent small changes
            exactly).
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, base_fingerprint: str) -> None:
        self.base_fingerprint = base_fingerprint
        self._parameters = dict(parameters)
        for name, parameter in self._parameters.items():
            need_float32(name, parameter)
            if not parameter.is_contiguous():
                raise ValueError(f"{name} is not contiguous in memory")
        self._terms: dict[str, _Term] = {}

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The model's parameters by the base's names; nobody else may change those that a term touches."""
        return self._parameters

    @property
    def terms(self) -> dict[str, float]:
        """Scale by name of term, in the order of the names."""
        return {name: self._terms[name].scale for name in sorted(self._terms)}

    def add(self, name: str, delta: SparseDelta, scale: float = 1.0) -> None:
        """Add scale · φ under a name.

        Raises:
            DeftxError: the name is taken; the SFT is for another base (both fingerprints are named); it has
                keys that match no parameter, or shapes that differ (all are listed); the scale is not
                finite. The model is unchanged.
        """
        if name in self._terms:
            raise DeftxError(f"the composition already has a term {name!r}; remove it first, or scale it")
        _check_scale(name, scale)
        belongs = delta.base_fingerprint
        if belongs != self.base_fingerprint:
            model = delta.metadata.get("base_model")
            named = f"{model}, fingerprint " if model else ""
            raise DeftxError(
                f"the SFT {name!r} belongs to another base: it was made for {named}{belongs}, "
                f"this model is {self.base_fingerprint}; load the base it names, or train the SFT on this one"
            )
        unmatched = sorted(set(delta.indices) - set(self._parameters))
        if unmatched:
            raise DeftxError(
                f"{len(unmatched)} of {len(delta.indices)} keys of the SFT {name!r} match no parameter of the model: "
                f"{listed(unmatched)}"
            )
        differing = [
            f"{key} ({list(shape)} in the SFT, {list(self._parameters[key].shape)} in the model)"
            for key, shape in delta.shapes.items()
            if tuple(shape) != tuple(self._parameters[key].shape)
        ]
        if differing:
            raise DeftxError(f"shapes of the SFT {name!r} differ from the model's: {listed(differing)}")
        parts = {key: self._part(key, delta) for key in delta.indices}
        for key, part in parts.items():
            for other, term in self._terms.items():
                if key in term.parts:
                    part.shared[other] = _common(part.index, term.parts[key].index)
        read: list[_Piece] = []
        try:
            self._walk(parts, _adding(float(scale), read))
        except BaseException:  # out of memory, or Ctrl-C: what was written is taken back
            for piece in read:
                _restore(*piece)
            raise
        self._terms[name] = _Term(float(scale), parts)
        for key, part in parts.items():
            for other, (positions, other_positions) in part.shared.items():
                self._terms[other].parts[key].shared[name] = other_positions, positions
        for key, part in parts.items():
            for other, (positions, other_positions) in part.shared.items():
                part.base[positions] = self._terms[other].parts[key].base[other_positions]
        self._settle(parts)

    def remove(self, name: str) -> None:
        """Take a term out; where no other term touches, the base's bits return.

        Raises:
            DeftxError: there is no such term.
        """
        term = self._term(name)
        self._walk(term.parts, _restore)
        del self._terms[name]
        self._settle(term.parts)
        for key, part in term.parts.items():
            for other in part.shared:
                del self._terms[other].parts[key].shared[name]

    def scale(self, name: str, factor: float) -> None:
        """Give a term another scale (1 is the SFT as trained, 0 the base's bits).

        Raises:
            DeftxError: there is no such term, or the factor is not finite.
        """
        term = self._term(name)
        _check_scale(name, factor)
        term.scale = float(factor)
        self._walk(term.parts, _scaling(term.scale))
        self._settle(term.parts)

    def clear(self) -> None:
        """Remove all terms: the model has the base's bits again."""
        for term in self._terms.values():
            self._walk(term.parts, _restore)
        self._terms.clear()

    def _flat(self, key: str) -> Tensor:
        return self._parameters[key].detach().view(-1)

    def _term(self, name: str) -> _Term:
        if name not in self._terms:
            hint = did_you_mean(name, self._terms)
            raise DeftxError(f"the composition has no term {name!r}{hint} (it has: {', '.join(self.terms) or 'none'})")
        return self._terms[name]

    def _part(self, key: str, delta: SparseDelta) -> _Part:
        flat, index = self._flat(key), delta.indices[key]
        # all parts of one parameter live on one device, also when the model has moved since
        home = next((term.parts[key].base.device for term in self._terms.values() if key in term.parts), flat.device)
        index = index.to(home)
        return _Part(index, delta.values[key].to(home), flat.new_empty(index.numel(), device=home))

    def _walk(self, parts: Mapping[str, _Part], change: _Change) -> None:
        """Call ``change`` for every window of the parts, on all threads."""
        pieces: list[_Piece] = []
        for key, part in parts.items():
            flat = self._flat(key)
            counts = _counts(part.index, flat.numel(), _WINDOW_CUDA if flat.is_cuda else _WINDOW)
            views = (torch.split(tensor, counts) for tensor in (part.index, part.base, part.value))
            pieces += [(flat, *piece) for piece in zip(*views, strict=True) if piece[0].numel()]

        def work(share: list[_Piece]) -> None:
            for flat, index, base, value in share:
                change(flat, index.to(flat.device), base, value)

        _on_threads(work, pieces)

    def _settle(self, parts: Mapping[str, _Part]) -> None:
        """Recompute the model where a term of these parts meets others: the sum of all that are there."""
        for key, part in parts.items():
            if not part.shared:
                continue
            positions_met = [positions for positions, _ in part.shared.values()]
            met = positions_met[0] if len(positions_met) == 1 else torch.unique(torch.cat(positions_met))
            total = part.base.index_select(0, met).double()
            for name in sorted(self._terms):
                term = self._terms[name]
                other = term.parts.get(key)
                if other is None or term.scale == 0:
                    continue
                # the same product and sum in both branches: a fused multiply-add in one of them would show in the bits
                if other is part:
                    total += term.scale * part.value.index_select(0, met).double()
                else:
                    positions, other_positions = part.shared[name]
                    change = term.scale * other.value.index_select(0, other_positions).double()
                    if positions is met:
                        total += change
                    else:
                        total.index_add_(0, torch.searchsorted(met, positions), change)
            flat = self._flat(key)
            flat.index_copy_(0, part.index.index_select(0, met).to(flat.device), total.float().to(flat.device))


@dataclass(frozen=True)
class Overlap:
    """How two sparse fine-tunings meet.

    Attributes:
        a: coordinates of the first.
        b: coordinates of the second.
        overlap: coordinates of both.
        sign_conflicts: coordinates of both which they push in opposite directions.
    """

    a: int
    b: int
    overlap: int
    sign_conflicts: int

    @property
    def jaccard(self) -> float:
        """Shared coordinates over all coordinates of either; 0 when both are empty."""
        union = self.a + self.b - self.overlap
        return self.overlap / union if union else 0.0

    def to_dict(self) -> dict[str, float]:
        """Return plain JSON: the four counts and ``jaccard``."""
        return {**asdict(self), "jaccard": self.jaccard}


@dataclass(frozen=True)
class OverlapReport:
    """:class:`Overlap` in total and for each parameter that either touches, sorted by name."""

    total: Overlap
    parameters: dict[str, Overlap]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        parameters = {name: overlap.to_dict() for name, overlap in self.parameters.items()}
        return {"total": self.total.to_dict(), "parameters": parameters}


def compare(a: SparseDelta, b: SparseDelta) -> OverlapReport:
    """Return overlap and sign conflicts of two sparse fine-tunings.

    Raises:
        DeftxError: they belong to different bases (both fingerprints are named).
    """
    if a.base_fingerprint != b.base_fingerprint:
        raise DeftxError(f"the two SFTs belong to different bases: {a.base_fingerprint} and {b.base_fingerprint}")
    empty = torch.empty(0, dtype=torch.int64)
    parameters = {}
    for name in sorted(set(a.indices) | set(b.indices)):
        first, second = a.indices.get(name, empty), b.indices.get(name, empty)
        in_a, in_b = _common(first, second)
        conflicts = 0
        if in_a.numel():
            conflicts = int((a.values[name][in_a].sign() * b.values[name][in_b].sign() < 0).sum())
        parameters[name] = Overlap(first.numel(), second.numel(), in_a.numel(), conflicts)
    total = Overlap(
        sum(entry.a for entry in parameters.values()),
        sum(entry.b for entry in parameters.values()),
        sum(entry.overlap for entry in parameters.values()),
        sum(entry.sign_conflicts for entry in parameters.values()),
    )
    return OverlapReport(total, parameters)


@dataclass
class _Part:
    """One parameter's share of a term: coordinates, changes, the base's values there, and where other terms meet it.

    ``shared`` holds, by the other term's name, positions in this part's and in the other part's coordinates.
    """

    index: Tensor
    value: Tensor
    base: Tensor
    shared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class _Term:
    scale: float
    parts: dict[str, _Part]


# for a window of a part: the whole parameter as a vector, then coordinates, the base's values and changes
_Piece = tuple[Tensor, Tensor, Tensor, Tensor]
_Change = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def _adding(scale: float, read: list[_Piece]) -> _Change:
    """Read the base's values, then change them; ``read`` tells for which pieces that was begun."""
    change = _scaling(scale)

    def add(flat: Tensor, index: Tensor, base: Tensor, value: Tensor) -> None:
        if base.device == flat.device:
            torch.index_select(flat, 0, index, out=base)
        else:
            base.copy_(flat.index_select(0, index))
        read.append((flat, index, base, value))
        change(flat, index, base, value)

    return add


def _scaling(scale: float) -> _Change:
    def change(flat: Tensor, index: Tensor, base: Tensor, value: Tensor) -> None:
        changed = base
        if scale == 1:  # a float32 sum equals the float64 sum rounded: 53 bits are at least 2 * 24 + 2 (Figueroa 1995)
            changed = base + value
        elif scale:
            changed = (base.double() + scale * value.double()).float()
        flat.index_copy_(0, index, changed.to(flat.device))

    return change


_restore = _scaling(0.0)


def _counts(index: Tensor, entries: int, size: int) -> list[int]:
    """Return how many of a sorted vector's coordinates lie in each window of ``size`` entries."""
    starts = torch.arange(0, entries + size, size, dtype=torch.int64, device=index.device)
    return torch.searchsorted(index, starts).diff().tolist()


def _on_threads(work: Callable[[list[_Piece]], None], items: list[_Piece]) -> None:
    """``work`` of one share of the items a thread.

    Torch releases Python's lock while it computes, and of a sparse window there is too little for torch to split. A GPU
    gains nothing from threads, and inference mode and streams would not hold in them.
    """
    threads = max(1, min(torch.get_num_threads(), len(items)))
    if threads == 1 or torch.is_inference_mode_enabled() or any(flat.is_cuda for flat, *_ in items):
        work(items)
        return
    shares = [items[len(items) * part // threads : len(items) * (part + 1) // threads] for part in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, shares))


def _common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions in two sorted index vectors of what both hold."""
    none = torch.empty(0, dtype=torch.int64, device=a.device)
    if not a.numel() or not b.numel():
        return none, none
    if a.device.type != "cpu":
        position = torch.searchsorted(b, a).clamp_(max=b.numel() - 1)
        in_a = (b[position] == a).nonzero().flatten()
        return in_a, position[in_a]

    entries = int(max(a[-1], b[-1])) + 1
    counts = [_counts(index, entries, _MARKED) for index in (a, b)]
    shared = torch.zeros(a.numel(), dtype=torch.uint8, device=a.device)  # 1 where b holds it, too
    pieces = zip(*map(torch.split, (a, shared, b), (counts[0], counts[0], counts[1])), strict=True)
    marks = torch.zeros(_MARKED, dtype=torch.uint8, device=a.device)
    for window, (ours, met, theirs) in enumerate(pieces):
        # another for each window, so that few need clearing
        stamp = window % 255 + 1
        if stamp == 1:
            marks.zero_()
        if ours.numel() and theirs.numel():
            marks.index_fill_(0, theirs - window * _MARKED, stamp)
            torch.eq(marks.index_select(0, ours - window * _MARKED), stamp, out=met)
    in_a = shared.nonzero().flatten()
    return in_a, torch.searchsorted(b, a.index_select(0, in_a))


def _check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise DeftxError(f"the scale of term {name!r} must be a finite number, not {scale}")
