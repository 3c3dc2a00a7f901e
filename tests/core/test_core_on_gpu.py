"""What the core promises on a CUDA device: float64 references, the CPU's coordinates, untouched bits."""

from __future__ import annotations

import pytest
import torch
from test_composition import BASE, DELTAS, by_hand, equal_bits, make_base
from test_denoise import MATRICES, reference, run
from torch import Tensor, nn

from deftx.core.composition import Composition
from deftx.core.delta import SparseDelta
from deftx.core.denoise import decompose, decompose_all, denoise
from deftx.core.optim import SelectedGradients, SparseAdamW, clip_trained
from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("residual", ["drop", "prune:0.05", "prune:0.5"])
@pytest.mark.parametrize("name", MATRICES)
def test_denoising_equals_a_float64_svd(name: str, residual: str) -> None:
    matrix, r = MATRICES[name]
    policy = ResidualPolicy.parse(residual)
    found, report = run(matrix.to(DEVICE), r, policy)
    assert found.device.type == DEVICE
    assert found.dtype == torch.float32
    values, expected, _ = reference(matrix, r, policy.keep)
    scale = float(values[0]) or 1.0
    if r < int((values > 1e-7 * scale).sum()):
        assert float((found.cpu().double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
        assert report.energy == pytest.approx(float(values[:r].square().sum() / values.square().sum()), rel=1e-10)
    else:
        assert torch.equal(found.cpu(), matrix)
    reported = torch.zeros(len(values), dtype=torch.float64)
    reported[: report.singular_values.numel()] = report.singular_values
    assert float((reported - values).abs().max()) <= 2e-8 * scale


@pytest.mark.parametrize("shape", [(700, 96), (96, 700), (96, 96)])
def test_a_decomposition_is_that_of_a_float64_svd(shape: tuple[int, int]) -> None:
    """Values, orthonormal vectors, and that they diagonalize; large enough for several panels and rows of zeros."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    matrix[:: 7 if shape[0] > 96 else shape[0] + 1] = 0
    found = decompose(matrix.to(DEVICE))
    assert found.vectors.device.type == DEVICE
    vectors, values = found.vectors.cpu(), found.singular_values.cpu()
    assert vectors.dtype == values.dtype == torch.float64
    expected = torch.linalg.svdvals(matrix.double())[: values.numel()]
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-8 * float(expected[0]))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(values.numel(), dtype=torch.float64), rtol=0, atol=1e-12)
    nonzero = matrix[matrix.any(1)][:, matrix.any(0)].double()
    gram = nonzero.T @ nonzero if found.side == "columns" else nonzero @ nonzero.T
    torch.testing.assert_close(
        vectors @ torch.diag(values.square()) @ vectors.T, gram, rtol=0, atol=1e-12 * float(expected[0]) ** 2
    )


def test_a_decomposition_serves_either_device() -> None:
    """As a cache gives it: made on one device, used on the other."""
    delta = {name: MATRICES[name][0] for name in ("tall", "zero rows and columns", "heavy tails wide")}
    policies = RankPolicy.parse("fraction:0.1"), ResidualPolicy.parse("prune:0.05")
    expected, _ = denoise(delta, *policies)
    moved = {name: matrix.to(DEVICE) for name, matrix in delta.items()}
    pairs = [(delta, decompose_all(moved)), (moved, decompose_all(delta)), (moved, None)]
    for change, decompositions in pairs:
        found, _ = denoise(change, *policies, decompositions=decompositions)
        for name in delta:
            gap = float((found[name].cpu() - expected[name]).abs().max())
            assert gap <= 1e-6 * float(expected[name].abs().max()), name


def test_millions_of_magnitudes_are_selected_as_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"p{n}": torch.randn(size, generator=generator) for n, size in enumerate((3_000_001, 7, 500_000))}
    tensors["ties"] = torch.randn(400_000, generator=generator).round(decimals=1)
    moved = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    for k in (1, 1000, 123_456, 2_000_000):
        expected, found = select_topk(tensors, k), select_topk(moved, k)
        assert all(index.device.type == DEVICE for index in found.values())
        assert all(torch.equal(found[name].cpu(), index) for name, index in expected.items()), k
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = select_topk(wide, 1000)
    found = select_topk({name: tensor.to(DEVICE) for name, tensor in wide.items()}, 1000)
    assert all(torch.equal(found[name].cpu(), index) for name, index in expected.items())


@pytest.mark.parametrize("sfts_on", ["cpu", DEVICE])
def test_a_composition_has_the_same_bits_as_on_a_cpu(sfts_on: str) -> None:
    deltas = {
        name: SparseDelta(
            {key: index.to(sfts_on) for key, index in delta.indices.items()},
            {key: value.to(sfts_on) for key, value in delta.values.items()},
            delta.shapes,
            metadata=delta.metadata,
        )
        for name, delta in DELTAS.items()
    }
    model = {name: tensor.to(DEVICE) for name, tensor in make_base().items()}
    composition = Composition(model, base_fingerprint=BASE)
    terms: dict[str, float] = {}
    steps = [("a", 1.0), ("b", 0.5), ("c", 1.0), ("a", 3.7), ("b", None), ("d", -1.0), ("a", None), ("c", 0.0)]
    for name, scale in steps:
        if scale is None:
            composition.remove(name)
            del terms[name]
        else:
            if name in terms:
                composition.scale(name, scale)
            else:
                composition.add(name, deltas[name], scale)
            terms[name] = scale
        assert equal_bits({key: tensor.cpu() for key, tensor in model.items()}, by_hand(terms)), (name, scale)
    composition.clear()
    assert equal_bits({key: tensor.cpu() for key, tensor in model.items()}, make_base())


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_sparse_step_has_the_bits_of_a_dense_one_with_masks(clip: float | None, gather: bool) -> None:
    settings = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.03}
    generator = torch.Generator().manual_seed(0)
    sizes = {"part": (531, 37), "head": (37, 5)}
    start = {name: torch.randn(size, generator=generator).to(DEVICE) for name, size in sizes.items()}
    index = torch.randperm(531 * 37, generator=generator)[:4001].sort().values.to(DEVICE)
    mask = torch.zeros(531 * 37, dtype=torch.bool, device=DEVICE).index_fill_(0, index, True).view(531, 37)
    mine, theirs = ({name: nn.Parameter(tensor.clone()) for name, tensor in start.items()} for _ in range(2))
    chosen: dict[Tensor, Tensor] = {mine["part"]: index}
    gradients = SelectedGradients(chosen) if gather else None
    ours = SparseAdamW(mine.values(), selections=chosen, gradients=gradients, **settings)  # type: ignore[arg-type]
    dense = torch.optim.AdamW(theirs.values(), foreach=False, fused=False, **settings)  # type: ignore[arg-type]
    for _ in range(4):
        for name, size in sizes.items():
            gradient = torch.randn(size, generator=generator).to(DEVICE)
            mine[name].grad = gradient.clone()
            theirs[name].grad = gradient * mask if name == "part" else gradient.clone()
        if gradients is not None:
            gradients.gather(mine["part"])
            assert mine["part"].grad is None
        if clip is not None:
            norm = clip_trained(mine.values(), chosen, clip, gradients)
            squares = [theirs[name].grad.double().square().sum() for name in sizes]  # type: ignore[union-attr]
            torch.testing.assert_close(norm, sum(squares).sqrt(), rtol=1e-12, atol=0)  # type: ignore[union-attr]
            factor = torch.clamp(clip / (norm + 1e-6), max=1.0).float()
            for parameter in theirs.values():
                parameter.grad.mul_(factor)  # type: ignore[union-attr]
        ours.step()
        ours.zero_grad()
        dense.step()
        with torch.no_grad():
            theirs["part"].copy_(torch.where(mask, theirs["part"], start["part"]))
    for name in sizes:
        assert torch.equal(mine[name].view(torch.int32), theirs[name].view(torch.int32)), name
    assert torch.equal(mine["part"][~mask], start["part"][~mask])
    assert not torch.equal(mine["part"], start["part"])
