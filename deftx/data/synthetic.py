"""An offline family of generated languages: unlabelled text, labelled sentiment in the source, tests in every member.

The idea: one ancestral vocabulary of *concepts*; every member derives a share of its words from it by its own regular
sound changes (cognates) and invents the rest, a target partly as false friends of high-resource words. Members share
word order, function words and a handful of international interjections, and build words from stems and productive
affixes, so a tokenizer trained on them yields real subwords. In running text evaluative words keep company with each
other and with interjections of their own polarity, and nouns with nouns of their topic: that distribution is what
masked language modelling can learn for a language the encoder has never seen. The labelled sentences carry no
interjections, as in sentiment sets collected by distant supervision (Go et al. 2009 strip the emoticons), so a
target's test sentences are read by its own words.

It demonstrates the plumbing, not the method: these are not natural languages. Standard library only; the same seed
writes the same bytes on every machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from deftx.data.settings import DataSettings, FamilyData, GeneratedFamily, SyntheticSettings
from deftx.errors import DeftxError
from deftx.knobs import refuse

T = TypeVar("T")

LABELS = ("negative", "neutral", "positive")
CONSONANTS = "ptkbdgmnslrvzh"
VOWELS = "aeiou"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Lexicon:
    """One member's words.

    Attributes:
        words: Form of each concept (``noun.2.3``, ``quality.positive.4``, ``verb.negative.0``, ``function.and``,
            ``interjection.positive.1``, ...).
        cognates: Concepts inherited from the ancestor.
        affixes: Form of each suffix (``plural``, ``past``, ``superlative``, ...).
    """

    words: dict[str, str]
    cognates: frozenset[str]
    affixes: dict[str, str]


class _Dice:
    """Integer draws only: independent of the platform and of how ``random`` derives floats, choices and shuffles."""

    def __init__(self, *key: object) -> None:
        self._bits = random.Random("/".join(str(part) for part in key)).getrandbits

    def below(self, limit: int) -> int:
        while True:
            value = self._bits(limit.bit_length())
            if value < limit:
                return value

    def chance(self, share: float) -> bool:
        return self.below(1_000_000) < round(share * 1_000_000)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


_FUNCTION_WORDS = ("the", "a", "and", "but", "very", "quite")
_NUMBERS = ("singular", "dual", "plural")
_TENSES = ("past", "present", "future")
_DEGREES = ("plain", "comparative", "superlative")
_AFFIXES = (*_NUMBERS, *_TENSES, *_DEGREES)
_NAMES = 4


def _concepts(settings: SyntheticSettings) -> tuple[list[str], list[str]]:
    """Return plain content concepts (nouns, verbs) and evaluative ones."""
    plain = [f"noun.{t}.{i}" for t in range(settings.topics) for i in range(settings.nouns_per_topic)]
    evaluative = [f"verb.{label}.{i}" for label in LABELS for i in range(settings.verbs)]
    return plain, evaluative + [f"quality.{label}.{i}" for label in LABELS for i in range(settings.synonyms)]


def _new(draw: Callable[[], str], taken: set[str]) -> str:
    """Return the first form drawn that is not in ``taken``; it is added there."""
    for _ in range(10_000):
        form = draw()
        if form not in taken:
            taken.add(form)
            return form
    raise DeftxError("the synthetic family has run out of word forms; lower synonyms, nouns_per_topic, topics or verbs")


def _stem(dice: _Dice, taken: set[str]) -> str:
    """Draw a new stem of the form CVCV or CVCVC."""

    def draw() -> str:
        form = "".join(dice.pick(CONSONANTS) + dice.pick(VOWELS) for _ in range(2))
        return form + dice.pick("nslrk") if dice.chance(0.4) else form

    return _new(draw, taken)


def _sound_changes(dice: _Dice) -> dict[int, str]:
    """Draw a member's regular sound changes: three consonants and one vowel become another sound everywhere."""
    old, new = dice.shuffled(CONSONANTS)[:3], dice.shuffled(CONSONANTS)[:3]
    changes = dict(zip(old, new, strict=True))
    first, second = dice.shuffled(VOWELS)[:2]
    changes[first] = second
    return str.maketrans(changes)


def lexicons(settings: SyntheticSettings) -> dict[str, Lexicon]:
    """Draw every member's words.

    Returns:
        Lexicon of each member, in the order of ``settings.members``.

    Raises:
        DeftxError: A setting is out of its range, or the vocabulary does not fit into the possible word forms.
    """
    refuse(settings, "synthetic.")
    plain, evaluative = _concepts(settings)
    dice = _Dice(settings.seed, "ancestor")
    taken: set[str] = set()
    ancestor = {concept: _stem(dice, taken) for concept in plain + evaluative}
    shared: dict[str, str] = {}
    for label in LABELS:
        for index in range(settings.interjections):
            shared[f"interjection.{label}.{index}"] = _stem(dice, taken) + "h"
    for index in range(_NAMES):
        shared[f"name.{index}"] = _stem(dice, taken)
    for word in _FUNCTION_WORDS:
        shared[f"function.{word}"] = _new(lambda: dice.pick(VOWELS) + dice.pick(CONSONANTS), taken)
    suffixes: set[str] = set()
    ancestral_affixes = {name: _new(lambda: dice.pick(VOWELS) + dice.pick("mnslrt"), suffixes) for name in _AFFIXES}

    result: dict[str, Lexicon] = {}
    for code in settings.members:
        dice = _Dice(settings.seed, "lexicon", code)
        changes = _sound_changes(dice)
        words = dict(shared)
        used = set(shared.values())
        cognates: set[str] = set()
        for concepts, share in ((plain, settings.cognates), (evaluative, settings.evaluative_cognates)):
            for concept in sorted(dice.shuffled(concepts)[: round(share * len(concepts))]):
                form = ancestor[concept].translate(changes)
                if form not in used:  # a sound change may merge two words: the later one is replaced by an own word
                    words[concept] = form
                    used.add(form)
                    cognates.add(concept)
        friends: list[tuple[str, str]] = []
        if code in settings.targets:
            for other in (settings.source, *settings.high_resource):
                friends += [(c, result[other].words[c]) for c in plain + evaluative]
            friends = dice.shuffled(friends)
        for concept in dice.shuffled(c for c in plain + evaluative if c not in words):
            form = ""
            if friends and dice.chance(settings.false_friends):
                at = next((i for i, (c, f) in enumerate(friends) if c != concept and f not in used), None)
                if at is not None:
                    form = friends.pop(at)[1]
                    used.add(form)
            words[concept] = form or _stem(dice, used)
        affixes = {name: form.translate(changes) for name, form in ancestral_affixes.items()}
        if len(set(affixes.values())) < len(affixes):
            affixes = ancestral_affixes
        result[code] = Lexicon(words, frozenset(cognates), affixes)
    return result


class _Speaker:
    """Speaks one member's language."""

    def __init__(self, lexicon: Lexicon, settings: SyntheticSettings, dice: _Dice) -> None:
        self.words, self.affixes, self.settings, self.dice = lexicon.words, lexicon.affixes, settings, dice

    def _inflect(self, concept: str, affix: str) -> str:
        return self.words[concept] + self.affixes[affix]

    def _noun(self, topic: int) -> str:
        number = self.dice.pick(_NUMBERS)
        return self._inflect(f"noun.{topic}.{self.dice.below(self.settings.nouns_per_topic)}", number)

    def _polarity(self, label: str) -> str:
        return label if self.dice.chance(self.settings.purity) else self.dice.pick(LABELS)

    def _evaluative(self, label: str) -> list[str]:
        dice = self.dice
        word = self._inflect(
            f"quality.{self._polarity(label)}.{dice.below(self.settings.synonyms)}", dice.pick(_DEGREES)
        )
        return [self.words[dice.pick(("function.very", "function.quite"))], word] if dice.chance(0.1) else [word]

    def clause(self, topic: int, label: str) -> list[str]:
        dice, words = self.dice, self.words
        subject = [words[dice.pick(("function.the", "function.a"))], self._noun(topic)]
        verb = self._inflect(f"verb.{self._polarity(label)}.{dice.below(self.settings.verbs)}", dice.pick(_TENSES))
        return [*subject, verb, *self._evaluative(label)]

    def sentence(self, label: str, clauses: int, *, interjections: bool) -> str:
        dice = self.dice
        topic = dice.below(self.settings.topics)
        result: list[str] = []
        for index in range(clauses):
            if index:
                result.append(self.words[dice.pick(("function.and", "function.but"))])
            result += self.clause(topic, label)
            if interjections and dice.chance(self.settings.interjection_rate):
                result.append(self.words[f"interjection.{label}.{dice.below(self.settings.interjections)}"])
        return " ".join(result)


def _parts(settings: SyntheticSettings, code: str) -> dict[str, int]:
    """Return labelled files of a member and their sizes: only the source has rows to learn from."""
    parts = {"train": settings.train, "valid": settings.valid} if code == settings.source else {}
    return {**parts, "test": settings.test}


def family_data(data: DataSettings, settings: SyntheticSettings, root: Path, key: str) -> FamilyData:
    """Return the data settings of a study on the generated family, whether or not its folder is there yet.

    Args:
        data: The study's own.
        settings: What is generated.
        root: Where :func:`generate_family` writes it.
        key: Key of the stage that does.
    """
    names = [f"unlabelled/{code}.txt" for code in settings.members]
    names += [f"sentiment/{code}/{part}.tsv" for code in settings.members for part in _parts(settings, code)]
    return FamilyData(**{**vars(data), "root": str(root), "family": GeneratedFamily(key, root, tuple(names))})


def generate_family(folder: Path, settings: SyntheticSettings) -> None:
    """Write the family into a new folder; a few seconds.

    Layout: ``unlabelled/<code>.txt`` (a sentence a line), ``sentiment/<code>/{train,valid,test}.tsv`` (header
    ``text<TAB>label``; train and valid for the source only), ``lexicon.tsv`` (concept by member) and ``family.json``
    (settings, roles, sizes).

    Args:
        folder: Where to write; it must not exist or be empty.
        settings: What to generate.

    Raises:
        DeftxError: A setting is out of its range, or the folder already holds something.
    """
    words = lexicons(settings)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeftxError(f"{folder} already holds something; give a new folder for the synthetic family")
    description = {}
    for code, lexicon in words.items():
        parts = _parts(settings, code)
        seen: set[str] = set()
        for part, size in parts.items():
            rows = _labelled(_Speaker(lexicon, settings, _Dice(settings.seed, part, code)), size, seen)
            _write(folder / "sentiment" / code / f"{part}.tsv", ["text\tlabel", *rows])
        lines = settings.lines_low if code in settings.targets else settings.lines_high
        speaker = _Speaker(lexicon, settings, _Dice(settings.seed, "unlabelled", code))
        _write(folder / "unlabelled" / f"{code}.txt", _unlabelled(speaker, lines, seen))
        role = "source" if code == settings.source else "target" if code in settings.targets else "high_resource"
        description[code] = {"role": role, "unlabelled": lines, "sentiment": parts, "cognates": len(lexicon.cognates)}
    concepts = sorted(words[settings.source].words)
    rows = ["\t".join((concept, *(words[code].words[concept] for code in words))) for concept in concepts]
    _write(folder / "lexicon.tsv", ["\t".join(("concept", *words)), *rows])
    family = {"format_version": FORMAT_VERSION, "settings": asdict(settings), "labels": LABELS, "members": description}
    _write(folder / "family.json", [json.dumps(family, indent=2)])


def _labelled(speaker: _Speaker, size: int, seen: set[str]) -> list[str]:
    """``size`` new rows with balanced labels in random order; what they say goes into ``seen``."""
    rows = []
    for label in LABELS:
        for _ in range(size // len(LABELS)):
            while True:
                text = speaker.sentence(label, 2, interjections=False)
                if text not in seen:
                    break
            seen.add(text)
            rows.append(f"{text}\t{label}")
    return speaker.dice.shuffled(rows)


def _unlabelled(speaker: _Speaker, lines: int, protected: set[str]) -> list[str]:
    """``lines`` sentences, none of them a labelled one."""
    result: list[str] = []
    while len(result) < lines:
        text = speaker.sentence(speaker.dice.pick(LABELS), speaker.settings.clauses, interjections=True)
        if text not in protected:
            result.append(text)
    return result


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
