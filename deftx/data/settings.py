"""What a user may choose about data: where data sets lie, what a language is called in each, how text is cleaned.

Standard library only. ``conf/language/<code>.yaml`` fills one :class:`LanguageSettings`; adding a language is adding
one file. Languages are named by their three-letter ISO 639 code (``ace``, ``quy``, ``nah``, ``deu``); the only
exception is Guarani, which AmericasNLI calls ``gn``. Other codes people type are in :data:`LANGUAGE_ALIASES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULT_LEAK_THRESHOLD = 0.7
PROTECTED = ("nusax", "americasnli", "xnli")

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
    """

    root: str | None = None
    nusax: str | None = None
    smsa: str | None = None
    americasnli: str | None = None
    multinli: str | None = None
    xnli: str | None = None
    wikipedia: str | None = None
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    labels: list[str] = field(default_factory=list)
    valid_fraction: float = 0.05
    leak_threshold: float = DEFAULT_LEAK_THRESHOLD
    protect: list[str] = field(default_factory=lambda: list(PROTECTED))
    revisions: dict[str, str] = field(default_factory=dict)
    cache_dir: str | None = None

    def problems(self) -> list[str]:
        """Return one sentence for each value out of its range; empty when all is well."""
        found = []
        if not 0 < self.valid_fraction < 1:
            found.append(f"valid_fraction={self.valid_fraction}: must lie between 0 and 1")
        if not self.leak_threshold > 0:
            found.append(f"leak_threshold={self.leak_threshold}: must lie in (0, 1], or above 1 to turn the filter off")
        unknown = [name for name in self.protect if name not in PROTECTED]
        if unknown:
            found.append(f"protect: {', '.join(unknown)}: not one of {', '.join(PROTECTED)}")
        return found

    def result_settings(self) -> dict[str, Any]:
        """The settings that change which labelled rows are loaded although the files stay the same (for cache keys)."""
        return {
            "valid_fraction": self.valid_fraction,
            "leak_threshold": self.leak_threshold,
        }


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

    code: str = ""
    name: str = ""
    family: str | None = None
    script: str | None = None
    nusax: str | None = None
    nusax_hub: str | None = None
    americasnli: str | None = None
    xnli: str | None = None
    wikipedia: str | None = None
    text: list[str] = field(default_factory=list)
    local_text: list[str] = field(default_factory=list)


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

    valid_fraction: float = 0.05
    max_lines: int | None = None
    min_words: int = 1
    deduplicate: bool = True
    leak_threshold: float = DEFAULT_LEAK_THRESHOLD

    def problems(self) -> list[str]:
        """Return one sentence for each value out of its range; empty when all is well."""
        found = []
        if not 0 < self.valid_fraction < 1:
            found.append(f"valid_fraction={self.valid_fraction}: must lie between 0 and 1")
        if self.max_lines is not None and self.max_lines < 2:
            found.append(f"max_lines={self.max_lines}: must be at least 2, or null for all lines")
        if self.min_words < 1:
            found.append(f"min_words={self.min_words}: must be at least 1")
        if not self.leak_threshold > 0:
            found.append(f"leak_threshold={self.leak_threshold}: must lie in (0, 1], or above 1 to turn the filter off")
        return found
