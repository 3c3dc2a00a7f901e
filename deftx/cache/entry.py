"""What the cache hands out: an entry, an event, and the place a stage writes to."""

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

    ``outcome`` is ``cached`` or ``computed``; ``seconds`` is its own wall time, that of stages it asked for left out;
    ``waited`` is the part of it spent waiting for another process that computed the same.
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
        out: a new empty folder; what lies in it when the computation returns is published, all or nothing.
        scratch: a folder of this key alone, for checkpoints; it survives failures and interruptions (a later
            attempt finds it as it was) and is removed after publishing. Its path is the same at every attempt,
            but for one that takes over from another host, and for one of two that compute at once without a lock.
        inputs: the results of other stages that the computation reads, by their names in the stage's ``inputs``. The
            manifest records their digests: a result is not used any more once one of them was made again with other
            bits.
        notes: plain values the stage wants in the manifest, such as counts.
    """

    out: Path
    scratch: Path
    inputs: dict[str, Entry] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Ancestor(NamedTuple):
    """A result that another one was made from, directly or through others.

    ``digest`` is that of its product when it was read; ``provenance`` says what it was computed with.
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
        """What the result is, bit for bit (:func:`product_digest`)."""
        known = self.manifest.get("digest")  # manifests of format 1 do not say it
        return str(known) if known else product_digest(self.manifest["files"], ())

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Versions, threads and machine it was computed with."""
        return dict(self.manifest.get("provenance") or {})

    @property
    def ancestors(self) -> list[Ancestor]:
        """Every result it was made from, directly or through others."""
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
        """What the stage noted while it computed."""
        notes: Mapping[str, Any] = self.manifest["notes"]
        return notes

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(record["size"] for record in self.manifest["files"].values())

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            DeftxError: there is no such file; the message lists those there are.
        """
        if name not in self.manifest["files"]:
            raise DeftxError(f"{self.path} has no file {name!r}; it has {', '.join(self.manifest['files'])}")
        return self.path / name


def product_digest(files: Mapping[str, Mapping[str, Any]], product: Sequence[str]) -> str:
    """One sha256 for the files that are a stage's result.

    Args:
        files: name -> record with ``sha256``, as in a manifest.
        product: as :class:`~deftx.cache.keys.Stage` has it.
    """
    folders = tuple(name for name in product if name.endswith("/"))
    chosen = {
        name: record["sha256"]
        for name, record in files.items()
        if not product or name in product or (folders and name.startswith(folders))
    }
    return hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()
