"""Exact global top-K against a plain sort, on every path through the search and on inputs made to break it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deftx.core import selection
from deftx.core.selection import select_topk
from deftx.errors import DeftxError

# (sample, block): everything is a candidate; a small sample; blocks that cut tensors apart; the fallback alone
PATHS = {
    "whole": (1 << 20, 1 << 20),
    "bracket": (8, 1 << 20),
    "blocks": (8, 5),
    "tiny blocks": (1 << 20, 3),
    "radix": (8, 1 << 20),
}


def take(path: str, patch: pytest.MonkeyPatch) -> None:
    sample, block = PATHS[path]
    patch.setattr(selection, "_SAMPLE", sample)
    patch.setattr(selection, "_BLOCK", block)
    patch.setattr(selection, "_BLOCK_CUDA", block)
    if path == "radix":
        patch.setattr(selection, "_gather", lambda *arguments, **options: None)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return str(request.param)


def sorted_topk(tensors: Mapping[str, Tensor], k: int) -> dict[str, list[int]]:
    """The definition: sort all coordinates by falling magnitude, mapping order, flat index; take k."""
    entries = [
        (-abs(value), order, place)
        for order, tensor in enumerate(tensors.values())
        for place, value in enumerate(tensor.double().flatten().tolist())
    ]
    chosen = sorted(entries)[:k]
    return {name: sorted(place for _, at, place in chosen if at == order) for order, name in enumerate(tensors)}


def check(tensors: Mapping[str, Tensor], k: int) -> None:
    found = select_topk(tensors, k)
    assert list(found) == list(tensors)
    assert all(index.dtype == torch.int64 for index in found.values())
    assert sum(index.numel() for index in found.values()) == k
    assert {name: index.tolist() for name, index in found.items()} == sorted_topk(tensors, k)


def split(values: Tensor, sizes: tuple[int, ...] = (7, 1, 30)) -> dict[str, Tensor]:
    """Names out of alphabetical order, an empty tensor, a matrix."""
    first, second, third, rest = values.split([*sizes, values.numel() - sum(sizes)])
    return {"z": first, "a": second, "empty": values[:0], "m": third.reshape(5, 6), "b": rest}


TINY = 1.4e-45  # the smallest denormal of float32
N = 90
ADVERSARIAL: dict[str, Callable[[], Tensor]] = {
    "all equal": lambda: torch.full((N,), 0.5),
    "all zero": lambda: torch.zeros(N),
    "plus and minus zero": lambda: torch.tensor([0.0, -0.0] * (N // 2)),
    "equal but for the sign": lambda: torch.tensor([1.5, -1.5, -1.5] * (N // 3)),
    "denormals": lambda: torch.arange(N, dtype=torch.int32).view(torch.float32),
    "denormals and zeros": lambda: torch.tensor([0.0, TINY, -TINY] * (N // 3)),
    "one huge": lambda: torch.cat([torch.full((N // 2,), 1e-9), torch.tensor([3.4e38]), torch.ones(N // 2 - 1)]),
    "infinities": lambda: torch.tensor([float("inf"), 1.0, float("-inf")] * (N // 3)),
    "neighbouring floats": lambda: (
        (torch.tensor(1.0).view(torch.int32) + torch.arange(N) % 3).int().view(torch.float32)
    ),
    "rising": lambda: torch.arange(N).float(),
    "falling": lambda: torch.arange(N).flip(0).float(),
    "few values": lambda: torch.arange(N).remainder(4).float(),
    "normal": lambda: torch.randn(N, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial(path: str, kind: str) -> None:
    tensors = split(ADVERSARIAL[kind]())
    for k in (0, 1, 2, 7, 8, 29, 30, 31, 45, N - 1, N):
        check(tensors, k)


@pytest.mark.parametrize("path_name", PATHS)
@given(
    st.lists(
        st.lists(
            st.one_of(
                st.floats(width=32, allow_nan=False),
                st.sampled_from([0.0, -0.0, 1.0, -1.0, TINY, -TINY, 3.4028234663852886e38, 1.17549435e-38]),
            ),
            max_size=20,
        ),
        max_size=6,
    ),
    st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_equals_a_sort(path_name: str, values: list[list[float]], share: float) -> None:
    tensors = {f"p{i}": torch.tensor(entries, dtype=torch.float32) for i, entries in enumerate(values)}
    k = round(share * sum(len(entries) for entries in values))
    with pytest.MonkeyPatch.context() as patch:
        take(path_name, patch)
        check(tensors, k)


def test_ties_are_broken_by_order_then_index(path: str) -> None:
    tensors = {"second": torch.ones(40), "first": torch.ones(40), "big": torch.tensor([2.0, 1.0, 2.0])}
    found = select_topk(tensors, 43)
    assert found["second"].tolist() == list(range(40))
    assert found["first"].tolist() == [0]
    assert found["big"].tolist() == [0, 2]


def test_large_enough_for_the_real_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a continuous distribution must not need the fallback")

    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(5_000_011, generator=generator), "b": torch.randn(1009, generator=generator) * 3}
    monkeypatch.setattr(selection, "_radix", refuse)
    for k in (1, 1000, 200_000):
        found = select_topk(tensors, k)
        magnitudes = torch.cat([tensor.abs() for tensor in tensors.values()])
        best = magnitudes.topk(k).indices.sort().values
        assert torch.equal(torch.cat([found["a"], found["b"] + 5_000_011]), best)


@pytest.mark.parametrize("low", [0.0, 0.3, 1.0, 5.0, float("inf")])
@pytest.mark.parametrize("high", [0.0, 0.3, 1.0, 5.0, float("inf")])
def test_an_unlucky_sample_costs_time_only(low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets below, above and around the threshold, and turned upside down."""
    bracket = torch.tensor([low, high]).view(torch.int32).tolist()
    monkeypatch.setattr(selection, "_bracket", lambda *arguments: tuple(bracket))
    tensors = split(torch.randn(N, generator=torch.Generator().manual_seed(2)))
    for k in (1, 5, 20, 60, 89):
        check(tensors, k)


def test_ties_the_sample_cannot_separate() -> None:
    """Half a change of exact zeros and of one repeated value: more ties than the candidates may hold."""
    tensors = {"a": torch.zeros(3_000_000), "b": torch.full((3_000_000,), -0.25)}
    tensors["a"][::1000] = 1.0
    found = select_topk(tensors, 4000)
    assert found["a"].tolist() == list(range(0, 3_000_000, 1000))
    assert found["b"].tolist() == list(range(1000))
    found = select_topk(tensors, 3_003_007)
    assert found["a"].tolist() == sorted({*range(0, 3_000_000, 1000), *range(1, 8)})
    assert found["b"].numel() == 3_000_000


def test_nan_is_refused_wherever_it_is(path: str) -> None:
    for k in (0, 1, 40):
        tensors = {"fine": torch.ones(50), "broken": torch.zeros(50)}
        tensors["broken"][33] = float("nan")
        with pytest.raises(DeftxError, match=r"broken contains NaN \(first at flat index 33\)"):
            select_topk(tensors, k)
        tensors["broken"][33] = -torch.tensor(float("nan"))
        with pytest.raises(DeftxError, match="broken contains NaN"):
            select_topk(tensors, k)


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(DeftxError, match=rf"k = {k} coordinates out of 6: k must lie between 0 and 6"):
        select_topk({"a": torch.ones(2, 3)}, k)


def test_integers_have_no_magnitude_to_select_by() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        select_topk({"a": torch.ones(3, dtype=torch.int64)}, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(path: str, dtype: torch.dtype) -> None:
    values = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    check(split(values.to(dtype)), 31)


def test_float64_is_not_rounded_to_float32(path: str) -> None:
    check({"a": 1 + torch.arange(60, dtype=torch.float64) * 1e-12, "b": torch.ones(3)}, 20)


def test_views_that_are_not_contiguous(path: str) -> None:
    values = torch.randn(30, 6, generator=torch.Generator().manual_seed(4))
    check({"t": values.T, "s": values[::2, 1:4], "e": values[:1].expand(4, 6)}, 57)


def test_gradients_and_inputs_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.randn(50))
    before = parameter.detach().clone()
    assert not select_topk({"p": parameter}, 5)["p"].requires_grad
    assert torch.equal(parameter, before)


@contextlib.contextmanager
def flushing(on: bool = True) -> Iterator[None]:
    """Denormals are zero to this thread, but to none of torch's: a thread inherits that when it begins."""
    torch.ones(1 << 20).add(1)  # torch's threads have begun now
    if on and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("beside", [torch.float32, torch.float64], ids=str)
def test_flushing_denormals_changes_nothing(beside: torch.dtype) -> None:
    tensors = {"a": torch.arange(50, dtype=torch.int32).view(torch.float32), "b": torch.zeros(3, dtype=beside)}
    with flushing():
        assert select_topk(tensors, 5)["a"].tolist() == [45, 46, 47, 48, 49]


class Lazy(Mapping[str, Tensor]):
    """Loads on access, as a memory-mapped checkpoint does."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_lazy_mapping(path: str) -> None:
    tensors = split(torch.randn(N, generator=torch.Generator().manual_seed(5)))
    lazy = Lazy(tensors)
    found = select_topk(lazy, 20)
    assert {name: index.tolist() for name, index in found.items()} == sorted_topk(tensors, 20)
    assert lazy.reads <= 7 * len(tensors)


@pytest.mark.parametrize(("ties", "reads"), [(False, 3), (True, 7)])
def test_lazy_mapping_is_read_a_few_times(ties: bool, reads: int) -> None:
    values = torch.ones(6_000_000) if ties else torch.rand(6_000_000, generator=torch.Generator().manual_seed(0))
    lazy = Lazy({"a": values})
    assert select_topk(lazy, 3)["a"].tolist() == ([0, 1, 2] if ties else values.topk(3).indices.sort().values.tolist())
    assert lazy.reads == reads


class Mapped(Mapping[str, Tensor]):
    """A memory-mapped safetensors file; each access makes the tensor anew."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
        self.file, self.names = safe_open(file, "pt"), list(tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.mark.parametrize(("threads", "flush"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize(("path_name", "sample"), [("whole", 1 << 20), ("bracket", 2048), ("radix", 8)])
def test_memory_mapped_on_any_threads_flushing_or_not(
    path_name: str, sample: int, threads: int, flush: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long enough for a bracket with two ends and for two threads, against a stable sort by numpy."""
    cases = {}
    for kind, make in ADVERSARIAL.items():
        values = make().repeat(1000)
        order = np.argsort(-values.double().abs().numpy(), kind="stable")
        cases[kind] = Mapped(tmp_path / kind, split(values, (7, 40_000, 30))), order
    take(path_name, monkeypatch)
    monkeypatch.setattr(selection, "_SAMPLE", sample)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with flushing(flush):
            for kind, (tensors, order) in cases.items():
                starts = np.cumsum([0, *(tensor.numel() for tensor in tensors.values())][:-1])
                for k in (0, 1, 45_000, order.size) if threads == 1 else (45_000,):
                    found = select_topk(tensors, k)
                    places = [index.numpy() + start for index, start in zip(found.values(), starts, strict=True)]
                    assert np.array_equal(np.concatenate(places), np.sort(order[:k])), (kind, k)
    finally:
        torch.set_num_threads(before)


class Counted(Mapping[str, Tensor]):
    """Maps a file of its own on each access, and notes the largest number of files mapped at once."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder, self.names, self.alive, self.most = folder, list(tensors), list[str](), 0
        for name, tensor in tensors.items():
            tensor.numpy().tofile(folder / name)

    def __getitem__(self, name: str) -> Tensor:
        array = np.memmap(self.folder / name, dtype=np.float32, mode="c")
        self.alive.append(name)
        self.most = max(self.most, len(self.alive))
        weakref.finalize(array, self.alive.remove, name)
        return torch.from_numpy(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_one_tensor_is_held_at_a_time(path: str, tmp_path: Path) -> None:
    values = torch.randn(6, 20, generator=torch.Generator().manual_seed(7))
    counted = Counted(tmp_path, dict(zip("abcdef", values, strict=True)))
    found = select_topk(counted, 50)
    assert sum(index.numel() for index in found.values()) == 50
    assert counted.alive == []
    assert counted.most == 1


def test_threads_do_not_matter() -> None:
    tensors = {"a": torch.randn(300_001, generator=torch.Generator().manual_seed(6)).round(decimals=2)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = select_topk(tensors, 1234)["a"]
        torch.set_num_threads(2)
        assert torch.equal(one, select_topk(tensors, 1234)["a"])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_selects_the_same(path: str) -> None:
    for make in ADVERSARIAL.values():
        tensors = split(make())
        for k in (0, 1, 30, N):
            found = select_topk({name: tensor.cuda() for name, tensor in tensors.items()}, k)
            assert {name: index.tolist() for name, index in found.items()} == sorted_topk(tensors, k)
    with pytest.raises(DeftxError, match=r"broken contains NaN \(first at flat index 33\)"):
        select_topk({"broken": torch.arange(50.0).cuda().masked_fill_(torch.arange(50).cuda() == 33, float("nan"))}, 1)
