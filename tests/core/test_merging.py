"""Merging changes: each rule against its published definition, written out as loops over single entries or in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from deftx.core.delta import SparseDelta
from deftx.core.merging import RULES, Term, merge
from deftx.core.settings import RankPolicy
from deftx.errors import DeftxError

SHAPES = {"embeddings.word": (11, 6), "layer.0.weight": (6, 9), "layer.1.bias": (7,)}
OPTIONS = {
    "sum": {},
    "ties": {"density": 0.2, "elect": "mass", "parameters": 127},
    "dare": {"drop": 0.5, "seed": 3},
    "tsv": {"rank": RankPolicy.parse("fraction:0.5")},
    "denoised_sum": {"rank": RankPolicy.parse(2)},
}


def sft(seed: int, k: int = 40, head: bool = False, base: str = "b") -> SparseDelta:
    """Random values at random coordinates; some parameters may stay out."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(sum(int(np.prod(shape)) for shape in SHAPES.values()), generator=generator)[:k].sort().values
    indices, values, start = {}, {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        inside = flat[(flat >= start) & (flat < start + size)] - start
        if inside.numel():
            indices[name] = inside
            values[name] = torch.randn(inside.numel(), generator=generator)
        start += size
    heads = {"classifier.weight": torch.ones(2, 2)} if head else {}
    return SparseDelta(indices, values, {name: SHAPES[name] for name in indices}, heads, {"base_fingerprint": base})


def dense(delta: SparseDelta) -> dict[str, np.ndarray]:
    """The change as full float64 arrays."""
    whole = {name: np.zeros(int(np.prod(shape))) for name, shape in SHAPES.items()}
    for name, index in delta.indices.items():
        whole[name][index.numpy()] = delta.values[name].double().numpy()
    return {name: value.reshape(SHAPES[name]) for name, value in whole.items()}


TERMS = [Term("task", sft(1, head=True), 0.7), Term("language", sft(2), 1.5), Term("relative", sft(3), -0.4)]


def test_a_sum_is_the_weighted_sum() -> None:
    merged = dense(merge("sum", TERMS))
    for name, got in merged.items():
        expected = sum(term.weight * dense(term.delta)[name] for term in TERMS)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_a_part_of_the_model_may_have_a_weight_of_its_own() -> None:
    merged = dense(merge("sum", [Term("task", sft(1), 2.0, {"layer.0": 0.0})]))
    assert not merged["layer.0.weight"].any()
    np.testing.assert_allclose(merged["embeddings.word"], 2 * dense(sft(1))["embeddings.word"])


@pytest.mark.parametrize("elect", ["mass", "count"])
def test_ties_trims_elects_and_averages(elect: str) -> None:
    density, parameters = 0.2, 127
    trimmed = []
    for term in TERMS:
        whole = dense(term.delta)
        sizes = sorted((abs(v) for array in whole.values() for v in array.flat), reverse=True)
        cut = sizes[round(density * parameters) - 1]
        trimmed.append({name: np.where(abs(array) >= cut, array, 0) for name, array in whole.items()})
    merged = dense(merge("ties", TERMS, density=density, elect=elect, parameters=parameters))
    several = 0
    for name, got in merged.items():
        for position in np.ndindex(got.shape):
            values = [term.weight * array[name][position] for term, array in zip(TERMS, trimmed, strict=True)]
            mass, votes = sum(values), sum(np.sign(value) for value in values)
            sign = np.sign(mass) if elect == "mass" or votes == 0 else np.sign(votes)
            agreeing = [value for value in values if value and np.sign(value) == sign]
            several += len([value for value in values if value]) > 1
            assert got[position] == pytest.approx(np.mean(agreeing) if agreeing else 0, rel=1e-6)
    assert several > 3


def test_dare_drops_and_rescales() -> None:
    big = SparseDelta(
        {"layer.0.weight": torch.arange(40000)},
        {"layer.0.weight": torch.ones(40000)},
        {"layer.0.weight": (200, 200)},
        metadata={"base_fingerprint": "b"},
    )
    kept = merge("dare", [Term("language", big)], drop=0.75, seed=0).values["layer.0.weight"]
    assert set(kept.tolist()) == {4.0}
    assert kept.numel() == pytest.approx(10000, abs=5 * (40000 * 0.25 * 0.75) ** 0.5)
    nothing_dropped = merge("dare", TERMS, drop=0.0, seed=0)
    assert dense(nothing_dropped)["layer.0.weight"] == pytest.approx(dense(merge("sum", TERMS))["layer.0.weight"])


def test_what_dare_draws_depends_on_seed_and_term_alone() -> None:
    one = merge("dare", [Term("language", sft(2))], drop=0.5, seed=0)
    beside = merge("dare", [Term("language", sft(2)), Term("task", sft(1), 0.0)], drop=0.5, seed=0)
    other = merge("dare", [Term("language", sft(2))], drop=0.5, seed=1)
    assert all(torch.equal(beside.indices[name], index) for name, index in one.indices.items())
    assert any(not torch.equal(other.indices.get(name, index[:0]), index) for name, index in one.indices.items())


def test_tsv_concatenates_and_orthogonalises() -> None:
    rank = 3  # half of 6
    merged = dense(merge("tsv", TERMS, rank=RankPolicy.parse("fraction:0.5")))
    for name in ("embeddings.word", "layer.0.weight"):
        parts = [np.linalg.svd(term.weight * dense(term.delta)[name], full_matrices=False) for term in TERMS]
        left = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
        right = np.concatenate([v[:rank].T for _, _, v in parts], 1)
        sizes = np.concatenate([s[:rank] for _, s, _ in parts])

        def nearest(matrix: np.ndarray) -> np.ndarray:  # the polar factor, by the pseudo-inverse of a square root
            values, vectors = np.linalg.eigh(matrix.T @ matrix)
            inverse = np.array([value**-0.5 if value > 1e-9 else 0.0 for value in values])
            return matrix @ (vectors * inverse) @ vectors.T

        np.testing.assert_allclose(merged[name], nearest(left) * sizes @ nearest(right).T, atol=1e-5)
    biases = [term.weight * dense(term.delta)["layer.1.bias"] for term in TERMS if "layer.1.bias" in term.delta.indices]
    np.testing.assert_allclose(merged["layer.1.bias"], np.mean(biases, 0), rtol=1e-6)


def test_tsv_of_one_term_is_its_truncated_svd() -> None:
    merged = dense(merge("tsv", [Term("task", sft(1))], rank=RankPolicy.parse(2)))
    u, s, v = np.linalg.svd(dense(sft(1))["layer.0.weight"])
    np.testing.assert_allclose(merged["layer.0.weight"], u[:, :2] * s[:2] @ v[:2], atol=1e-6)


def test_a_denoised_sum_is_the_truncated_svd_of_the_sum() -> None:
    merged, total = dense(merge("denoised_sum", TERMS, rank=RankPolicy.parse(2))), dense(merge("sum", TERMS))
    for name in ("embeddings.word", "layer.0.weight"):
        u, s, v = np.linalg.svd(total[name], full_matrices=False)
        np.testing.assert_allclose(merged[name], u[:, :2] * s[:2] @ v[:2], atol=1e-5)
    np.testing.assert_array_equal(merged["layer.1.bias"], total["layer.1.bias"])


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_terms_leaves_no_trace(rule: str) -> None:
    results = [merge(rule, order, **OPTIONS[rule]) for order in itertools.permutations(TERMS)]
    for other in results[1:]:
        assert other.indices.keys() == results[0].indices.keys()
        assert all(torch.equal(other.values[name], value) for name, value in results[0].values.items())


@pytest.mark.parametrize("rule", RULES)
def test_a_merge_keeps_the_head_and_says_what_it_is(rule: str) -> None:
    merged = merge(rule, TERMS, **OPTIONS[rule])
    assert torch.equal(merged.head["classifier.weight"], torch.ones(2, 2))
    assert merged.base_fingerprint == "b"
    assert merged.metadata["merged"]["rule"] == rule
    assert merged.metadata["merged"]["terms"]["language"] == {"weight": 1.5}


@pytest.mark.parametrize(
    ("rule", "terms", "options", "message"),
    [
        ("tied", TERMS, {}, "unknown rule 'tied'.*ties"),
        ("sum", [], {}, "at least one term"),
        ("sum", [TERMS[0], TERMS[0]], {}, "name of its own"),
        ("sum", [Term("task", sft(1), float("nan"))], {}, "weight of task .*finite number, not nan"),
        ("sum", [Term("task", sft(1), 1.0, {"layer.0": float("inf")})], {}, r"layer.0\) must be a finite number"),
        ("sum", [Term("task", sft(1), 1.0, {"layer.9": 1.0})], {}, "no part layer.9.*layer.0"),
        ("sum", [TERMS[0], Term("language", sft(2, base="c"))], {}, "different bases"),
        ("sum", [TERMS[0], Term("other", sft(4, head=True))], {}, "bring a head each"),
        ("sum", TERMS, {"drop": 0.5}, "reads no drop"),
        ("dare", TERMS, {"seed": 0}, "needs drop"),
        ("dare", TERMS, {"drop": 1.0, "seed": 0}, r"drop=1.0: must lie in \[0, 1\)"),
        ("ties", TERMS, {"density": 0.0, "elect": "mass", "parameters": 9}, r"density=0.0: must lie in \(0, 1\]"),
        ("ties", TERMS, {"density": 0.5, "elect": "luck", "parameters": 9}, "elect=.luck.: must be mass or count"),
    ],
)
def test_what_cannot_be_merged_is_refused(rule: str, terms: list[Term], options: dict, message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        merge(rule, terms, **options)
