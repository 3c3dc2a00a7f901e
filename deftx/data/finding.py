"""Where the rows of a data set are: files of one's own; or a public set's clone, hub form, or local copy of that.

Finding looks at names only: nothing is read or downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deftx.data.hub import HUB_ID, HubRef, is_hub_copy
from deftx.data.places import Form, MissingSplitError, Place
from deftx.data.settings import DataSettings, FamilyData, LanguageSettings
from deftx.errors import DeftxError


class NotAtHandError(DeftxError):
    """A public data set is not below ``data.root``, or the language is not in it."""


def file_split(split: str) -> str:
    """Return what NusaX, SMSA and files of one's own call a split."""
    return "valid" if split == "dev" else split


@dataclass(frozen=True)
class OwnFiles:
    """Files that the settings name, or ``<root>/<folder>/<code>/{train,valid,test}.tsv``.

    Attributes:
        name: Name of the data set.
        folder: The folder below ``data.root``; ``None`` for files that have to be named.
        named: Whether ``data.train``, ``data.valid`` and ``data.test`` name them; ``{language}`` becomes the code.
        hint: What to do about a language that has no rows.
    """

    name: str
    folder: str | None = None
    named: bool = True
    hint: str = ""

    def has(self, language: LanguageSettings) -> bool:
        """Return whether the language can have rows: files go by its code, so any can."""
        return True

    def place(self, form: Form, language: LanguageSettings, data: DataSettings, split: str) -> Place:
        """See :func:`deftx.data.labelled.place_of`."""
        name = file_split(split)
        template = getattr(data, name) if self.named else None
        family = data.family if isinstance(data, FamilyData) else None
        root = Path(data.root).expanduser() if data.root is not None else Path.cwd()
        if template is not None:
            start = root if family is None else Path.cwd()
            path = start / Path(template.replace("{language}", language.code)).expanduser()
        elif data.root is None or self.folder is None:
            raise MissingSplitError(
                f"task {self.name} has no {split} file: set data.{name}=FILE ({{language}} is the code)"
            )
        else:
            path = root / self.folder / language.code / f"{name}.tsv"
        generated = family.name_of(path) if family is not None else None
        if not (path.is_file() if family is None or generated is None else generated in family.names):
            raise MissingSplitError(f"{self.name} has no {split} file for {language.code!r}: {path}")
        return Place(dataset=self.name, form=form, split=split, language=language.code, files=(path,), family=family)


@dataclass(frozen=True)
class PublicSet:
    """A clone of a public data set's repository, its form on the hub, or a local copy of that.

    ``data.<name>`` is a folder or a hub id; null means ``<data.root>/<folder>``, or without a root the hub.

    Attributes:
        name: Name of the data set.
        folder: Its folder below ``data.root``.
        upstream: Address of its repository.
        code: Field of :class:`~deftx.data.settings.LanguageSettings` with a language's name in the set.
        languages: Names of its languages, for messages.
        paths: From the language's name and the split to patterns of the files in a clone; the first that matches
            any gives them.
        only: The one name of ``code`` that has rows; empty where all have.
        hub: Its id on the hub; empty where it has none that can be read.
        config: From the language and its name to the configuration on the hub.
        url: Address of a split's file, for a set without hub form.
        translations: Of a set that the hub has in English only: name and hub id of the set whose training rows are
            its translations.
        hint: What to do about a language that has no rows.
    """

    name: str
    folder: str
    upstream: str
    code: str
    languages: tuple[str, ...]
    paths: Callable[[str, str], Sequence[str]]
    only: str = ""
    hub: str = ""
    config: Callable[[LanguageSettings, str], str | None] = lambda language, name: name
    url: str = ""
    translations: tuple[str, str] | None = None
    hint: str = ""

    def has(self, language: LanguageSettings) -> bool:
        """Return whether the language can have rows."""
        name = getattr(language, self.code)
        return bool(name) and self.only in ("", name)

    def place(self, form: Form, language: LanguageSettings, data: DataSettings, split: str) -> Place:
        """See :func:`deftx.data.labelled.place_of`."""
        if not self.has(language):
            raise NotAtHandError(
                f"language {language.code!r} is not in {self.name}; its languages are {', '.join(self.languages)}"
                f"{self.hint}"
            )
        name = getattr(language, self.code)
        place = Place(dataset=self.name, form=form, split=split)
        where = self._where(data)
        if where == "":
            return replace(place, url=self.url.format(split=file_split(split)), cache_dir=data.cache_dir)
        if isinstance(where, Path) and not is_hub_copy(where):
            return replace(place, files=self._files(where, name, split), language=name)
        source, config = self.name, self.config(language, name)
        if self.translations is not None and name != "en" and isinstance(where, str) and not getattr(data, self.name):
            (source, where), config = self.translations, name
        revision = data.revisions.get(source) if isinstance(where, str) else None
        ref = HubRef(str(where), config, revision, data.cache_dir)
        return replace(place, split="validation" if split == "dev" else split, hub=ref)

    def _where(self, data: DataSettings) -> Path | str:
        """Return folder or hub id; an empty id means the address."""
        source = getattr(data, self.name)
        if source is not None:
            folder = Path(source).expanduser()
            if folder.is_dir():
                return folder
            if HUB_ID.fullmatch(source):
                return str(source)
            raise DeftxError(f"data.{self.name}={source}: no such folder, and not a hub id (owner/name)")
        if data.root is None:
            return self.hub
        root = Path(data.root).expanduser()
        if not root.is_dir() and not isinstance(data, FamilyData):
            raise NotAtHandError(f"data.root={data.root}: no such folder")
        if not (root / self.folder).is_dir():
            hub = f" or data.{self.name}={self.hub}" if self.hub else ""
            raise NotAtHandError(
                f"no folder {root / self.folder}; clone {self.upstream} there, or set data.{self.name}=FOLDER{hub}"
            )
        return root / self.folder

    def _files(self, folder: Path, language: str, split: str) -> tuple[Path, ...]:
        patterns = self.paths(language, split)
        for pattern in patterns:
            if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return tuple(files)
        raise MissingSplitError(
            f"{self.name} has no {split} file for {language!r}: "
            f"{' or '.join(str(folder / pattern) for pattern in patterns)}; upstream is {self.upstream}"
        )
