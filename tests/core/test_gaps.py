"""Indices as bytes, against a decoder that reads one byte after the other."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftx.core.delta import SparseDelta
from deftx.core.gaps import pack, unpack
from deftx.errors import DeftxError

LARGEST = 2**63 - 2
EDGES = [0, 1, 126, 127, 128, 129, 253, 254, 255, 256, 257, 16383, 16384, 2**21 - 1, 2**21, 2**31, 2**32, 2**56]


def naive_unpack(content: list[int]) -> list[int]:
    indices, last, gap, place = [], -1, 0, 1
    for byte in content:
        gap += place * (byte & 127)
        place *= 128
        if byte < 128:
            last += gap + 1
            indices.append(last)
            gap, place = 0, 1
    assert place == 1
    return indices


def from_gaps(gaps: list[int]) -> list[int]:
    indices: list[int] = []
    for gap in gaps:
        indices.append((indices[-1] if indices else -1) + gap + 1)
    return indices


gaps_of_any_size = st.one_of(st.integers(0, 300), st.sampled_from(EDGES), st.integers(0, 2**57))


@given(st.lists(gaps_of_any_size, min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_round_trip(gaps: list[int]) -> None:
    indices = from_gaps(gaps)
    packed = pack(torch.tensor(indices))
    assert packed.dtype == torch.uint8
    assert naive_unpack(packed.tolist()) == indices
    assert len(packed) == sum(max(1, -(-gap.bit_length() // 7)) for gap in gaps)
    found = unpack(packed)
    assert found.dtype == torch.int64
    assert found.tolist() == indices


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(content: list[int]) -> None:
    packed = torch.tensor(content, dtype=torch.uint8)
    try:
        indices = unpack(packed)
    except DeftxError:
        padded = any(byte == 0 and before > 127 for before, byte in itertools.pairwise(content))
        long = any(min(content[start : start + 9]) > 127 for start in range(len(content) - 8))
        assert content[-1] > 127 or padded or long
        return
    expected = naive_unpack(content)
    if expected[-1] < 2**63:
        assert indices.tolist() == expected
        assert torch.equal(pack(indices), packed)  # one form each
    else:
        assert not bool((indices[1:] > indices[:-1]).all())  # what SparseDelta refuses


@pytest.mark.parametrize(
    ("indices", "content"),
    [
        ([0], [0]),
        ([7], [7]),
        (range(1000), [0] * 1000),
        ([127], [127]),
        ([128], [128, 1]),
        ([0, 254, 509, 765], [0, 253, 1, 254, 1, 255, 1]),
        ([16383, 32768], [255, 127, 128, 128, 1]),
        ([2**31 + 5], [133, 128, 128, 128, 8]),
        ([LARGEST], [254, *[255] * 7, 127]),
        ([0, LARGEST], [0, 253, *[255] * 7, 127]),
    ],
)
def test_bytes_by_hand(indices: list[int], content: list[int]) -> None:
    packed = pack(torch.tensor(list(indices)))
    assert packed.tolist() == content
    assert unpack(packed).tolist() == list(indices)


def test_no_bytes_are_no_indices() -> None:
    assert unpack(torch.empty(0, dtype=torch.uint8)).tolist() == []


@pytest.mark.parametrize("indices", [[0], [0, 2**31, 2**40 - 1], [2**31 + 2**20], [3, 258, 514, 771, 2**33]])
def test_a_parameter_beyond_int32_in_its_folder(indices: list[int], tmp_path: Path) -> None:
    delta = SparseDelta(
        {"w": torch.tensor(indices)},
        {"w": torch.arange(1.0, len(indices) + 1)},
        {"w": (2**20, 2**20)},
        metadata={"base_fingerprint": "f"},
    )
    loaded = SparseDelta.load(delta.save(tmp_path / "sft"))
    assert loaded.indices["w"].tolist() == indices
    assert torch.equal(loaded.values["w"], delta.values["w"])
