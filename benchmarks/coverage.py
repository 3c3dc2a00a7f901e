"""How often the report's 95 % intervals hold the truth, and their width: ``python -m benchmarks.coverage``.

The model: an item is right where its number lies below the rate of method and seed. The number is an item's own in
every language, an item's own in one language, or new for every method, seed and language (noise of single predictions).
The effect of a seed is one for all languages of a method, as that of one φ_T.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deftx.report.bootstrap import interval

ITEMS = 400
RATES = (0.70, 0.68)
SEEDS = (2, 3, 5, 10)
DEVIATIONS = (0.3, 1.0, 3.0)  # points
LANGUAGES = (1, 4, 12)
NOISE, PARALLEL = 0.5, 0.6  # shares of new numbers, and of the others those that all languages share
_TOP = 1 << 16
_CHUNK = 50


def coverage(
    seeds: int, deviation: float, languages: int, *, paired: bool, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the share of intervals that hold the truth, and their median width in points.

    Args:
        seeds: Number of seeds.
        deviation: Standard deviation of a seed's effect, in points.
        languages: Number of parallel languages.
        paired: Whether the difference of two methods is estimated, instead of one method's level.
        draws: Number of simulated studies.
        rng: Draws them.
    """
    rates = np.array(RATES[: 2 if paired else 1])
    truth = float(rates[0] - rates[1]) if paired else float(rates[0])
    samples = 400
    weights = np.stack([np.bincount(rng.integers(0, ITEMS, ITEMS), minlength=ITEMS) for _ in range(samples)], axis=1)
    held, widths = 0, []
    for first in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - first)
        effects = rng.normal(0, deviation / 100, (size, len(rates), seeds))
        limit = ((rates[:, None] + effects) * _TOP).clip(0, _TOP - 1).astype(np.uint16)[..., None, None]
        everywhere = _numbers(rng, (size, 1, 1, 1, ITEMS))
        here = _numbers(rng, (size, 1, 1, languages, ITEMS))
        shared = rng.random((size, 1, 1, languages, ITEMS), dtype=np.float32) < PARALLEL
        of_item = np.where(shared, everywhere, here)
        new = _numbers(rng, (size, len(rates), seeds, languages, ITEMS))
        noisy = _numbers(rng, new.shape) < NOISE * _TOP
        right = (np.where(noisy, new, of_item) < limit).mean(axis=3, dtype=np.float32)
        values = right[:, 0] - right[:, 1] if paired else right[:, 0]
        by_seed = values.mean(axis=-1, dtype=np.float64)
        resampled = (values @ weights.astype(np.float32)).astype(np.float64) / ITEMS
        low, high = interval(by_seed, resampled, 0.95)
        held += int(((low <= truth) & (truth <= high)).sum())
        widths.append(high - low)
    return held / draws, 100 * float(np.median(np.concatenate(widths)))


def _numbers(rng: np.random.Generator, shape: Sequence[int]) -> npt.NDArray[np.uint16]:
    return rng.integers(0, _TOP, tuple(shape), dtype=np.uint16)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5000)
    options = parser.parse_args(arguments)
    print("| | seeds | deviation | " + " | ".join(f"L = {count}" for count in LANGUAGES) + " |")
    print("|---|---|---|" + "---|" * len(LANGUAGES))
    rng = np.random.default_rng(0)
    for paired in (False, True):
        for seeds in SEEDS:
            for deviation in DEVIATIONS:
                cells = [
                    coverage(seeds, deviation, languages, paired=paired, draws=options.draws, rng=rng)
                    for languages in LANGUAGES
                ]
                texts = " | ".join(f"{share:.1%}, {width:.1f}" for share, width in cells)
                print(f"| {'difference' if paired else 'level'} | {seeds} | {deviation:g} | {texts} |", flush=True)


if __name__ == "__main__":
    main()
