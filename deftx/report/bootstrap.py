"""Paired bootstrap over examples and seeds, vectorised: all resamples of a cell are one matrix product.

A resample draws items (examples) with replacement and, apart from that, seeds with replacement. The same draws serve
every method, so differences are paired; and every language whose test set holds the same items, because NusaX,
AmericasNLI and XNLI are translations of one set: a mean over languages of jointly drawn items has the right spread,
independent draws would make it too narrow. Intervals are percentiles (Efron & Tibshirani 1993, chapter 13). Drawing
both rows and columns of a table is the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1): it never
understates the variance of many seeds, and counts what goes with neither item nor seed up to three times.

An item drawn w times counts w times, so a resample is a row of counts W [B, n], and the confusion counts of all B
resamples are W @ one-hot(label, prediction) [n, C²].
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def confusion(weights: Floats, gold: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int) -> Doubles:
    """Return the weighted confusion counts.

    Args:
        weights: How often each item counts in each resample [B, n].
        gold: Labels [n].
        predicted: Predictions of several cells over the same items [cells, n].
        classes: Number of classes C.

    Returns:
        Counts [B, cells, C, C]; rows of the last two are labels, columns predictions.
    """
    cells, n = predicted.shape
    indices = gold[None, :] * classes + predicted + (np.arange(cells) * classes**2)[:, None]
    one_hot = np.zeros((n, cells * classes**2), dtype=np.float32)
    one_hot[np.arange(n)[None, :].repeat(cells, axis=0).ravel(), indices.ravel()] = 1
    # Counts are whole numbers far below 2**24, so float32 holds them exactly.
    return (weights @ one_hot).astype(np.float64).reshape(len(weights), cells, classes, classes)


Held = npt.NDArray[np.bool_]
"""Which labels the gold rows hold [C], before any resampling."""


def labels_held(gold: npt.NDArray[np.int64], classes: int) -> Held:
    """Return which of ``classes`` labels some gold rows hold."""
    return np.bincount(gold, minlength=classes) > 0


def macro_f1(counts: Doubles, held: Held) -> Doubles:
    """Return the unweighted mean of the F1 scores of the labels that the gold rows hold.

    As :func:`deftx.training.metrics.macro_f1`. The labels are the same in every resample: one whose rows were not drawn
    counts 0 there.

    Args:
        counts: Confusion counts [..., C, C].
        held: :func:`labels_held` of the gold rows.

    Returns:
        Scores [...], from 0 to 1.
    """
    both = counts.sum(axis=-1) + counts.sum(axis=-2)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(f1[..., held].mean(axis=-1))


def accuracy(counts: Doubles, held: Held) -> Doubles:
    """Return the share of examples whose prediction is right, [...], from confusion counts [..., C, C]."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).sum(axis=-1)
    return np.asarray(hits / np.maximum(counts.sum(axis=(-2, -1)), 1))


METRICS: Mapping[str, Callable[[Doubles, Held], Doubles]] = {"macro_f1": macro_f1, "accuracy": accuracy}
"""Metrics that can be recomputed from predictions."""


class Resampler:
    """Draws items and seeds; equal arguments give equal draws, in whatever order the methods are called.

    Args:
        samples: Number of resamples B.
        seed: Seed of the draws.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._seeds: dict[tuple[int, ...], Doubles] = {}

    def items(self, ids: Mapping[str, Sequence[str]]) -> dict[str, Floats]:
        """Return how often each item counts: for each language float32 [B, n], in the order of its ids.

        Languages that share items share their draws, so a resample of a language that lacks some of these items holds
        a little more or fewer than n.
        """
        drawn: dict[str, Floats] = {}
        for languages in shared_items(ids):
            union = sorted(set().union(*(ids[language] for language in languages)))
            positions = {key: number for number, key in enumerate(union)}
            weights = self._counts(len(union), "items", *union)
            for language in languages:
                drawn[language] = weights[:, [positions[key] for key in ids[language]]]
        return drawn

    def seeds(self, seeds: Sequence[int]) -> Doubles:
        """Return the share of each seed in each resample, float64 [B, seeds]; a single seed always has 1."""
        key = tuple(seeds)
        if key not in self._seeds:
            counts = self._counts(len(key), "seeds", *map(str, key))
            self._seeds[key] = counts.astype(np.float64) / len(key)
        return self._seeds[key]

    def _counts(self, n: int, *names: str) -> Floats:
        """Return how often each of n things is drawn in n draws, for each resample [B, n]."""
        stream = np.random.default_rng([self.seed, zlib.crc32("\0".join(names).encode())])
        drawn = stream.integers(0, n, size=(self.samples, n))
        drawn += n * np.arange(self.samples)[:, None]
        return np.bincount(drawn.ravel(), minlength=n * self.samples).reshape(self.samples, n).astype(np.float32)


def shared_items(ids: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Group languages whose test sets share items, directly or through a third one."""
    groups: list[tuple[set[str], list[str]]] = []
    for language, item_ids in ids.items():
        items, members = set(item_ids), [language]
        apart = []
        for other in groups:
            if other[0] & items:
                items, members = items | other[0], [*other[1], *members]
            else:
                apart.append(other)
        groups = [*apart, (items, members)]
    return [members for _, members in groups]


def interval(by_seed: Doubles, resampled: Doubles, confidence: float) -> tuple[Doubles, Doubles]:
    """Return a confidence interval over seeds and items of a score, or of a difference of two.

    Seeds are few, so that resampling them gives intervals that are too narrow: their part is Student's t with S − 1
    degrees of freedom. The items' part is the percentile interval of the bootstrap. Both half-widths are added in
    quadrature (docs/report.md). The spread over seeds already holds what differs between seeds item by item, so that
    share is taken out of the items' part.

    Args:
        by_seed: Scores [..., S] of the examples as they are.
        resampled: Scores of the resampled examples [..., S, B].
        confidence: Level, such as 0.95.

    Returns:
        Low and high ends, each [...]. With one seed they are the items' alone.
    """
    tail, seeds = (1 - confidence) / 2, by_seed.shape[-1]
    center, together = by_seed.mean(axis=-1), resampled.mean(axis=-2)
    low, high = np.quantile(together, [tail, 1 - tail], axis=-1)
    if seeds == 1:
        return low, high
    from scipy.stats import t

    items = together.var(axis=-1)
    # Of the items' variance with seeds held, (V_s − V) S / (S − 1) is a seed's own; V holds an S-th of it.
    own = np.maximum(resampled.var(axis=-1).mean(axis=-1) - items, 0) / (seeds - 1)
    share = np.sqrt(np.maximum(items - own, 0) / np.maximum(items, np.finfo(float).tiny))
    over_seeds = t.ppf(1 - tail, seeds - 1) * by_seed.std(axis=-1, ddof=1) / np.sqrt(seeds)
    below, above = share * (center - low), share * (high - center)
    return center - np.hypot(below, over_seeds), center + np.hypot(above, over_seeds)
