"""What the cache hands out: an entry, an event, and the place a stage writes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deftx.errors import DeftxError

__all__ = ["FORMAT_VERSION", "MANIFEST", "Entry", "Event", "Workspace"]

FORMAT_VERSION = 1
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
        notes: plain values the stage wants in the manifest, such as counts.
    """

    out: Path
    scratch: Path
    notes: dict[str, Any] = field(default_factory=dict)


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
