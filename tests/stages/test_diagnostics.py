"""Overlaps of two SFTs, read without torch, against the core's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deftx.core import gaps
from deftx.core.composition import compare
from deftx.core.delta import SparseDelta
from deftx.stages.diagnostics import _coordinates, _overlaps, from_gaps, sample, sampling_rate


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


def test_samples_overlap_as_the_masks_do() -> None:
    rng, size = np.random.default_rng(0), 4_000_000
    drawn = [np.sort(rng.choice(size, 400_000, replace=False)) for _ in range(2)]
    masks = [drawn[0], np.union1d(drawn[0][:200_000], drawn[1][:200_000])]
    values = [rng.standard_normal(len(mask)).astype(np.float32) for mask in masks]
    rate = sampling_rate(size)
    assert rate == pytest.approx(2**18 / size)
    first, second = (sample("a.weight", *each, rate) for each in zip(masks, values, strict=True))
    for taken, mask, value in ((first, *each) for each in [(masks[0], values[0])]):
        assert len(taken) == pytest.approx(rate * len(mask), rel=0.05)
        where = np.searchsorted(mask, np.abs(taken) - 1)
        assert (mask[where] == np.abs(taken) - 1).all()
        assert (np.sign(taken) == np.sign(value[where])).all()
    exact = len(np.intersect1d(*masks)) / len(np.union1d(*masks))
    met = len(np.intersect1d(np.abs(first), np.abs(second)))
    estimate = met / (len(first) + len(second) - met)
    assert estimate == pytest.approx(exact, abs=0.01)
    # What is looked at depends on the coordinate alone, not on the SFT, and differs between parameters.
    part = sample("a.weight", masks[0][::2], values[0][::2], rate)
    assert set(part) == set(first) & set(np.concatenate([masks[0][::2] + 1, -masks[0][::2] - 1]))
    assert set(np.abs(sample("b.weight", masks[0], values[0], rate))) != set(np.abs(first))


def test_a_small_base_is_sampled_whole() -> None:
    assert sampling_rate(1000) == 1.0
    taken = sample("a", np.array([0, 5, 9]), np.array([0.5, -1.0, 2.0], dtype=np.float32), 1.0)
    assert taken.tolist() == [1, -6, 10]
