"""Resampling against independent computations: naive loops with sklearn, scipy's bootstrap, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score

from benchmarks.coverage import coverage
from deftx.report.bootstrap import METRICS, Resampler, confusion, interval, labels_held, shared_items


def cells(rng: np.random.Generator, n: int, count: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    gold = rng.integers(0, classes, n)
    return gold, np.where(rng.random((count, n)) < 0.6, gold, rng.integers(0, classes, (count, n)))


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_of_resamples_are_those_of_a_naive_loop(metric: str) -> None:
    # Few items and four classes, so that some resamples lack a class; a fifth is never gold, and predicted at times.
    gold, predicted = cells(np.random.default_rng(0), 12, 3, classes=4)
    predicted[1, 3] = 4
    weights = Resampler(50, seed=1).items({"ace": [str(number) for number in range(12)]})["ace"]
    held = labels_held(gold, 5)
    assert held.tolist() == [True] * 4 + [False]
    fast = METRICS[metric](confusion(weights, gold, predicted, 5), held)
    for sample, counts in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(12), counts)
        for cell in range(3):
            if metric == "accuracy":
                slow = accuracy_score(gold[drawn], predicted[cell][drawn])
            else:
                slow = f1_score(gold[drawn], predicted[cell][drawn], labels=range(4), average="macro", zero_division=0)
            assert fast[sample, cell] == pytest.approx(slow, abs=1e-12)


def test_weights_are_draws_with_replacement() -> None:
    weights = Resampler(4000, seed=0).items({"ace": list("abcdef")})["ace"]
    assert (weights.sum(axis=1) == 6).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.08)
    assert weights.var(axis=0) == pytest.approx(np.full(6, 5 / 6), abs=0.08)  # multinomial: n p (1 - p)


def test_parallel_languages_draw_the_same_items_whatever_their_order() -> None:
    drawn = Resampler(50, seed=0).items({"ace": ["a", "b", "c"], "min": ["c", "a", "b"], "xxx": ["p", "q", "r"]})
    assert (drawn["ace"] == drawn["min"][:, [1, 2, 0]]).all()
    assert (drawn["ace"] != drawn["xxx"]).any()


def test_a_language_that_lacks_items_shares_those_it_has() -> None:
    drawn = Resampler(50, seed=0).items({"ace": ["a", "b", "c", "d"], "nah": ["a", "c", "d"]})
    assert (drawn["nah"] == drawn["ace"][:, [0, 2, 3]]).all()


def test_draws_do_not_depend_on_what_else_is_drawn() -> None:
    ids = {"ace": ["a", "b", "c"]}
    alone = Resampler(20, seed=3).items(ids)["ace"]
    beside = Resampler(20, seed=3)
    beside.seeds([0, 1, 2])
    assert (beside.items({"xxx": ["p", "q"], **ids})["ace"] == alone).all()
    assert (Resampler(20, seed=4).items(ids)["ace"] != alone).any()


@pytest.mark.parametrize(
    ("ids", "groups"),
    [
        ({"a": ["1"], "b": ["1"], "c": ["2"]}, [["a", "b"], ["c"]]),
        ({"a": ["1"], "b": ["2"], "c": ["1", "2"]}, [["a", "b", "c"]]),
        ({"a": ["1"]}, [["a"]]),
    ],
)
def test_languages_are_grouped_by_shared_items(ids: dict[str, list[str]], groups: list[list[str]]) -> None:
    found = sorted(sorted(group) for group in shared_items(ids))
    assert found == groups


@pytest.mark.parametrize(("seeds", "shares"), [([5], {1.0}), ([1, 2], {0.0, 0.5, 1.0})])
def test_seeds_are_drawn_with_replacement(seeds: list[int], shares: set[float]) -> None:
    drawn = Resampler(300, seed=0).seeds(seeds)
    assert drawn.sum(axis=1) == pytest.approx(np.ones(300))
    assert set(np.unique(drawn)) == shares


def test_one_language_and_one_seed_agree_with_scipy() -> None:
    gold, predicted = cells(np.random.default_rng(5), 150, 2)
    weights = Resampler(4000, seed=0).items({"ace": [str(number) for number in range(150)]})["ace"]
    values = METRICS["macro_f1"](confusion(weights, gold, predicted, 3), labels_held(gold, 3))
    resampled = values[:, 0] - values[:, 1]
    ours = interval(np.array([resampled.mean()]), resampled[None], 0.9)

    def f1(labels: np.ndarray, guesses: np.ndarray) -> float:
        parts = [
            2 * ((labels == c) & (guesses == c)).sum() / ((labels == c).sum() + (guesses == c).sum()) for c in range(3)
        ]
        return float(np.mean(parts))

    def difference(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
        return f1(labels, first) - f1(labels, second)

    theirs = scipy.stats.bootstrap(
        (gold, *predicted),
        difference,
        paired=True,
        vectorized=False,
        n_resamples=3000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("paired", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, paired: bool) -> None:
    # docs/report.md has the whole grid, of 5,000 draws a cell.
    rng = np.random.default_rng(seeds)
    held, _ = coverage(seeds, 1.0, 4, paired=paired, draws=600, rng=rng)
    assert held > 0.93


def test_seeds_that_are_resampled_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def percentile(by_seed: np.ndarray, resampled: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        draws = np.random.default_rng(0).integers(0, by_seed.shape[-1], (200, by_seed.shape[-1]))
        low, high = np.quantile(by_seed[..., draws].mean(axis=-1), [0.025, 0.975], axis=-1)
        return low, high

    monkeypatch.setattr("benchmarks.coverage.interval", percentile)
    held, _ = coverage(5, 3.0, 4, paired=True, draws=600, rng=np.random.default_rng(0))
    assert held < 0.93


def test_one_seed_has_the_interval_of_its_items() -> None:
    resampled = np.random.default_rng(0).normal(size=(1, 500))
    low, high = interval(np.zeros(1), resampled, 0.95)
    assert (float(low), float(high)) == tuple(np.quantile(resampled[0], [0.025, 0.975]))


def test_joint_draws_widen_the_mean_over_parallel_languages() -> None:
    # Four languages that err on the same items: as uncertain as one, not half as much.
    gold, predicted = cells(np.random.default_rng(2), 200, 1)
    ids = [str(number) for number in range(200)]
    codes = ["ace", "ban", "bjn", "min"]

    def width(names: dict[str, list[str]]) -> float:
        weights = Resampler(1000, seed=0).items(names)
        values = [
            METRICS["accuracy"](confusion(weights[code], gold, predicted, 3), labels_held(gold, 3))[:, 0]
            for code in codes
        ]
        together = np.mean(values, axis=0)
        low, high = interval(np.array([together.mean()]), together[None], 0.95)
        return float(high - low)

    joint = width(dict.fromkeys(codes, ids))
    apart = width({code: [f"{code}{item}" for item in ids] for code in codes})
    assert joint == pytest.approx(2 * apart, rel=0.2)
