"""Sorted indices as bytes: how many unchanged coordinates lie before each changed one.

At a density of 2.8 % a gap is 35 on average, so one byte does for nearly every index where int32 takes four. A gap
is written in base 128, lowest digit first, with the top bit set on all of its bytes but the last (unsigned
LEB128, as in DWARF and protocol buffers): 0 to 127 is one byte, larger gaps escape into further ones. Sorted and
unique is all that the bytes can express, and each index vector has exactly one form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deftx.errors import DeftxError

_BITS = 7
_MORE = 1 << _BITS  # the bit that says that another byte of the same gap follows, and the base of its digits
_LONGEST = 9  # bytes of a gap: 63 bits, what an int64 holds


def pack(indices: Tensor) -> Tensor:
    """Return indices as bytes.

    Args:
        indices: non-negative, sorted, unique; int64 of shape (count,).

    Returns:
        uint8 of shape (bytes,), count <= bytes <= count + (last index) / 128.
    """
    gaps = indices.clone()
    gaps[1:] -= indices[:-1]
    gaps[1:] -= 1
    first = gaps.to(torch.uint8)  # the lowest eight bits: right where the gap is below 128
    escaped = (gaps >= _MORE).nonzero().flatten()
    if not escaped.numel():
        return first
    first[escaped] |= _MORE
    rest = gaps[escaped] >> _BITS
    lengths = torch.ones_like(rest)
    for digits in range(1, _LONGEST - 1):
        lengths += rest >= 1 << _BITS * digits
    position = escaped + lengths.cumsum(0) - lengths + 1  # of each escaped gap's second byte
    packed = torch.empty(len(first) + int(lengths.sum()), dtype=torch.uint8)
    is_first = torch.ones_like(packed, dtype=torch.bool)
    while rest.numel():
        more = rest >= _MORE
        is_first[position] = False
        packed[position] = torch.where(more, rest % _MORE + _MORE, rest).to(torch.uint8)
        rest, position = rest[more] >> _BITS, position[more] + 1
    return packed.masked_scatter_(is_first, first)


def unpack(packed: Tensor) -> Tensor:
    """Return indices that :func:`pack` wrote.

    Args:
        packed: uint8 of shape (bytes,).

    Returns:
        int64 of shape (count,). Forged gaps whose sum exceeds int64 give indices that are not sorted.

    Raises:
        DeftxError: another dtype or shape, a last gap that is cut off, a gap of more than nine bytes, or one with more
            bytes than it needs.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise DeftxError(f"gaps must be a vector of uint8, found {packed.dtype} of shape {tuple(packed.shape)}")
    more = packed >= _MORE
    if not bool(more.any()):
        return _summed(packed.to(torch.int64))
    if bool(more[-1]):
        raise DeftxError("the last gap is cut off")
    is_first = torch.ones_like(more)
    is_first[1:] = ~more[:-1]
    gaps = packed[is_first].to(torch.int64)
    position = (more & is_first).nonzero().flatten()
    escaped = position - torch.searchsorted((~is_first).nonzero().flatten(), position)  # which gap begins there
    gaps[escaped] -= _MORE
    for digit in range(1, _LONGEST):
        position = position + 1
        byte = packed[position].to(torch.int64)
        if bool((byte == 0).any()):
            raise DeftxError("a gap takes more bytes than it needs")
        gaps[escaped] += (byte % _MORE) << _BITS * digit
        going = byte >= _MORE
        escaped, position = escaped[going], position[going]
        if not escaped.numel():
            return _summed(gaps)
    raise DeftxError(f"a gap takes more than {_LONGEST} bytes")


def _summed(gaps: Tensor) -> Tensor:
    gaps[1:] += 1
    return gaps.cumsum_(0)
