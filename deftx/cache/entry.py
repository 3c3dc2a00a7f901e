"""What the cache returns: an entry, an event, and the workspace of a stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deftx.errors import DeftxError

__all__ = ["FORMAT_VERSION", "MANIFEST", "Ancestor", "Entry", "Event", "Workspace", "product_digest"]

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


class Event(NamedTuple):
    """One request to the cache.

    ``outcome`` is ``cached`` or ``computed``. ``seconds`` is its own wall time without the stages it requested, and
    ``waited`` the part of it spent waiting for another process that computed the same result.
    """

    kind: str
    label: str
    key: str
    outcome: str
    seconds: float
    waited: float = 0.0


@dataclass(frozen=True)
class Workspace:
    """Where a stage writes while it computes.

    Attributes:
        out: A new empty folder; its content is published when the computation returns, all or nothing.
        scratch: A folder for this key's checkpoints. It survives failures and interruptions, so that a later attempt
            finds it unchanged, and is removed after publishing. Its path changes only if an attempt takes over from
            another host, or if two attempts run at once without a lock.
        inputs: The results of other stages that the computation reads, by their names in the stage's ``inputs``. The
            manifest records their digests; a result becomes unusable once one of them is made again with other bits.
        notes: Plain values for the manifest, such as counts.
    """

    out: Path
    scratch: Path
    inputs: dict[str, Entry] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Ancestor(NamedTuple):
    """A result that another one was made from, directly or indirectly.

    ``digest`` is the digest of its product when it was read; ``provenance`` says what computed it.
    """

    kind: str
    key: str
    digest: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A published result: its folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The stage's full key."""
        return str(self.manifest["key"])

    @property
    def kind(self) -> str:
        """The stage's kind."""
        return str(self.manifest["kind"])

    @property
    def label(self) -> str:
        """The label of the stage that was computed."""
        return str(self.manifest["label"])

    @property
    def digest(self) -> str:
        """Digest of the result's bits (:func:`product_digest`)."""
        recorded = self.manifest.get("digest")  # manifests of format 1 do not say it
        return str(recorded) if recorded else product_digest(self.manifest["files"], ())

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Versions, threads and machine it was computed with."""
        return dict(self.manifest.get("provenance") or {})

    @property
    def ancestors(self) -> list[Ancestor]:
        """Every result it was made from, directly or indirectly."""
        provenances = self.manifest.get("provenances", ())
        return [
            Ancestor(item["kind"], item["key"], item["digest"], provenances[item["provenance"]])
            for item in self.manifest.get("ancestors", ())
        ]

    @property
    def lineage(self) -> list[Ancestor]:
        """The result itself, then its ancestors."""
        return [Ancestor(self.kind, self.key, self.digest, self.provenance), *self.ancestors]

    @property
    def notes(self) -> Mapping[str, Any]:
        """Values that the stage noted while it computed."""
        notes: Mapping[str, Any] = self.manifest["notes"]
        return notes

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(record["size"] for record in self.manifest["files"].values())

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            DeftxError: There is no such file; the message lists the available ones.
        """
        if name not in self.manifest["files"]:
            raise DeftxError(f"{self.path} has no file {name!r}; it has {', '.join(self.manifest['files'])}")
        return self.path / name


def product_digest(files: Mapping[str, Mapping[str, Any]], product: Sequence[str]) -> str:
    """Return one sha256 for the files that are a stage's result.

    Args:
        files: Name -> record with ``sha256``, as in a manifest.
        product: As in :class:`~deftx.cache.keys.Stage`.
    """
    folders = tuple(name for name in product if name.endswith("/"))
    chosen = {
        name: record["sha256"]
        for name, record in files.items()
        if not product or name in product or (folders and name.startswith(folders))
    }
    return hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()
