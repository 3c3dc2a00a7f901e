"""Overlaps of two SFTs, read without torch, against the core's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deftx.core import gaps
from deftx.core.composition import compare
from deftx.core.delta import SparseDelta
from deftx.stages.diagnostics import _coordinates, _overlaps, from_gaps


def delta(seed: int, names: list[str]) -> SparseDelta:
    """A random SFT; one of its changes is zero, which conflicts with nothing."""
    draw = torch.Generator().manual_seed(seed)
    indices = {name: torch.randperm(60, generator=draw)[:25].sort().values for name in names}
    values = {name: torch.randn(25, generator=draw) for name in names}
    values[names[0]][3] = 0.0
    head = {"classifier.weight": torch.randn(2, 3, generator=draw).half()}
    return SparseDelta(indices, values, dict.fromkeys(names, (6, 10)), head, {"base_fingerprint": "f"})


def test_overlaps_are_those_of_the_core(tmp_path: Path) -> None:
    first, second = delta(0, ["a", "b"]), delta(1, ["b", "c"])
    read = [_coordinates(item.save(tmp_path / name)) for name, item in (("first", first), ("second", second))]
    for item, found in zip((first, second), read, strict=True):
        assert {name: index.tolist() for name, (index, _) in found.items()} == {
            name: index.tolist() for name, index in item.indices.items()
        }
        assert all(np.array_equal(values, item.values[name].numpy()) for name, (_, values) in found.items())
    expected = {
        name: {"overlap": counts.overlap, "jaccard": counts.jaccard, "sign_conflicts": counts.sign_conflicts}
        for name, counts in compare(first, second).parameters.items()
    }
    assert _overlaps(*read) == expected
    assert expected["b"]["sign_conflicts"] > 0


@pytest.mark.parametrize("largest", [130, 20_000, 3_000_000, 2**40])
def test_gaps_are_read_as_the_core_reads_them(largest: int) -> None:
    draw = torch.Generator().manual_seed(0)
    steps = torch.randint(1, largest, (500,), generator=draw)
    steps[::3] = 1
    index = steps.cumsum(0) - 1
    packed = gaps.pack(index)
    assert len(packed) > 500
    assert from_gaps(packed.numpy()).tolist() == index.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_values_are_read(tmp_path: Path, dtype: str) -> None:
    folder = delta(2, ["a"]).save(tmp_path / "sft", value_dtype=dtype)
    index, values = _coordinates(folder)["a"]
    loaded = SparseDelta.load(folder)
    assert index.tolist() == loaded.indices["a"].tolist()
    assert values.tolist() == loaded.values["a"].tolist()
