"""What a user may choose about data: where data sets lie, what a language is called in each, how text is cleaned.

Standard library only. ``conf/language/<code>.yaml`` fills one :class:`LanguageSettings`; adding a language is adding
one file. Languages are named by their three-letter ISO 639 code (``ace``, ``quy``, ``nah``, ``deu``); the only
exception is Guarani, which AmericasNLI calls ``gn``. Other codes people type are in :data:`LANGUAGE_ALIASES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deftx.knobs import Range, at_least, between, knob, matching, one_of

DEFAULT_LEAK_THRESHOLD = 0.7
SPLITS = ("test", "dev")
"""What can be evaluated, in the order of tables."""

PROTECTED = ("nusax", "americasnli", "xnli")
_THRESHOLD = Range("must lie in (0, 1], or above 1 to turn the filter off", lambda value: value > 0)

LANGUAGE_ALIASES = {
    "ar": "ara",
    "ay": "aym",
    "bg": "bul",
    "btk": "bbc",
    "de": "deu",
    "el": "ell",
    "en": "eng",
    "es": "spa",
    "fr": "fra",
    "grn": "gn",
    "gug": "gn",
    "hi": "hin",
    "id": "ind",
    "jv": "jav",
    "qu": "quy",
    "que": "quy",
    "ru": "rus",
    "su": "sun",
    "sw": "swa",
    "swh": "swa",
    "th": "tha",
    "tr": "tur",
    "ur": "urd",
    "vi": "vie",
    "zh": "zho",
}
"""Other codes people type, and the code of this project's configuration file."""


@dataclass
class DataSettings:
    """Where data sets are found.

    Each of ``nusax``, ``smsa``, ``americasnli``, ``multinli``, ``xnli`` and ``wikipedia`` is a folder (a clone of the
    upstream repository, or a copy of the hub data set) or a hub id. Null means ``<root>/<folder>`` when ``root`` is
    set, with the folders ``nusax``, ``indonlu``, ``americasnli``, ``multinli`` and ``xnli``; nothing is downloaded
    then. With neither, the hub data set named in ``docs/method.md`` is used.

    Attributes:
        root: Folder with clones of the data sets, and with files of your own: ``unlabelled/<code>.txt``,
            ``sentiment/<code>/{train,valid,test}.tsv``, ``nli/<code>/{train,valid,test}.tsv``.
        nusax: IndoNLP/nusax.
        smsa: IndoNLP/indonlu.
        americasnli: abteen/americasnli.
        multinli: MultiNLI.
        xnli: XNLI.
        wikipedia: Wikipedia text; null means none when ``root`` is set, else ``wikimedia/wikipedia``.
        train: Your own labelled file for the tasks ``sentiment``, ``nli`` and ``tsv``; ``{language}`` becomes the code.
        valid: The same for validation and for ``split=dev``; null validates on a seeded part of ``train``.
        test: The same for ``split=test``.
        labels: Labels of the task ``tsv``, in the order of their integers.
        valid_fraction: Share of labelled rows held out where the source has no validation set of its own.
        leak_threshold: Similarity at which a labelled row counts as an evaluation sentence (``deftx.data.leakage``).
        protect: Evaluation sets whose sentences are kept out of unlabelled text.
        revisions: Hub revision by data set, e.g. ``{nusax: 7b2ff4f}``.
        cache_dir: Cache folder of ``datasets``; null is its own default.
        text: Unlabelled text by language code (files, folders or globs), in place of what the language's own file
            says: of a target, of the source, of a language that a base learns from.
    """

    root: str | None = knob(None)
    nusax: str | None = knob(None)
    smsa: str | None = knob(None)
    americasnli: str | None = knob(None)
    multinli: str | None = knob(None)
    xnli: str | None = knob(None)
    wikipedia: str | None = knob(None)
    train: str | None = knob(None)
    valid: str | None = knob(None)
    test: str | None = knob(None)
    labels: list[str] = knob([])
    valid_fraction: float = knob(0.05, between(0, 1))
    leak_threshold: float = knob(DEFAULT_LEAK_THRESHOLD, _THRESHOLD)
    protect: list[str] = knob(list(PROTECTED), one_of(*PROTECTED))
    revisions: dict[str, str] = knob({})
    cache_dir: str | None = knob(None)
    text: dict[str, list[str]] = knob({})

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change which labelled rows are loaded from equal files (for cache keys)."""
        return {"valid_fraction": self.valid_fraction, "leak_threshold": self.leak_threshold}


class GeneratedFamily(NamedTuple):
    """The generated family as files that a stage makes: they can be named before they are there.

    Attributes:
        key: Key of that stage. It stands for the content of all the files.
        root: Folder the files will be in.
        names: Their names below it.
    """

    key: str
    root: Path
    names: tuple[str, ...]

    def name_of(self, path: Path) -> str | None:
        """Return the name of a file below the root; ``None`` for a file elsewhere."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None


@dataclass
class FamilyData(DataSettings):
    """Data settings of a study on the generated family, whose folder is the ``root``.

    Labelled files and text that the user names are read from where they are, relative to the working directory.

    Attributes:
        family: The family.
    """

    family: GeneratedFamily | None = None


@dataclass
class LanguageSettings:
    """One language: its code in each source and where its unlabelled text lies. Null means "not in that source".

    Attributes:
        code: Name of the language in this project.
        name: English name.
        family: Language family, for tables.
        script: Script, ISO 15924.
        nusax: Folder in NusaX (``acehnese``).
        nusax_hub: Configuration of the NusaX hub data set; null is ``code``.
        americasnli: Code in AmericasNLI (``quy``).
        xnli: Code in XNLI and MultiNLI (``en``).
        wikipedia: Code of the Wikipedia (``qu``), as in ``20231101.qu``.
        text: Your own unlabelled text: files, folders (every ``*.txt`` below) or globs, absolute or relative to
            ``data.root`` (to the working directory without one). Each must exist; given, nothing else is read.
        local_text: The same for text that known collections have below ``data.root``; what is not there is skipped.
    """

    code: str = knob("")
    name: str = knob("")
    family: str | None = knob(None)
    script: str | None = knob(None)
    nusax: str | None = knob(None)
    nusax_hub: str | None = knob(None)
    americasnli: str | None = knob(None)
    xnli: str | None = knob(None)
    wikipedia: str | None = knob(None)
    text: list[str] = knob([])
    local_text: list[str] = knob([])


@dataclass
class CorpusSettings:
    """How unlabelled text becomes training and validation lines.

    Attributes:
        valid_fraction: Share of the lines held out for model selection (the reference holds out 5 %), in (0, 1).
        max_lines: Keep a seeded sample of this many lines; null keeps all.
        min_words: Drop lines with fewer words; 1 keeps every line that is not blank.
        deduplicate: Keep the first of equal lines.
        leak_threshold: Similarity at which a line counts as an evaluation sentence; above 1 turns the filter off.
    """

    valid_fraction: float = knob(0.05, between(0, 1))
    max_lines: int | None = knob(None, at_least(2, ", or null for all lines"))
    min_words: int = knob(1, at_least(1))
    deduplicate: bool = knob(True)
    leak_threshold: float = knob(DEFAULT_LEAK_THRESHOLD, _THRESHOLD)


_MEMBER = matching("[a-z]{3}", "must be three lower-case letters (qaa to qtz are for local use)")
_BALANCED = Range(
    "must be a positive multiple of 3, so that labels are balanced", lambda value: value > 0 and value % 3 == 0
)
_SHARE = between(0, 1, "[]")


@dataclass
class SyntheticSettings:
    """What the family looks like; every share is in [0, 1] and every count is per member.

    Attributes:
        seed: Everything is drawn from it; another seed is another family.
        source: Code of the member with labelled training text; it is high-resource.
        high_resource: The other members the encoder is pretrained on.
        targets: Low-resource members, not seen in pretraining.
        lines_high: Unlabelled lines of each high-resource member.
        lines_low: Unlabelled lines of each target.
        clauses: Clauses of an unlabelled line.
        train: Labelled training sentences of the source.
        valid: Labelled validation sentences of the source.
        test: Labelled test sentences of each member; the labels are balanced, so a multiple of three.
        topics: Topics; a line stays with one.
        nouns_per_topic: Nouns of each topic.
        verbs: Verbs of each polarity.
        synonyms: Words for a quality of each polarity (the neutral ones only describe).
        interjections: International interjections of each polarity, the same in all members.
        cognates: Share of nouns and verbs inherited from the ancestor through regular sound changes.
        evaluative_cognates: The same share for evaluative words.
        false_friends: Share of a target's own words that look like a high-resource member's word for another concept.
        purity: How often an evaluative slot of a sentence takes a word of the sentence's own polarity.
        interjection_rate: How often a clause of unlabelled text ends in an interjection of its line's polarity.
    """

    seed: int = knob(0)
    source: str = knob("qaa", _MEMBER)
    high_resource: list[str] = knob(["qab", "qac"], _MEMBER)
    targets: list[str] = knob(["qba", "qbb", "qbc"], _MEMBER)
    lines_high: int = knob(8000, at_least(1))
    lines_low: int = knob(6000, at_least(1))
    clauses: int = knob(3, at_least(1))
    train: int = knob(1500, _BALANCED)
    valid: int = knob(300, _BALANCED)
    test: int = knob(450, _BALANCED)
    topics: int = knob(3, at_least(1))
    nouns_per_topic: int = knob(4, at_least(2))
    verbs: int = knob(3, at_least(1))
    synonyms: int = knob(5, at_least(2))
    interjections: int = knob(2, at_least(1))
    cognates: float = knob(0.25, _SHARE)
    evaluative_cognates: float = knob(0.2, _SHARE)
    false_friends: float = knob(1.0, _SHARE)
    purity: float = knob(0.95, _SHARE)
    interjection_rate: float = knob(0.8, _SHARE)

    @property
    def members(self) -> list[str]:
        """All codes: the source, the other high-resource members, the targets."""
        return [self.source, *self.high_resource, *self.targets]

    def conditions(self) -> list[str]:
        """What values must have in common."""
        repeated = sorted({code for code in self.members if self.members.count(code) > 1})
        messages = [f"members={self.members}: codes must differ; repeated: {', '.join(repeated)}"] if repeated else []
        if not self.high_resource:
            messages.append("high_resource is empty; the encoder needs at least one member beside the source")
        if not self.targets:
            messages.append("targets is empty; give at least one low-resource member")
        return messages
