"""What a language's text says about its morphology, as far as counting words and pieces can.

- *Subword fertility*: pieces of the base's tokenizer a word (Ács 2019; Rust et al., ACL 2021). High where words are
  long or built of many morphemes, and where the tokenizer has hardly met the language.
- *Type-token ratio*: different words over words, in a sample of fixed length, since the ratio falls as a text grows.
  High where one lemma has many forms.
- *Words per sentence*: low where morphology does what other languages do with words.

Words are what stands between spaces, without punctuation at their ends. A text whose script writes no spaces between
words has no such words, and says so (``spaced`` is false): its numbers compare with nobody's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

SAMPLE_WORDS = 10_000
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'»”’)\]]*\s+|(?<=[。！？])|[।॥۔]\s*")
_LONGEST_USUAL = 14.0  # letters a word on average; agglutinating languages with spaces stay below 10
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def text_measures(lines: Sequence[str], count_pieces: Callable[[list[str]], int]) -> dict[str, Any]:
    """Measure a text.

    Args:
        lines: Cleaned lines, in their order; each holds one sentence or several.
        count_pieces: Gives the number of the tokenizer's pieces for a list of words, special tokens left out.

    Returns:
        ``fertility``, ``type_token_ratio`` and ``words_per_sentence`` (floats, None for a text without words),
        ``words`` (how many the first two are over, at most :data:`SAMPLE_WORDS`), ``sentences``, ``spaced``.
    """
    words: list[str] = []
    sentences = total = letters = unspaced = 0
    for line in lines:
        for sentence in filter(None, (part.strip() for part in _SENTENCE_END.split(line))):
            sentence_words = words_of(sentence)
            sentences += bool(sentence_words)
            total += len(sentence_words)
            words += sentence_words[: SAMPLE_WORDS - len(words)]
    for word in words[:1000]:
        letters += len(word)
        unspaced += sum(unicodedata.name(letter, "").startswith(_UNSPACED) for letter in word)
    sample = len(words)
    return {
        "fertility": count_pieces(words) / sample if sample else None,
        "type_token_ratio": len({word.casefold() for word in words}) / sample if sample else None,
        "words_per_sentence": total / sentences if sentences else None,
        "words": sample,
        "sentences": sentences,
        "spaced": bool(sample) and 2 * unspaced < letters and letters < _LONGEST_USUAL * min(sample, 1000),
    }


def words_of(text: str) -> list[str]:
    """Return the words of a text: what stands between spaces, punctuation at either end taken off; numbers count."""
    return [word for word in (_bare(part) for part in text.split()) if word]


def _bare(part: str) -> str:
    first, last = 0, len(part)
    while first < last and _is_mark(part[first]):
        first += 1
    while last > first and _is_mark(part[last - 1]):
        last -= 1
    return part[first:last]


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "PSZC"
