"""Exact global top-K over named tensors: which K coordinates a sparse fine-tuning may change.

Step 3 of docs/method.md. Magnitudes are compared as the integers behind their floats: for non-negative IEEE
numbers both orders agree, ±0 become equal, denormals keep their order even when the processor flushes them,
and NaN sorts above infinity, where it is seen. A fixed sample brackets the K-th magnitude, one pass gathers
the few coordinates above the bracket's lower end, and an exact selection inside the bracket gives the
threshold. Heavy ties, where a bracket can't separate anything, fall back to a radix search on the same
integers. The sample decides the cost, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from deftx.errors import DeftxError
from deftx.seeds import seed_of

_BLOCK = 1 << 20  # entries at a time: the temporaries stay near a CPU's caches
_BLOCK_CUDA = 1 << 26
_SAMPLE = 1 << 20
_DIGIT = 11  # bits decided by one pass of the radix search


class _Keys(NamedTuple):
    """An integer view of magnitudes: the float type compared and the integer type of the same width."""

    real: torch.dtype
    word: torch.dtype
    bits: int
    infinity: int


_KEYS32 = _Keys(torch.float32, torch.int32, 31, 0x7F80_0000)
_SMALLEST_NORMAL = 0x0080_0000  # among the keys of 32 bits
_KEYS64 = _Keys(torch.float64, torch.int64, 63, 0x7FF0_0000_0000_0000)


class _Block(NamedTuple):
    """Coordinates of one tensor whose key reaches a bound: flat index ``start + places``."""

    name: str
    start: int
    places: Tensor
    key: Tensor


def select_topk(tensors: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Choose the ``k`` coordinates of largest magnitude over all tensors together.

    Equal magnitudes are taken in the order of the mapping, then by flat index, so the result is a function
    of the values alone: the same in memory or memory-mapped, on CPU or GPU, with any number of threads.
    Beside the result it needs about 8 bytes for each selected coordinate; the tensors are read block by
    block and never concatenated. A mapping that loads
    its tensors on access reads each of them three times, seven times if more magnitudes tie than a sample can separate.

    Args:
        tensors: named floating-point tensors of any shape; an infinite magnitude is the largest.
        k: how many coordinates, 0 <= k <= total number of entries.

    Returns:
        For every name, in the order of ``tensors``, the sorted flat indices chosen, int64 of shape (count,),
        possibly empty; the counts add up to exactly ``k``. On the device of the tensor.

    Raises:
        DeftxError: ``k`` is negative or exceeds the number of entries, or a tensor contains NaN.
    """
    sizes: dict[str, int] = {}
    devices: dict[str, torch.device] = {}
    keys = _KEYS32
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; only floating-point tensors have magnitudes to select by")
        if tensor.dtype == torch.float64:
            keys = _KEYS64
        sizes[name], devices[name] = tensor.numel(), tensor.device
        del tensor  # here and below: of a mapping that loads on access, no more than one tensor lives at a time
    total = sum(sizes.values())
    if not 0 <= k <= total:
        raise DeftxError(f"cannot select k = {k} coordinates out of {total}: k must lie between 0 and {total}")

    # k = 0 still walks the tensors, for nothing but NaN lies above infinity
    threshold, ties = keys.infinity, 0
    candidates: list[_Block] | None = []
    if k > 0:
        lower, upper = _bracket(tensors, sizes, k, keys)
        candidates = _gather(tensors, lower, keys, limit=min(total, k + k // 4 + 4 * _SAMPLE))
        exact = None if candidates is None else _kth(candidates, k, upper)
        if exact is None:
            candidates, exact = None, _radix(tensors, k, keys)
        threshold, ties = exact
    blocks = _reaching(tensors, threshold, keys) if k == 0 or candidates is None else candidates
    return _take(sizes, devices, blocks, threshold, ties, k)


def random_scores(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Mapping[str, Tensor]:
    """Independent scores, float32 and uniform on [0, 1), whose ``k`` largest are ``k`` coordinates drawn evenly.

    For ablations of the selection, with :func:`select_topk`. A tie at the cut (one in 2**24 of the coordinates) goes to
    the earlier coordinate.

    Args:
        shapes: shape of each named tensor; nothing else about them is used.
        seed: decides the draw, whatever the order of other draws and the number of threads.

    Returns:
        Tensors on the CPU, drawn again whenever they are read, so that one tensor's are held at a time.
    """
    return _Scores(shapes, seed)


class _Scores(Mapping[str, Tensor]):
    """See :func:`random_scores`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._shapes, self._seed = dict(shapes), seed

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, name))
        return torch.rand(self._shapes[name], generator=generator, dtype=torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _keyed(values: Tensor, keys: _Keys) -> Tensor:
    if keys is _KEYS64 and values.dtype != torch.float64:
        # beside float64: a float32 denormal is a multiple of 2**-149; converted, a processor may flush it
        narrow = _keyed(values, _KEYS32)
        exact = narrow.view(torch.float32).double()
        values = torch.where(narrow < _SMALLEST_NORMAL, narrow.double() * 2.0**-149, exact)
    return values.to(keys.real).contiguous().view(keys.word) & torch.iinfo(keys.word).max


def _reaching(tensors: Mapping[str, Tensor], bound: int, keys: _Keys) -> Iterator[_Block]:
    """Yield the coordinates whose key is at least ``bound``, block by block in canonical order. Refuses NaN."""
    for name in tensors:
        flat = _flat(tensors[name])
        size = _BLOCK_CUDA if flat.is_cuda else _BLOCK
        for start in range(0, flat.numel(), size):
            key = _keyed(flat[start : start + size], keys)
            index = (key >= bound).nonzero().flatten()
            key = key[index]
            if key.numel() and int(key.max()) > keys.infinity:
                first = start + int(index[key > keys.infinity][0])
                raise DeftxError(
                    f"{name} contains NaN (first at flat index {first}): its magnitudes cannot be ordered. "
                    "The training behind it diverged; lower the learning rate or use the last good checkpoint"
                )
            yield _Block(name, start, index.to(torch.int32), key)
        del flat


def _bracket(tensors: Mapping[str, Tensor], sizes: Mapping[str, int], k: int, keys: _Keys) -> tuple[int, int]:
    """Two keys that nearly always enclose the k-th largest, from a fixed sample; (0, infinity) if few."""
    total = sum(sizes.values())
    if total <= 4 * _SAMPLE:
        return 0, keys.infinity
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(total, (_SAMPLE,), generator=generator).sort().values
    sample, start = [], 0
    for name, tensor in tensors.items():
        first, last = torch.searchsorted(positions, torch.tensor([start, start + sizes[name]])).tolist()
        picked = (positions[first:last] - start).to(tensor.device)
        sample.append(_keyed(_flat(tensor)[picked], keys).cpu())
        start += sizes[name]
        del tensor
    drawn = torch.cat(sample)
    expected = _SAMPLE * k / total
    slack = 6 * math.sqrt(expected * (1 - k / total)) + 8

    def ranked(rank: int) -> int:  # the rank-th largest of the sample, rank from 1
        return int(drawn.kthvalue(_SAMPLE - rank + 1).values)

    low, high = math.ceil(expected + slack), math.floor(expected - slack)
    lower = min(ranked(low), keys.infinity) if low <= _SAMPLE else 0
    return lower, ranked(high) if high >= 1 else keys.infinity


def _gather(tensors: Mapping[str, Tensor], bound: int, keys: _Keys, limit: int) -> list[_Block] | None:
    """Return all blocks of :func:`_reaching`, or None once they hold more than ``limit`` coordinates."""
    # one buffer a device: many small tensors that stay would scatter the allocator's heap
    buffers: dict[torch.device, tuple[Tensor, Tensor]] = {}
    blocks, held = [], 0
    for name, start, offsets, key in _reaching(tensors, bound, keys):
        if held + key.numel() > limit:
            return None
        if key.device not in buffers:
            buffers[key.device] = (offsets.new_empty(limit), key.new_empty(limit))
        block = _Block(name, start, *(buffer[held : held + key.numel()] for buffer in buffers[key.device]))
        block.places.copy_(offsets)
        block.key.copy_(key)
        blocks.append(block)
        held += key.numel()
    return blocks


def _kth(blocks: list[_Block], k: int, upper: int) -> tuple[int, int] | None:
    """Return the k-th largest key of the blocks and how many coordinates equal to it to take; None if too few."""
    inside = [block.key[block.key <= upper].cpu() for block in blocks]
    above = sum(block.key.numel() for block in blocks) - sum(part.numel() for part in inside)
    if above >= k:  # the bracket lies too low: search all of them
        inside, above = [block.key.cpu() for block in blocks], 0
    pool = torch.cat(inside)
    if above + pool.numel() < k:
        return None
    threshold = int(pool.kthvalue(pool.numel() - (k - above) + 1).values)
    return threshold, k - above - int((pool > threshold).sum())


def _radix(tensors: Mapping[str, Tensor], k: int, keys: _Keys) -> tuple[int, int]:
    """As :func:`_kth` over the tensors: the threshold's bits from the highest, one histogram a pass."""
    prefix, remaining, low = 0, k, keys.bits
    while low > 0:
        width = min(_DIGIT, low)
        high, low = low, low - width
        histogram = torch.zeros(1 << width, dtype=torch.int64)
        for name in tensors:
            flat = _flat(tensors[name])
            size = _BLOCK_CUDA if flat.is_cuda else _BLOCK
            for start in range(0, flat.numel(), size):
                key = _keyed(flat[start : start + size], keys)
                if high < keys.bits:
                    key = key[(key >> high) == prefix]
                digit = (key >> low) & ((1 << width) - 1)
                histogram += torch.bincount(digit, minlength=1 << width).cpu()
            del flat
        reached = histogram.flip(0).cumsum(0)  # how many coordinates have this digit or a larger one
        rank = int(torch.searchsorted(reached, remaining))
        remaining -= int(reached[rank - 1]) if rank else 0
        prefix = (prefix << width) | ((1 << width) - 1 - rank)
    return prefix, remaining


def _take(
    sizes: Mapping[str, int],
    devices: Mapping[str, torch.device],
    blocks: Iterable[_Block],
    threshold: int,
    ties: int,
    k: int,
) -> dict[str, Tensor]:
    """Return everything above the threshold and the first ``ties`` coordinates equal to it, in canonical order."""
    result = {name: torch.empty(0, dtype=torch.int64, device=device) for name, device in devices.items()}
    for name, group in groupby(blocks, key=lambda block: block.name):
        room = torch.empty(min(k, sizes[name]), dtype=torch.int64, device=devices[name])
        filled = 0
        for _, start, offsets, key in group:
            chosen = key > threshold
            if ties:
                equal = (key == threshold).nonzero().flatten()[:ties]
                chosen[equal] = True
                ties -= equal.numel()
            flat = offsets[chosen].long().add_(start)
            room[filled : filled + flat.numel()] = flat
            filled += flat.numel()
        result[name] = room[:filled].clone()
        k -= filled
    return result
