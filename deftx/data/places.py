"""Where rows and text come from, as values that can be identified before anything is read.

What the user gives is identified by content (the digest of the files' bytes, wherever they lie), what a hub gives by
the resolved commit, and the files of the generated family, which a stage makes, by that stage's key.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deftx.data.hub import HubRef
from deftx.data.settings import GeneratedFamily
from deftx.errors import DeftxError

Digest = Callable[[Sequence[Path]], str]
"""One SHA-256 for the bytes of files in their order, whatever their paths: a stage cache's remembers unchanged ones."""

Texts = tuple[tuple[str, ...], ...]
"""For each text of a row, the names its column may have, the usual one first."""


def label_key(word: str) -> str:
    """Return what of a label's spelling counts: not its case, its Unicode form, or what nobody sees of it."""
    seen = "".join(letter for letter in unicodedata.normalize("NFC", word) if unicodedata.category(letter) != "Cf")
    return unicodedata.normalize("NFC", seen.strip().casefold())


SINGLE: Texts = (("text",),)
PAIR: Texts = (("premise", "sentence1"), ("hypothesis", "hypo", "sentence2"))


class MissingSplitError(DeftxError):
    """A data set is there and the language belongs to it, but not this split."""


def digest_files(paths: Sequence[Path]) -> str:
    """Hash every file; equal to ``StageCache.fingerprint``, which remembers what it hashed.

    Raises:
        DeftxError: A file cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DeftxError(f"{path} cannot be read: {error.strerror}") from error
        total.update(json.dumps(["", content]).encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Origin:
    """What is read: files, a split of a hub data set, or a file at a fixed address.

    Attributes:
        files: Files, in reading order.
        hub: The hub data set, or a local copy of it.
        url: Address of a file that never changes: it names a commit.
        cache_dir: Cache folder of ``datasets`` for that file, ``None`` for its default.
        family: The generated family that some of the files belong to; they may still have to be made.
    """

    files: tuple[Path, ...] = ()
    hub: HubRef | None = None
    url: str = ""
    cache_dir: str | None = None
    family: GeneratedFamily | None = None

    @property
    def local_files(self) -> tuple[Path, ...]:
        """All local files that decide what is read: the files, or those of a local copy of the hub data set."""
        return self.hub.files if self.hub is not None else self.files

    @property
    def generated(self) -> bool:
        """Whether a stage makes any of the files: its result is needed before they are read."""
        return any(self._made(path) for path in self.files)

    def identity(self, digest: Digest = digest_files) -> dict[str, Any]:
        """Return what decides the content, as plain JSON; no path is in it.

        Raises:
            DeftxError: A file cannot be read; or the commit of a hub data set cannot be resolved.
        """
        if self.url:
            return {"url": self.url}
        if self.hub is not None:
            config = {"config": self.hub.config}
            if self.hub.folder is None:
                return {"hub": self.hub.dataset, "revision": self.hub.resolved().revision, **config}
            # Where a card does not say it, the names decide which files make a split.
            names = [path.relative_to(self.hub.folder).as_posix() for path in self.local_files]
            return {"files": names, "digest": digest(self.local_files), **config}
        files = [path for path in self.files if self._made(path) is None]
        content = {"files": [self._made(path) or self._form(path) for path in self.files]}
        return content | ({"digest": digest(files)} if files else {})

    def fingerprint(self, digest: Digest = digest_files) -> str:
        """SHA-256 of :meth:`identity`, for keys."""
        text = json.dumps(self.identity(digest), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def description(self, digest: Digest = digest_files) -> dict[str, Any]:
        """Return where it is and what it holds, for people and ``result.json``: path, hub id or address; ``digest``.

        ``digest`` is the :meth:`fingerprint`: it is equal where the same content is read in the same way.
        """
        folder = self.hub.folder if self.hub is not None else None
        if self.url or (self.hub is not None and folder is None):
            where = Origin.identity(self)
        elif self.hub is not None and folder is not None:
            where = {"path": str(folder.absolute()), "config": self.hub.config}
        else:
            where = {"path": ", ".join(self._made(path) or str(path.absolute()) for path in self.files)}
        return {**where, "digest": self.fingerprint(digest)}

    def _made(self, path: Path) -> str | None:
        """Return which file of which family; ``None`` for a file that is given."""
        if self.family is None or (name := self.family.name_of(path)) is None:
            return None
        return f"family {self.family.key}: {name}"

    def _form(self, path: Path) -> str:
        """Return what of a file's name decides how it is read."""
        return ""


@dataclass(frozen=True)
class Form:
    """How the rows of a data set are written.

    Attributes:
        labels: Label words by integer; empty where ``data.labels`` gives them.
        texts: Columns of a row's texts, by the names they may have. Of several forms, the first whose first column
            a file names.
        header: Column names of files without a header line.
        spellings: Other spellings of label words. A spelling of nothing is a row without label: it is left out.
        hub_labels: What the integers of the hub form mean where it does not name them; empty means ``labels``.
        combined: How names of files begin that hold all languages, told apart by a column ``language``.
    """

    labels: tuple[str, ...]
    texts: tuple[Texts, ...] = (SINGLE,)
    header: tuple[str, ...] | None = None
    spellings: tuple[tuple[str, str], ...] = ()
    hub_labels: tuple[str, ...] = ()
    combined: str = ""

    def is_combined(self, path: Path) -> bool:
        """Return whether a file holds all languages of the data set, each row saying its own."""
        return bool(self.combined) and path.name.startswith(self.combined)


@dataclass(frozen=True, kw_only=True)
class Place(Origin):
    """Where the rows of one data set, language and split are.

    Attributes:
        dataset: Name of the data set.
        form: How its rows are written.
        split: ``train``, ``dev`` or ``test``; for a hub data set, its name there.
        language: What the data set calls the language; for the hub, the configuration says it.
    """

    dataset: str
    form: Form
    split: str
    language: str = ""

    def identity(self, digest: Digest = digest_files) -> dict[str, Any]:
        """Return what decides the rows, as plain JSON: data set, split, language and content; no path is in it.

        What the labels' integers mean is not in it either: who reads labels knows the task, and others read sentences.

        Raises:
            DeftxError: As :meth:`Origin.identity`.
        """
        about = {"dataset": self.dataset, "split": self.split, "language": self.language}
        return {**about, **super().identity(digest)}

    def _form(self, path: Path) -> str:
        # Ids of several files are made of their names; of a combined file the name says that it is one.
        whole = len(self.files) > 1 or self.form.is_combined(path)
        return path.name if whole else path.suffix.lower()


def combined_fingerprint(origins: Iterable[Origin], digest: Digest = digest_files) -> str:
    """Return one SHA-256 for what several origins hold, whatever their order."""
    text = json.dumps(sorted(origin.fingerprint(digest) for origin in origins))
    return hashlib.sha256(text.encode()).hexdigest()
