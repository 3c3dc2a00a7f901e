"""Unlabelled text of one language: found, cleaned, without evaluation sentences, split for model selection.

Text comes from files, folders or globs, or from Wikipedia on the hub (the dumps of 1 November 2023). Lines are the
unit: NFC, white space collapsed, blank and repeated ones dropped, evaluation sentences dropped
(``deftx.data.leakage``), a seeded share held out (the reference holds out 5 %). What was dropped, and why, is in the
corpus's report.
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deftx.data.hub import HubRef, load_hub, require_hub_columns
from deftx.data.leakage import LeakFilter, summarise
from deftx.data.places import Origin
from deftx.data.reading import expand, read_text
from deftx.data.settings import CorpusSettings, DataSettings, FamilyData, GeneratedFamily, LanguageSettings
from deftx.errors import DeftxError
from deftx.knobs import refuse

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

    def lines(self, limit: int | None = None, seed: int = 0) -> Iterator[str]:
        """Raw lines, uncleaned.

        Args:
            limit: Hub text only: take articles in a seeded random order and stop after this many lines.
            seed: Seed of that order.

        Raises:
            DeftxError: A file is missing, empty or not UTF-8; the hub does not answer.
        """
        for path in self.files:
            yield from read_text(path).removesuffix("\n").split("\n")
        if self.hub is not None:
            articles = load_hub(self.hub, "train")
            require_hub_columns(articles, ("text",), str(self.hub))
            if limit is not None:
                articles = articles.shuffle(seed=seed)
            seen = 0
            for article in articles:
                for line in article["text"].split("\n"):
                    yield line
                    seen += bool(line.strip())
                if limit is not None and seen >= limit:
                    return


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

    In this order: the language's own ``text``; its ``local_text`` and ``unlabelled/<code>.txt`` below ``data.root``;
    Wikipedia on the hub, unless ``data.root`` is set without ``data.wikipedia``.

    Raises:
        DeftxError: There is none; the message says where it was looked for and how to give some.
    """
    family = data.family if isinstance(data, FamilyData) else None
    root = Path(data.root).expanduser() if data.root is not None else None
    if root is not None and family is None and not root.is_dir():
        raise DeftxError(f"data.root={data.root}: no such folder")
    own = f"language.{language.code}.text"
    if language.text:
        start = root if root is not None and family is None else Path.cwd()
        matches = {text: _of_family(text, family) or expand([text], start)[text] for text in language.text}
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
    """Clean, deduplicate, filter, sample and split a language's text.

    Args:
        source: Where the text is.
        protected: Evaluation sentences to keep out (``deftx.data.tasks.protected_texts``).
        settings: Cleaning and split.
        seed: Seed of the sample and of the split; both keep the source's order.

    Raises:
        DeftxError: Settings out of range; no text; fewer lines than the split needs; or as :meth:`TextSource.lines`.
    """
    refuse(settings, "corpus.")
    # Twice the sample: some lines go as repeated, short or leaked.
    limit = None if settings.max_lines is None else 2 * settings.max_lines
    every = [clean_line(raw) for raw in source.lines(limit, seed)]
    filled = [line for line in every if line]
    long = [line for line in filled if len(line.split()) >= settings.min_words]
    lines = list(dict.fromkeys(long)) if settings.deduplicate else long
    report: dict[str, Any] = {
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "lines": len(every),
        "blank": len(every) - len(filled),
        "short": len(filled) - len(long),
        "duplicate": len(long) - len(lines),
    }
    matches = LeakFilter(protected, settings.leak_threshold).matches(lines)
    report["leak"] = {
        "threshold": settings.leak_threshold,
        "protected": len(set(protected)),
        **summarise(matches, lines, protected),
    }
    lines = [line for line, match in zip(lines, matches, strict=True) if match is None]
    report["kept"] = len(lines)
    if limit is None or source.hub is None:  # else the seed chose what was read
        report["digest"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    rng = random.Random(seed)
    if settings.max_lines is not None and len(lines) > settings.max_lines:
        lines = [lines[index] for index in sorted(rng.sample(range(len(lines)), settings.max_lines))]
    report["used"] = len(lines)  # of those kept, after max_lines
    train, valid = _split(lines, settings.valid_fraction, rng, source)
    report |= {"train": len(train), "valid": len(valid), "words": sum(len(line.split()) for line in lines)}
    return Corpus(train, valid, report)


def clean_line(line: str) -> str:
    """NFC, without byte-order marks; every run of white space, line separators included, becomes one space."""
    return " ".join(unicodedata.normalize("NFC", line.replace("\ufeff", "")).split())


def _split(lines: list[str], fraction: float, rng: random.Random, source: TextSource) -> tuple[list[str], list[str]]:
    needed = max(2, math.ceil(1 / fraction))
    if len(lines) < needed:
        raise DeftxError(
            f"{source.language!r} has {len(lines)} usable lines ({source.name}); corpus.valid_fraction={fraction} "
            f"needs at least {needed}: give more text or a larger fraction"
        )
    held = set(rng.sample(range(len(lines)), min(len(lines) - 1, round(fraction * len(lines)))))
    train = [line for index, line in enumerate(lines) if index not in held]
    valid = [line for index, line in enumerate(lines) if index in held]
    return train, valid


def _distinct(groups: Iterable[Sequence[Path]]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(path for group in groups for path in group))


def _of_family(pattern: str, family: GeneratedFamily | None) -> list[Path]:
    """Return the files of the generated family that a name or glob means; they may still have to be made."""
    if family is None:
        return []
    names = (name for name in sorted(family.names) if name.count("/") == pattern.count("/"))
    return [family.root / name for name in names if fnmatchcase(name, pattern)]
