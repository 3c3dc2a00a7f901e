"""Denoising against ``torch.linalg.svd`` in float64, and the thresholds against independent computations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deftx.core import denoise as module
from deftx.core.delta import SparseDelta
from deftx.core.denoise import (
    Decomposition,
    MatrixReport,
    decompose,
    decompose_all,
    denoise,
    gavish_donoho_coefficient,
    pack_decompositions,
    unpack_decompositions,
)
from deftx.core.selection import select_topk
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.errors import DeftxError

DROP = ResidualPolicy(0.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(m: int, n: int, values: list[float], seed: int = 0) -> Tensor:
    """A float32 matrix with these singular values and random singular vectors."""
    left = torch.linalg.qr(normal(m, len(values), seed=seed)).Q
    right = torch.linalg.qr(normal(n, len(values), seed=seed + 1)).Q
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).float()


def scattered(matrix: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """The matrix spread over random rows and columns of a larger matrix of zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(m, generator=generator)[: matrix.shape[0]].sort().values
    columns = torch.randperm(n, generator=generator)[: matrix.shape[1]].sort().values
    whole = torch.zeros(m, n)
    whole[rows[:, None], columns] = matrix
    return whole


def falling(count: int, ratio: float = 0.85) -> list[float]:
    return [1e-3 * ratio**i for i in range(count)]


def heavy_tailed(m: int, n: int, seed: int = 0) -> Tensor:
    """What fine-tuning changes: four directions of signal in noise of scale 1e-4 with Student's t of two degrees."""
    spread = (normal(m, n, seed=seed + 3).square() + normal(m, n, seed=seed + 4).square()).div(2).sqrt()
    noise = 1e-4 * normal(m, n, seed=seed + 2) / spread
    return (with_spectrum(m, n, [0.4, 0.2, 0.1, 0.05], seed=seed).double() + noise).float()


BANDS = [(5, 1e-3), (35, 1e-5), (40, 1e-12)]  # rows, and their scale: float32 holds each with all its digits

# matrices, and a rank at which their spectrum has a gap
MATRICES: dict[str, tuple[Tensor, int]] = {
    "square": (with_spectrum(40, 40, falling(40)), 11),
    "wide": (with_spectrum(24, 90, falling(24)), 5),
    "tall": (with_spectrum(90, 24, falling(24)), 5),
    "most of the rank wide": (with_spectrum(24, 90, falling(24)), 17),
    "most of the rank tall": (scattered(with_spectrum(90, 24, falling(24)), 200, 24), 17),
    "rank-deficient": (with_spectrum(60, 30, falling(7)), 3),
    "single row": (normal(1, 17).float(), 1),
    "single column": (normal(17, 1).float(), 1),
    "one entry": (torch.tensor([[-2.0]]), 1),
    "all zero": (torch.zeros(8, 5), 2),
    "zero rows": (scattered(with_spectrum(40, 16, falling(16)), 200, 16), 6),
    "few rows left": (scattered(with_spectrum(5, 16, falling(5)), 200, 16), 2),
    "zero rows and columns": (scattered(with_spectrum(40, 16, falling(16)), 70, 33), 6),
    "ill-conditioned": (with_spectrum(80, 50, falling(10) + [1e-7 * 0.9**i for i in range(40)]), 10),
    "ill-conditioned wide": (with_spectrum(50, 80, falling(10) + [1e-7 * 0.9**i for i in range(40)]), 10),
    "condition 1e9": (torch.cat([scale * normal(m, 50, seed=m) for m, scale in BANDS]).float(), 5),
    "heavy tails": (heavy_tailed(64, 64), 4),
    "heavy tails wide": (heavy_tailed(48, 160, seed=10), 4),
    "heavy tails tall": (heavy_tailed(160, 48, seed=20), 4),
    "repeated values": (with_spectrum(30, 30, [1.0] * 4 + [0.1] * 26), 4),
    "large numbers": (with_spectrum(20, 30, [1e30, 1e29, 1e28, 1e27]), 2),
    "small numbers": (with_spectrum(20, 30, [1e-30, 1e-31, 1e-32, 1e-33]), 2),
}


def reference(matrix: Tensor, r: int, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values, L plus pruned residual, and the mask of kept residual entries, from a float64 SVD."""
    exact = matrix.double()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    low = (left[:, :r] * values[:r]) @ right[:r]
    low[~(matrix != 0).any(1)] = 0.0  # where the product leaves rounding errors of 1e-19
    low[:, ~(matrix != 0).any(0)] = 0.0
    rest = (exact - low).flatten()
    kept = torch.zeros(rest.numel(), dtype=torch.bool)
    kept[rest.abs().argsort(descending=True, stable=True)[: math.floor(keep * rest.numel() + 0.5)]] = True
    return values, torch.where(kept.view(exact.shape), exact, low), kept


def run(matrix: Tensor, rank: object, residual: object = DROP, **options: object) -> tuple[Tensor, MatrixReport]:
    policies = RankPolicy.parse(rank), ResidualPolicy.parse(residual)  # type: ignore[arg-type]
    result, (report,) = denoise({"w": matrix}, *policies, **options)  # type: ignore[arg-type]
    return result["w"], report


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("residual", ["drop", "prune:0.05", "prune:0.5"])
@pytest.mark.parametrize("name", MATRICES)
def test_fixed_rank_equals_float64_svd(name: str, residual: str, method: str) -> None:
    matrix, r = MATRICES[name]
    before = matrix.clone()
    policy = ResidualPolicy.parse(residual)
    found, report = run(matrix, r, policy, method=method)
    assert torch.equal(matrix, before)
    assert found.dtype == torch.float32
    values, expected, _ = reference(matrix, r, policy.keep)
    scale = float(values[0]) or 1.0
    exact_rank = int((values > 1e-7 * scale).sum())
    if r < exact_rank:
        assert float((found.double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
        assert report.energy == pytest.approx(float(values[:r].square().sum() / values.square().sum()), rel=1e-10)
        entries = matrix.numel() // 3
        ours, theirs = (select_topk({"w": tensor}, entries)["w"] for tensor in (found.double(), expected))
        untied = expected.flatten().abs().sort(descending=True).values[entries - 1 : entries + 1]
        if float(untied[0] - untied[1]) > 1e-6 * float(untied[0]):
            assert torch.equal(ours, theirs)
    else:
        assert torch.equal(found, matrix)
        assert report.energy == 1.0
    reported = torch.zeros(len(values), dtype=torch.float64)
    reported[: report.singular_values.numel()] = report.singular_values
    assert float((reported - values).abs().max()) <= 2e-8 * scale


@pytest.mark.parametrize("residual", ["drop", "prune:0.05"])
@pytest.mark.parametrize("name", MATRICES)
def test_gram_and_svd_choose_the_same_coordinates(name: str, residual: str) -> None:
    matrix, r = MATRICES[name]
    policy = ResidualPolicy.parse(residual)
    values, expected, _ = reference(matrix, r, policy.keep)
    if name == "condition 1e9":
        assert float(values[0] / values[-1]) > 1e9
    found = [run(matrix, r, policy, method=method)[0] for method in ("gram", "svd")]
    for one in found:
        assert float((one.double() - expected).norm()) <= 1e-5 * float(expected.norm())
    if r >= int((values > 1e-7 * values[0]).sum()):  # nothing is cut: the very matrix comes back
        expected = matrix.double()
    for share in (0.02, 0.1, 0.3):
        k = min(math.ceil(share * matrix.numel()), int((matrix != 0).sum()))
        masks = [select_topk({"w": one}, k)["w"].tolist() for one in (*found, expected)]
        assert masks[0] == masks[1] == masks[2], share


def test_gram_and_svd_choose_the_same_coordinates_of_a_model() -> None:
    """One selection over matrices of many shapes; each keeps the rank that holds the energy."""
    left_out = ("large numbers", "repeated values")  # they alone would be chosen; a cut may go through ties
    delta = {name: matrix for name, (matrix, _) in MATRICES.items() if name not in left_out}
    for rank in ("energy:0.9", "energy:0.99"):
        policies = RankPolicy.parse(rank), ResidualPolicy.parse("prune:0.05")
        gram, svd = (denoise(delta, *policies, method=method)[0] for method in ("gram", "svd"))
        for k in (100, 1000, 5000):
            one, other = select_topk(gram, k), select_topk(svd, k)
            assert all(torch.equal(one[name], other[name]) for name in delta), (rank, k)


TIED: dict[str, tuple[Tensor, int]] = {
    "within the first values": (with_spectrum(30, 30, [1.0] * 4 + [0.1] * 26), 2),
    "within the last values": (with_spectrum(30, 30, [1.0] * 4 + [0.1] * 26), 17),
    "identity": (torch.eye(12), 5),
    "wide": (with_spectrum(12, 50, [1.0, *[0.5] * 11]), 6),
    "tall": (with_spectrum(50, 12, [1.0, *[0.5] * 11]), 6),
    "zero rows": (scattered(with_spectrum(20, 12, [0.5] * 12), 100, 12), 4),
    "rank-deficient": (torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, -2.0]]).repeat(4, 1), 1),
}


@pytest.mark.parametrize("name", TIED)
def test_a_cut_through_tied_values_leaves_the_same_norm(name: str) -> None:
    """Which of the tied directions are kept is open; what is left out weighs the same."""
    matrix, r = TIED[name]
    values = torch.linalg.svdvals(matrix.double())
    assert float(values[r - 1] - values[r]) < 1e-6 * float(values[0])
    expected = float(values[r:].square().sum().sqrt())
    for method in ("gram", "svd"):
        low, report = run(matrix, r, method=method)
        assert report.rank == r
        assert float((matrix.double() - low.double()).norm()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["square", "wide", "tall", "zero rows", "few rows left", "zero rows and columns"])
def test_residual_mask_equals_float64_svd(name: str) -> None:
    matrix, r = MATRICES[name]
    for keep in (0.01, 0.05, 0.3):
        found, report = run(matrix, r, keep)
        _, _, kept = reference(matrix, r, keep)
        low, _ = run(matrix, r)
        nonzero = matrix.flatten() != 0
        count = min(int(kept.sum()), int((matrix != 0).any(1).sum()) * int((matrix != 0).any(0).sum()))
        assert report.residual_kept == count
        assert torch.equal(found.flatten()[kept], matrix.flatten()[kept])
        assert torch.equal(found.flatten()[~kept & nonzero], low.flatten()[~kept & nonzero])
        assert int((found != low).sum()) > 0


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("name", MATRICES)
def test_energy_equals_float64_svd(name: str, energy: float) -> None:
    matrix, _ = MATRICES[name]
    _, report = run(matrix, f"energy:{energy}")
    energies = torch.linalg.svdvals(matrix.double()).square()
    if name == "all zero":
        assert (report.rank, report.energy) == (0, 1.0)
        return
    shares = energies.cumsum(0) / energies.sum()
    r = next(i for i, share in enumerate(shares.tolist(), start=1) if share >= energy)
    assert report.rank == r
    assert report.energy == pytest.approx(float(shares[r - 1]), rel=1e-10)
    assert report.energy >= energy


def test_energy_is_over_squares_and_its_bound_is_included() -> None:
    matrix = torch.diag(torch.tensor([4.0, 3.0, 0.0]))
    assert run(matrix, "energy:0.64")[1].rank == 1  # 16 / 25
    assert run(matrix, "energy:0.65")[1].rank == 2
    found, report = run(matrix, "energy:0.64")
    assert torch.equal(found, torch.diag(torch.tensor([4.0, 0.0, 0.0])))
    assert report == MatrixReport("w", (3, 3), 1, 0.64, 0, report.singular_values)
    assert report.singular_values.tolist() == [4.0, 3.0]  # a row of zeros was left out


def test_a_whole_energy_keeps_everything() -> None:
    matrix, _ = MATRICES["square"]
    assert torch.equal(run(matrix, "energy:1")[0], matrix)


@pytest.mark.parametrize(
    ("shape", "fraction", "rank"),
    [((40, 24), 0.25, 6), ((24, 40), 0.5, 12), ((10, 10), 0.25, 3), ((10, 10), 0.01, 1), ((10, 10), 1.0, 10)],
)
def test_fraction_is_of_the_smaller_side(shape: tuple[int, int], fraction: float, rank: int) -> None:
    assert run(normal(*shape).float(), f"fraction:{fraction}")[1].rank == rank


def test_full_rank_and_whole_residual_return_the_same_bits() -> None:
    delta = {name: matrix for name, (matrix, _) in MATRICES.items()}
    for rank, residual in (("fraction:1", "drop"), ("none", "drop"), (2, "prune:1")):
        found, _ = denoise(delta, RankPolicy.parse(rank), ResidualPolicy.parse(residual))
        for name, matrix in delta.items():
            assert torch.equal(found[name].view(torch.int32), matrix.view(torch.int32)), (rank, name)


def marchenko_pastur_median(beta: float, steps: int = 400_000) -> float:
    """By summing the density: x = u², so that the pole at 0 (β = 1) and the roots at the ends do no harm."""
    low, high = 1 - math.sqrt(beta), 1 + math.sqrt(beta)
    u = low + (high - low) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    x = u.square()
    density = ((high**2 - x) * (x - low**2)).sqrt() / (2 * math.pi * beta * x) * 2 * u
    mass = density.cumsum(0) * (high - low) / steps
    assert float(mass[-1]) == pytest.approx(1.0, abs=1e-6)
    at = int(torch.searchsorted(mass, torch.tensor(0.5, dtype=torch.float64)))
    return float(u[at] ** 2)


def omega(beta: float) -> float:
    root = math.sqrt(beta**2 + 14 * beta + 1)
    return math.sqrt((2 * (beta + 1) + 8 * beta / (beta + 1 + root)) / marchenko_pastur_median(beta))


@pytest.mark.parametrize("beta", [1e-4, 0.003, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.999, 1.0])
def test_gavish_donoho_coefficient_equals_integration(beta: float) -> None:
    assert gavish_donoho_coefficient(beta) == pytest.approx(omega(beta), rel=2e-5)


def test_gavish_donoho_coefficient_as_published() -> None:
    assert gavish_donoho_coefficient(1.0) == pytest.approx(2.858, abs=5e-4)
    for beta in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0):  # the paper's own cubic approximation, off by up to 0.02
        assert gavish_donoho_coefficient(beta) == pytest.approx(
            0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02
        )
    for beta in (0.0, -1.0, 1.01, math.nan):
        with pytest.raises(ValueError, match="aspect ratio"):
            gavish_donoho_coefficient(beta)


@pytest.mark.parametrize(("m", "n"), [(60, 60), (120, 40), (40, 120), (61, 60)])
def test_gavish_donoho_finds_the_signal(m: int, n: int) -> None:
    """Three strong directions in noise: the rank is 3, with and without rows and columns of zeros around."""
    noise = 0.01 * normal(m, n, seed=5) / math.sqrt(max(m, n))
    matrix = (with_spectrum(m, n, [1.0, 0.5, 0.2]).double() + noise).float()
    found, report = run(matrix, "gavish_donoho")
    assert report.rank == 3
    values = torch.linalg.svdvals(matrix.double())
    threshold = omega(min(m, n) / max(m, n)) * float(values.quantile(0.5))
    assert report.rank == int((values > threshold).sum())
    for whole in (scattered(matrix, 3 * m, n), scattered(matrix, m, 3 * n), scattered(matrix, 2 * m, 5 * n)):
        spread, same = run(whole, "gavish_donoho")
        assert same.rank == 3
        compact = spread[(whole != 0).any(1)][:, (whole != 0).any(0)]
        assert torch.allclose(compact, found, rtol=0, atol=1e-7)
        assert int((spread != 0).sum()) == int((found != 0).sum())


@pytest.mark.parametrize("count", [5, 6])
def test_gavish_donoho_threshold_is_sharp(count: int) -> None:
    """Diagonal matrices with the second value just beside ω(1) · median; the median of an even count is a mean."""
    rest = [1.0, 0.8, 0.6] if count == 5 else [1.2, 0.8, 0.6, 0.5]
    for factor, rank in ((0.999, 1), (1.001, 2)):
        values = [10.0, 2.8582 * factor, *rest]  # the median is 1
        assert run(torch.diag(torch.tensor(values)), "gavish_donoho")[1].rank == rank


def test_gavish_donoho_may_keep_nothing() -> None:
    found, report = run(torch.eye(6), "gavish_donoho", "prune:0.1")
    assert (report.rank, report.energy, report.residual_kept) == (0, 0.0, 4)
    assert found.nonzero().tolist() == [[i, i] for i in range(4)]


def test_what_is_not_denoised() -> None:
    delta = {
        "embeddings.word_embeddings.weight": normal(50, 8).float(),
        "layer.0.weight": normal(8, 8, seed=1).float(),
        "layer.0.bias": normal(8, seed=2).float(),
        "conv": normal(2, 3, 4, seed=3).float(),
        "empty": torch.zeros(0, 4),
    }
    seen: list[str] = []
    found, reports = denoise(delta, RankPolicy("fixed", 2), DROP, exclude=["embeddings.*"], progress=seen.append)
    assert list(found) == list(delta)
    assert [report.name for report in reports] == seen == ["layer.0.weight"]
    assert all(found[name] is delta[name] for name in delta if name != "layer.0.weight")
    assert not torch.equal(found["layer.0.weight"], delta["layer.0.weight"])
    found, reports = denoise(delta, RankPolicy("none"), DROP)
    assert reports == []
    assert all(found[name] is delta[name] for name in delta)


def test_rank_above_the_largest_matrix() -> None:
    delta = {"a": normal(30, 8).float(), "b": normal(5, 40).float()}
    with pytest.raises(DeftxError, match=r"rank 9 is above 8, the largest min\(m, n\) of 2 matrices.*from 1 to 8"):
        denoise(delta, RankPolicy("fixed", 9), DROP)
    found, reports = denoise(delta, RankPolicy("fixed", 6), DROP)
    assert torch.equal(found["b"], delta["b"])
    assert not torch.equal(found["a"], delta["a"])
    assert [(report.rank, report.energy < 1) for report in reports] == [(6, True), (5, False)]
    with pytest.raises(DeftxError, match="rank 6 is above 5"):
        denoise(delta, RankPolicy("fixed", 6), DROP, exclude=["a"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad: float) -> None:
    delta = {"fine": normal(4, 4).float(), "broken": normal(4, 4).float()}
    delta["broken"][1, 2] = bad
    with pytest.raises(DeftxError, match="broken: the matrix holds NaN or infinity"):
        denoise(delta, RankPolicy("fixed", 2), DROP)
    with pytest.raises(DeftxError, match="broken"):
        decompose_all(delta)


def test_one_decomposition_serves_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = {name.replace(" ", "_"): matrix for name, (matrix, _) in MATRICES.items()}
    decompositions = decompose_all(delta, exclude=["wide"])
    assert set(decompositions) == set(delta) - {"wide"}
    save_file(pack_decompositions(decompositions), tmp_path / "d.safetensors")
    restored = unpack_decompositions(load_file(tmp_path / "d.safetensors"))
    assert set(restored) == set(decompositions)
    ranks = ("3", "fraction:0.3", "energy:0.9", "gavish_donoho")
    fresh = [denoise(delta, RankPolicy.parse(rank), ResidualPolicy(0.1), exclude=["wide"]) for rank in ranks]

    def refuse(*arguments: object, **options: object) -> Decomposition:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(module, "decompose", refuse)
    for rank, (expected, reports) in zip(ranks, fresh, strict=True):
        found, again = denoise(
            delta, RankPolicy.parse(rank), ResidualPolicy(0.1), exclude=["wide"], decompositions=restored
        )
        for name in delta:
            assert torch.equal(found[name], expected[name])
        assert [(r.name, r.rank, r.energy, r.residual_kept) for r in again] == [
            (r.name, r.rank, r.energy, r.residual_kept) for r in reports
        ]


def test_decomposition_of_another_change() -> None:
    delta = {"w": normal(20, 8).float()}
    decompositions = decompose_all(delta)
    for other in (delta["w"] * 1.01, delta["w"].T.contiguous()):
        with pytest.raises(DeftxError, match="decompose this change again"):
            denoise({"w": other}, RankPolicy("fixed", 2), DROP, decompositions=decompositions)


def test_decomposition_is_small() -> None:
    decomposition = decompose(scattered(normal(40, 16).float(), 5000, 16))
    assert (decomposition.shape, decomposition.rows, decomposition.columns) == ((5000, 16), 40, 16)
    assert (decomposition.side, tuple(decomposition.vectors.shape)) == ("columns", (16, 16))
    few = decompose(scattered(normal(5, 16).float(), 5000, 16))
    assert (few.side, tuple(few.vectors.shape), few.singular_values.numel()) == ("rows", (5, 5), 5)


def test_columns_that_only_late_rows_touch() -> None:
    matrix = torch.zeros(5000, 16)
    matrix[:, 0] = 1.0
    for j in range(1, 15):
        matrix[300 * j + 5, j] = 1e-42
    decomposition = decompose(matrix)
    assert (decomposition.rows, decomposition.columns) == (5000, 15)


def test_blocks_cut_matrices_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = {name: matrix for name, (matrix, _) in MATRICES.items() if "numbers" not in name}
    whole, _ = denoise(delta, RankPolicy("fixed", 3), DROP)
    monkeypatch.setattr(module, "_BLOCK", 100)
    cut, _ = denoise(delta, RankPolicy("fixed", 3), DROP)
    for name in delta:
        if name != "repeated values":  # no gap at 3: the directions are not determined
            assert torch.allclose(whole[name], cut[name], rtol=0, atol=1e-7 * max(1.0, float(delta[name].abs().max())))


def test_views_are_denoised_too() -> None:
    matrix, _ = MATRICES["tall"]
    turned, _ = run(matrix.T, 5, 0.05)
    straight, _ = run(matrix.T.contiguous(), 5, 0.05)
    assert turned.is_contiguous()
    assert torch.equal(turned, straight)


def test_lt_sft_is_deft_x_at_full_rank(tmp_path: Path) -> None:
    """The mask and the saved fine-tuning, byte for byte; at half the rank both differ."""
    base = {"w": normal(30, 20).float(), "e": normal(100, 20, seed=1).float(), "b": normal(20, seed=2).float()}
    change = {name: 1e-3 * normal(*tensor.shape, seed=7).float() for name, tensor in base.items()}
    full = {name: tensor + change[name] for name, tensor in base.items()}
    delta = {name: full[name] - tensor for name, tensor in base.items()}
    files = {}
    for rank in ("none", "20", "10"):
        denoised, _ = denoise(delta, RankPolicy.parse(rank), ResidualPolicy.parse("prune:0.05"))
        selection = select_topk(denoised, 321)
        folder = SparseDelta.from_states(base, full, selection=selection).save(tmp_path / rank)
        files[rank] = (folder / "sft.safetensors").read_bytes()
    assert files["none"] == files["20"]
    assert files["none"] != files["10"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees() -> None:
    for matrix, r in MATRICES.values():
        found, report = run(matrix.cuda(), r)
        expected, same = run(matrix, r)
        assert report.rank == same.rank
        assert torch.allclose(found.cpu(), expected, rtol=0, atol=1e-6 * float(matrix.abs().max() or 1))
