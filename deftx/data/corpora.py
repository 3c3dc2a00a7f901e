"""Unlabelled text of one language: found, cleaned, without evaluation sentences, split for model selection.

Text comes from files, folders or globs, or from Wikipedia on the hub (the dumps of 1 November 2023). Lines are the
unit: NFC, white space collapsed, blank and repeated ones dropped, evaluation sentences dropped
(``deftx.data.leakage``). The first lines of each file are held out in one piece (the reference holds out 5 %), and
lines that resemble them are dropped from the rest: neighbouring lines of a text often repeat each other. The piece
depends on text and cleaning alone, so a base that is pretrained here and the language SFTs on it hold out the same
lines. What was dropped, and why, is in the corpus's report.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from deftx.data.hub import HubRef, load_hub, require_hub_columns
from deftx.data.leakage import LeakFilter, summarise
from deftx.data.places import Origin
from deftx.data.reading import expand, read_text
from deftx.data.settings import CorpusSettings, DataSettings, FamilyData, GeneratedFamily, LanguageSettings
from deftx.errors import DeftxError
from deftx.knobs import refuse

log = logging.getLogger(__name__)

WIKIPEDIA = "wikimedia/wikipedia"
WIKIPEDIA_DUMP = "20231101"


class MissingTextError(DeftxError):
    """No unlabelled text is there for a language at all, as opposed to text that is bad."""


@dataclass(frozen=True, kw_only=True)
class TextSource(Origin):
    """Where the unlabelled text of a language is: files, or Wikipedia on the hub.

    Attributes:
        language: Code of the language.
    """

    language: str

    @property
    def name(self) -> str:
        """Short description for reports: file names or the hub data set."""
        return str(self.hub) if self.hub is not None else ", ".join(path.name for path in self.files)

    def pieces(
        self, fraction: float, limit: int | None = None, seed: int = 0
    ) -> Iterator[tuple[list[str], int | None]]:
        """Yield the raw lines of one file after the other, and how many of them are held out as they stand.

        Files are split after cleaning: the number is None. Of a hub data set the first articles are held out, so that
        the piece does not depend on the articles that ``limit`` chooses from the others.

        Args:
            fraction: Share of the articles that is held out.
            limit: Hub text only: take articles in a seeded random order and stop after this many lines.
            seed: Seed of that order.

        Raises:
            DeftxError: A file is missing, empty or not UTF-8; the hub does not answer.
        """
        for path in self.files:
            yield read_text(path).removesuffix("\n").split("\n"), None
        if self.hub is not None:
            articles = load_hub(self.hub, "train")
            require_hub_columns(articles, ("text",), str(self.hub))
            first = min(len(articles) - 1, max(1, round(fraction * len(articles))))
            held, rest = articles.select(range(first)), articles.select(range(first, len(articles)))
            valid = _article_lines(held, None if limit is None else math.ceil(fraction * limit))
            train = _article_lines(rest if limit is None else rest.shuffle(seed=seed), limit)
            yield [*valid, *train], len(valid)


@dataclass(frozen=True)
class Corpus:
    """Cleaned text of one language.

    Attributes:
        train: Lines to learn from, in the source's order.
        valid: Lines held out, in the source's order.
        report: Counts of what was read, dropped (and why) and kept; plain JSON.
    """

    train: list[str]
    valid: list[str]
    report: dict[str, Any] = field(default_factory=dict)


def resolve_text(language: LanguageSettings, data: DataSettings) -> TextSource:
    """Find a language's unlabelled text; nothing is read or downloaded yet.

    In this order: ``data.text`` of its code; the language's own ``text``; its ``local_text`` and
    ``unlabelled/<code>.txt`` below ``data.root``; Wikipedia on the hub, unless ``data.root`` is set without
    ``data.wikipedia``.

    Raises:
        DeftxError: There is none; the message says where it was looked for and how to give some.
    """
    family = data.family if isinstance(data, FamilyData) else None
    root = Path(data.root).expanduser() if data.root is not None else None
    if root is not None and family is None and not root.is_dir():
        raise DeftxError(f"data.root={data.root}: no such folder")
    own = f"data.text.{language.code}"
    texts = data.text.get(language.code) or language.text
    if texts:
        start = root if root is not None and family is None else Path.cwd()
        matches = {text: _of_family(text, family) or expand([text], start)[text] for text in texts}
        missing = [pattern for pattern, files in matches.items() if not files]
        if missing:
            raise DeftxError(f"no text file matches {', '.join(missing)} ({own}, below {start})")
        return TextSource(language=language.code, files=_distinct(matches.values()), family=family)
    patterns = [*language.local_text, f"unlabelled/{language.code}.txt"]
    if root is not None:
        matches = expand(patterns, root) if family is None else {text: _of_family(text, family) for text in patterns}
        if files := _distinct(matches.values()):
            return TextSource(language=language.code, files=files, family=family)
    dataset = data.wikipedia or (WIKIPEDIA if root is None else None)
    if dataset is not None and language.wikipedia is not None:
        config = f"{WIKIPEDIA_DUMP}.{language.wikipedia}"
        ref = HubRef(dataset, config, data.revisions.get("wikipedia"), data.cache_dir)
        return TextSource(language=language.code, hub=ref)
    looked = f"below {root}: {', '.join(patterns)}" if root is not None else "data.root is not set"
    if language.wikipedia is None:
        wikipedia = "it has no Wikipedia"
    else:
        wikipedia = f"or data.wikipedia={WIKIPEDIA} for {WIKIPEDIA_DUMP}.{language.wikipedia}"
    raise MissingTextError(f"no unlabelled text for {language.code!r} ({looked}); set {own}=[FILE, ...]; {wikipedia}")


def build_corpus(source: TextSource, protected: Sequence[str], settings: CorpusSettings, seed: int) -> Corpus:
    """Clean, deduplicate, filter, split and sample a language's text.

    Args:
        source: Where the text is.
        protected: Evaluation sentences to keep out (``deftx.data.tasks.protected_texts``).
        settings: Cleaning and split.
        seed: Seed of the sample that ``max_lines`` takes of the lines to learn from; it keeps the source's order.

    Raises:
        DeftxError: Settings out of range; no text; fewer lines than the split needs; or as :meth:`TextSource.pieces`.
    """
    refuse(settings, "corpus.")
    # Twice the sample: some lines go as repeated, short or leaked.
    limit = None if settings.max_lines is None else 2 * settings.max_lines
    lines, held, counts = _cleaned(source, settings, limit, seed)
    report: dict[str, Any] = {"source": source.name, "fingerprint": source.fingerprint(), **counts}
    matches = LeakFilter(protected, settings.leak_threshold).matches(lines)
    report["leak"] = {
        "threshold": settings.leak_threshold,
        "protected": len(set(protected)),
        **summarise(matches, lines, protected),
    }
    clean = [(line, where) for line, where, match in zip(lines, held, matches, strict=True) if match is None]
    report["kept"] = len(clean)
    if limit is None or source.hub is None:  # else the seed chose what was read
        report["digest"] = hashlib.sha256("\n".join(line for line, _ in clean).encode()).hexdigest()
    train, valid = _split(clean, settings, source, report)
    if settings.max_lines is not None and len(train) + len(valid) > settings.max_lines:
        valid = valid[: max(1, round(settings.valid_fraction * settings.max_lines))]
        chosen = random.Random(seed).sample(range(len(train)), min(len(train), settings.max_lines - len(valid)))
        train = [train[index] for index in sorted(chosen)]
    report["used"] = len(train) + len(valid)  # of those kept
    words = sum(len(line.split()) for line in (*train, *valid))
    report |= {"train": len(train), "valid": len(valid), "words": words}
    return Corpus(train, valid, report)


_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers and an empty Braille cell


def clean_line(line: str) -> str:
    """Return a line in NFC, without byte-order marks; every run of white space becomes one space.

    A line of nothing that a person sees (spaces of zero width, marks without a letter) is empty.
    """
    text = " ".join(unicodedata.normalize("NFC", line.replace("\ufeff", "")).split())
    return text if any(map(_is_visible, text)) else ""


def _is_visible(character: str) -> bool:
    category = unicodedata.category(character)
    return category not in ("Cc", "Cf") and category[0] not in "ZM" and character not in _BLANK_LETTERS


_TEMPLATED = 0.5
"""Share of lines like the held-out ones above which the likeness is the text's own, and no copy."""

Part = int | bool
"""Where a line stands: the number of its file, or whether it is held out where that is known before cleaning."""


def _cleaned(
    source: TextSource, settings: CorpusSettings, limit: int | None, seed: int
) -> tuple[list[str], list[Part], dict[str, int]]:
    """Return the cleaned lines, where each stands, and how many lines were read and dropped."""
    counts = dict.fromkeys(("lines", "blank", "short", "duplicate"), 0)
    lines: list[str] = []
    parts: list[Part] = []
    seen: set[str] = set()
    for number, (piece, held) in enumerate(source.pieces(settings.valid_fraction, limit, seed)):
        counts["lines"] += len(piece)
        for position, line in enumerate(map(clean_line, piece)):
            if not line:
                counts["blank"] += 1
            elif len(line.split()) < settings.min_words:
                counts["short"] += 1
            elif settings.deduplicate and line in seen:
                counts["duplicate"] += 1
            else:
                lines.append(line)
                parts.append(number if held is None else position < held)
                seen.add(line)
    return lines, parts, counts


def _split(
    lines: list[tuple[str, Part]], settings: CorpusSettings, source: TextSource, report: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Hold out the first lines of each file, and drop from the rest what resembles them."""
    fraction = settings.valid_fraction
    needed = max(2, math.ceil(1 / fraction))
    if len(lines) < needed:
        leaked = report["leak"]["dropped"]
        why = f", after {leaked} were dropped as evaluation sentences" if leaked else ""
        raise DeftxError(
            f"{source.language!r} has {len(lines)} usable lines ({source.name}){why}; "
            f"corpus.valid_fraction={fraction} needs at least {needed}: give more text or a larger fraction"
        )
    if source.hub is not None:
        valid = [line for line, held in lines if held]
        train = [line for line, held in lines if not held]
    else:
        train, valid, done = [], [], 0
        for _, file in groupby(lines, key=itemgetter(1)):
            texts = [line for line, _ in file]
            # Rounded over all files so far: many short files together hold out their share.
            first = round(fraction * (done + len(texts))) - round(fraction * done)
            valid += texts[:first]
            train += texts[first:]
            done += len(texts)
    # The sentences of the generated family follow a few patterns: each resembles some that are held out.
    near = LeakFilter(valid, 2.0 if source.generated else settings.leak_threshold).matches(train)
    report["near_valid"] = alike = sum(match is not None for match in near)
    if alike > _TEMPLATED * len(train):
        report["near_valid"] = 0
        log.warning(
            "%s: %d of the %d lines to learn from resemble held-out ones, as in text of a few patterns; they are kept, "
            "so the validation loss says little about other text",
            source.name,
            alike,
            len(train),
        )
    else:
        train = [line for line, match in zip(train, near, strict=True) if match is None]
    for split, rest in (("training", train), ("validation", valid)):
        if not rest:
            raise DeftxError(
                f"{source.language!r}: no {split} lines are left ({source.name}: {len(lines)} usable lines); give more "
                "text or a larger corpus.valid_fraction"
            )
    return train, valid


def _article_lines(articles: Any, limit: int | None) -> list[str]:
    """Return the lines of articles, whole ones, until ``limit`` lines that are not blank."""
    lines: list[str] = []
    filled = 0
    for article in articles:
        piece = article["text"].split("\n")
        lines += piece
        filled += sum(bool(line.strip()) for line in piece)
        if limit is not None and filled >= limit:
            break
    return lines


def _distinct(groups: Iterable[Sequence[Path]]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(path for group in groups for path in group))


def _of_family(pattern: str, family: GeneratedFamily | None) -> list[Path]:
    """Return the files of the generated family that a name or glob means; they may still have to be made."""
    if family is None:
        return []
    names = (name for name in sorted(family.names) if name.count("/") == pattern.count("/"))
    return [family.root / name for name in names if fnmatchcase(name, pattern)]
