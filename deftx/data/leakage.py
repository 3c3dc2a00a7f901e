"""Find evaluation sentences in training text, labelled or not.

The idea: compare letters and digits only (no case, accents, spaces, punctuation), by edit distance, and allow fewer
edits in short sentences. "I like X" and "I like Y" are two sentences; two long reviews that agree in seven characters
of ten are one review, edited. An inverted index of character n-grams proposes the few pairs worth comparing, so
85,000 lines against 10,000 protected sentences take some twenty seconds.

Rules, for a protected sentence p and a text t of n letters each, with e = (1 − threshold) · min(1, n / 60):

- ``exact``: equal after normalisation.
- ``near``: Indel similarity 2·LCS / (|p| + |t|) ≥ 1 − e, with n = |p|.
- ``contained``: the best window of t matches p with similarity ≥ 1 − e/2 (half the edits: the window is free to choose
  its place), with n = |p| ≥ 20.
- ``fragment``: the same with the roles exchanged, t is a piece of p, with n = |t| ≥ 40.

Measured on SMSA train (11,000 rows) against the 500 Indonesian NusaX valid and test sentences. The shared overlap list
has 269 exact and 82 near rows (word-trigram Jaccard of at least 0.5); the unlisted rows dropped were read one by one.

    threshold   exact   near   unlisted rows dropped
    0.6         269     82     141, of them about 15 unrelated
    0.7         269     82     118, of them 4 unrelated
    0.8         269     82      99, none unrelated
    0.9         269     65      63, none unrelated

The unlisted rows are edits that word trigrams miss. 0.7, the default, finds 15 more of them than 0.8 for 4 unrelated
rows; below it sentences of the same pattern come in ("I am not disappointed with ..."). Nothing here knows a language.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz import fuzz

from deftx.data.settings import DEFAULT_LEAK_THRESHOLD
from deftx.errors import DeftxError

FULL_LENGTH = 60
"""Letters from which a sentence gets its whole edit budget."""

MIN_CONTAINED = 20
"""Letters a protected sentence needs to be looked for inside a text: "no lo sé" is in many lines and leaks nothing."""

MIN_FRAGMENT = 40
"""Letters a text needs to be looked for inside a protected sentence: short phrases recur everywhere."""

_GRAM = 5
_IDEOGRAPH_GRAM = 2
_IDEOGRAPH_WEIGHT = 3
# Shares of n-grams in common that make a pair worth comparing. Random substitutions that bring two texts down to
# similarity s leave s**5 of their 5-grams: 0.17 at s = 0.7, 0.44 at s = 0.85. Real edits cluster and leave more.
_NEAR_SHARE = 0.15
_INSIDE_SHARE = 0.3
_COMMON_SHARE = 0.01
_CELLS = 4_000_000

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """A text that is, contains, or is part of a protected sentence.

    Attributes:
        index: Position in the protected sentences as they were given.
        similarity: In [0, 1].
        kind: ``exact``, ``near``, ``contained`` or ``fragment``.
    """

    index: int
    similarity: float
    kind: str


class _Letters(dict[int, int | None]):
    """``str.translate`` table that keeps letters, digits and spacing marks; it decides each character once."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        category = unicodedata.category(char)
        # Modifier letters are spelling apostrophes; marks with a combining class are accents, those without are vowels.
        keep = category in ("Lu", "Ll", "Lt", "Lo") or category[0] == "N"
        keep = keep or (category[0] == "M" and unicodedata.combining(char) == 0)
        self[code] = code if keep else None
        return self[code]


_LETTERS = _Letters()


def normalise(text: str) -> str:
    """Letters and digits of ``text``, without case, accents, spaces, punctuation or apostrophes."""
    return unicodedata.normalize("NFKD", text).casefold().translate(_LETTERS)


class LeakFilter:
    """Looks for protected sentences in texts.

    Args:
        protected: Evaluation sentences; blank and repeated ones are fine.
        threshold: Similarity of a long sentence's edited copy, in (0, 1]; 1 finds equal and contained sentences only.
            Above 1 finds nothing.

    Raises:
        DeftxError: The threshold is not positive.
    """

    def __init__(self, protected: Sequence[str], threshold: float = DEFAULT_LEAK_THRESHOLD) -> None:
        if not threshold > 0:
            raise DeftxError(f"leak_threshold={threshold}: must lie in (0, 1], or above 1 to turn the leak filter off")
        self.threshold = threshold
        first: dict[str, int] = {}
        if threshold <= 1:
            for index, text in enumerate(protected):
                first.setdefault(normalise(text), index)
            first.pop("", None)
        self._first = first
        self._texts = list(first)
        self._weights = [_weight(text) for text in self._texts]
        # Each sentence by its own script, so that sentences of another one beside it change nothing.
        pairs = zip(self._texts, self._weights, strict=True)
        wide = [2 * weight > len(text) * (1 + _IDEOGRAPH_WEIGHT) for text, weight in pairs]
        self._indices = [
            _Index([position for position, is_wide in enumerate(wide) if is_wide is kind], self._texts, gram)
            for kind, gram in ((False, _GRAM), (True, _IDEOGRAPH_GRAM))
            if kind in wide
        ]

    def __len__(self) -> int:
        """Return how many distinct sentences are protected."""
        return len(self._texts)

    def matches(self, texts: Iterable[str]) -> list[Match | None]:
        """Return the best match of each text, or ``None``.

        Args:
            texts: Any number of texts.

        Returns:
            One entry a text, in order.
        """
        if not self._texts:
            return [None for _ in texts]
        return list(self._matches([normalise(text) for text in texts]))

    def _matches(self, texts: list[str]) -> Iterator[Match | None]:
        size = max(1, _CELLS // len(self._texts))
        for start in range(0, len(texts), size):
            chunk = texts[start : start + size]
            candidates_of: list[list[tuple[int, float]]] = [[] for _ in chunk]
            for index in self._indices:
                for line, position, share in index.candidates(chunk, self.threshold):
                    candidates_of[line].append((position, share))
            for text, candidates in zip(chunk, candidates_of, strict=True):
                yield self._best(text, candidates)

    def _best(self, text: str, candidates: Sequence[tuple[int, float]]) -> Match | None:
        if text in self._first:
            return Match(self._first[text], 1.0, "exact")
        best: Match | None = None
        weight = _weight(text) if candidates else 0
        for position, share in candidates:
            match = self._compare(text, weight, position, inside=share >= _INSIDE_SHARE)
            if match is not None and (best is None or match.similarity > best.similarity):
                best = match
        return best

    def _compare(self, text: str, weight: int, position: int, *, inside: bool) -> Match | None:
        protected, length = self._texts[position], self._weights[position]
        near = 100 * (1 - self._budget(length))
        similarity = fuzz.ratio(text, protected, score_cutoff=near)
        if similarity >= near:
            return Match(self._first[protected], similarity / 100, "near")
        if not inside:
            return None
        contained = len(protected) <= len(text)
        shorter = length if contained else weight
        if shorter < (MIN_CONTAINED if contained else MIN_FRAGMENT):
            return None
        cutoff = 100 * (1 - self._budget(shorter) / 2)
        similarity = fuzz.partial_ratio(text, protected, score_cutoff=cutoff)
        if similarity < cutoff:
            return None
        return Match(self._first[protected], similarity / 100, "contained" if contained else "fragment")

    def _budget(self, weight: int) -> float:
        return (1 - self.threshold) * min(1.0, weight / FULL_LENGTH)


class _Index:
    """An inverted index of the character n-grams of some protected sentences.

    Args:
        positions: Which of ``texts`` it holds.
        texts: All protected sentences, normalised.
        gram: Characters of an n-gram.
    """

    def __init__(self, positions: Sequence[int], texts: Sequence[str], gram: int) -> None:
        self._positions = np.array(positions, dtype=np.int64)
        self._gram = gram
        texts = [texts[position] for position in positions]
        grams, owners = _grams(texts, gram)
        order = np.lexsort((owners, grams))
        grams, owners = grams[order], owners[order]
        first = np.ones(len(grams), dtype=bool)
        first[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
        grams, owners = grams[first], owners[first]
        _, inverse, frequency = np.unique(grams, return_inverse=True, return_counts=True)
        total = np.bincount(owners, minlength=len(texts))
        # Frequent n-grams cost most and tell least; a sentence made of little else keeps all of its own.
        rare = frequency[inverse] <= max(20, int(_COMMON_SHARE * len(texts)))
        left = np.bincount(owners[rare], minlength=len(texts))
        keep = rare | (left < 0.5 * total)[owners]
        grams, owners = grams[keep], owners[keep]
        self._keys, self._starts = np.unique(grams, return_index=True)
        self._ends = np.append(self._starts[1:], len(grams))
        self._owners = owners
        self._lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self._kept = np.bincount(owners, minlength=len(texts))

    def candidates(self, texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
        """Yield what shares enough n-grams: number of the text, position of the sentence, share of the shorter's."""
        grams, lines = _grams(texts, self._gram)
        if not len(self._keys) or not len(grams):
            return
        slot = np.minimum(np.searchsorted(self._keys, grams), len(self._keys) - 1)
        hit = self._keys[slot] == grams
        slot, lines = slot[hit], lines[hit]
        width = self._ends[slot] - self._starts[slot]
        offset = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
        owners = self._owners[np.repeat(self._starts[slot], width) + offset]
        cells = np.repeat(lines, width) * len(self._positions) + owners
        counts = np.bincount(cells, minlength=len(texts) * len(self._positions))
        cells = np.flatnonzero(counts)
        rows, positions = np.divmod(cells, len(self._positions))
        own = np.array([max(1, len(text) - self._gram + 1) for text in texts])
        shares = counts[cells] / np.minimum(self._kept[positions], own[rows])
        enough = shares >= _NEAR_SHARE
        rows, positions, shares = rows[enough], positions[enough], shares[enough]
        lengths = np.array([len(text) for text in texts])[rows], self._lengths[positions]
        # Texts of very different length cannot be near; they are compared only if one may hold the other.
        near = 2 * np.minimum(*lengths) >= threshold * (lengths[0] + lengths[1])
        worth = near | (shares >= _INSIDE_SHARE)
        found = rows[worth].tolist(), self._positions[positions[worth]].tolist(), shares[worth].tolist()
        yield from zip(*found, strict=True)


def _weight(text: str) -> int:
    """Length in letters; an ideograph says about as much as three letters of an alphabet."""
    if text.isascii():
        return len(text)
    return len(text) + (_IDEOGRAPH_WEIGHT - 1) * sum(char >= "\u2e80" for char in text)


def _grams(texts: Sequence[str], size: int) -> tuple[npt.NDArray[np.uint64], IntArray]:
    """Hashes of the character n-grams of all texts, and the text each belongs to."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    if len(codes) < size:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    last = len(codes) - size + 1
    hashes = np.zeros(last, np.uint64)
    for shift in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[shift : shift + last]
    whole = owners[:last] == owners[size - 1 :]
    return hashes[whole], owners[:last][whole]


def summarise(
    matches: Sequence[Match | None], texts: Sequence[str], protected: Sequence[str], limit: int = 5
) -> dict[str, Any]:
    """Return what a filter dropped, as plain values: counts by kind and a few examples, most doubtful first."""
    matched = [(match, text) for match, text in zip(matches, texts, strict=True) if match is not None]
    kinds = ("exact", "near", "contained", "fragment")
    examples = sorted(matched, key=lambda item: item[0].similarity)[:limit]
    return {
        "dropped": len(matched),
        "by_kind": {kind: sum(match.kind == kind for match, _ in matched) for kind in kinds},
        "examples": [
            {
                "text": text,
                "protected": protected[match.index],
                "similarity": round(match.similarity, 3),
                "kind": match.kind,
            }
            for match, text in examples
        ],
    }
