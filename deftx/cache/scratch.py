"""Scratch folders: which process may write where while it computes a stage.

The scratch of a key is ``scratch/<kind>-<digits>/`` at every attempt, so that an attempt finds the checkpoints of the
last one. A process claims it by creating ``<kind>-<digits>.claim-<n>`` exclusively; the highest n is the claim in
force. The claim passes on when its process releases it or is proven dead. A holder on another host whose lease has
expired may still live, so the folder is renamed for the new holder and the two never write to one place. A process
without a claim uses a private folder. None of this needs a lock: two processes on one key may waste time, but share
no files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deftx import atomic
from deftx.cache.keys import Stage
from deftx.processes import Process, mark, marked

__all__ = [
    "SCRATCH",
    "Claim",
    "Scratch",
    "claim_in_force",
    "claim_scratch",
]

SCRATCH = "scratch"


@dataclass(frozen=True)
class Claim:
    """One claim on a key's scratch.

    Attributes:
        file: The claim's file.
        number: Its generation.
        process: Its owner; None when the file cannot be read (it is being written, or was cut short).
        since: When it was made, ISO 8601 in UTC.
        folder: Name of the claimed folder.
        token: Tells it from every other claim.
        released: Whether its process released it.
    """

    file: Path
    number: int
    process: Process | None
    since: str
    folder: str
    token: str
    released: bool = False

    @property
    def free(self) -> bool:
        """Whether nobody writes to its folder any more: it was released, or its process is dead."""
        return self.released or (self.process is not None and not self.process.lives())

    def text(self) -> bytes:
        """Return the content of its file."""
        values = {"process": self.process, "since": self.since, "folder": self.folder, "token": self.token}
        return json.dumps({**values, "released": self.released}).encode()


def _claims(root: Path, name: str) -> list[Claim]:
    claims = []
    for file in (root / SCRATCH).glob(f"{name}.claim-*"):
        number = file.name.rpartition("-")[2]
        if number.isdecimal():
            claims.append(_read(file, int(number), name))
    return sorted(claims, key=lambda claim: claim.number)


def _read(file: Path, number: int, name: str) -> Claim:
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
        host, pid, start = values["process"]
        folder = str(values["folder"])
        process = Process(str(host), int(pid), int(start))
        if folder == name or (folder.startswith(f"{name}.") and "/" not in folder):
            return Claim(file, number, process, str(values["since"]), folder, values["token"], values["released"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return Claim(file, number, None, "", name, "")


def claim_in_force(root: Path, name: str) -> Claim | None:
    """Return the latest claim on a key's scratch, if there is one."""
    claims = _claims(root, name)
    return claims[-1] if claims else None


@dataclass(frozen=True)
class Scratch:
    """A scratch folder this process may write to."""

    path: Path
    root: Path
    name: str
    claim: Claim | None

    @property
    def lost(self) -> bool:
        """Whether another process took the claim over because it thought this one dead."""
        now = claim_in_force(self.root, self.name) if self.claim else None
        return self.claim is not None and (now is None or now.token != self.claim.token)

    def release(self) -> None:
        """Release the claim after a failure; the folder stays for the next attempt."""
        if self.claim is None:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self.lost:
            with contextlib.suppress(OSError):
                atomic.write(self.claim.file, replace(self.claim, released=True).text())

    def discard(self) -> None:
        """Remove the folder and its claims after publishing, and those of earlier attempts."""
        shutil.rmtree(self.path, ignore_errors=True)
        for claim in _claims(self.root, self.name):
            if claim.free or (self.claim is not None and claim.number <= self.claim.number):
                with contextlib.suppress(OSError):
                    claim.file.unlink()


def claim_scratch(root: Path, stage: Stage, *, locked: bool, leased: bool) -> Scratch:
    """Claim the stage's scratch, or make a private folder.

    Args:
        root: The cache's folder.
        stage: The stage to compute.
        locked: This process holds a lock of the stage, so a claim's owner on this host has lost its lock.
        leased: This process holds the lease, so a claim's owner on another host has not renewed it.

    Raises:
        OSError: The cache cannot be written.
    """
    name = f"{stage.kind}-{stage.key[:16]}"
    (root / SCRATCH).mkdir(parents=True, exist_ok=True)
    while True:
        last = claim_in_force(root, name)
        number, folder = (last.number + 1, last.folder) if last else (1, name)
        fenced = False
        if last is not None and not last.free:
            on_this_machine = last.process is not None and last.process.here
            if not (locked if on_this_machine else leased):
                break
            # Its owner may still live and write by name, so rename the folder.
            folder, fenced = f"{name}.{mark()}", True
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file = root / SCRATCH / f"{name}.claim-{number}"
        claim = Claim(file, number, Process.this(), since, folder, os.urandom(8).hex())
        try:
            with file.open("xb") as stream:
                stream.write(claim.text())
        except FileExistsError:
            continue  # another process was faster: read its claim
        now = claim_in_force(root, name)
        if now is not None and now.number > number:
            file.unlink(missing_ok=True)  # the claim that looked like the last had been passed on
            continue
        path = root / SCRATCH / folder
        if fenced and last is not None:
            with contextlib.suppress(FileNotFoundError):
                (root / SCRATCH / last.folder).rename(path)
        path.mkdir(exist_ok=True)
        for earlier in _claims(root, name):
            if earlier.number < number:
                earlier.file.unlink(missing_ok=True)
        return Scratch(path, root, name, claim)
    path = root / SCRATCH / f"{name}.{mark()}"
    path.mkdir()
    return Scratch(path, root, name, None)


def scratch_owner(root: Path, folder: str) -> Process | None:
    """Return the process that may write to a scratch folder: the holder of its claim, else the one in its name."""
    claim = claim_in_force(root, folder.partition(".")[0])
    if claim is not None and claim.folder == folder and claim.process is not None:
        return None if claim.released else claim.process
    name = marked(folder)
    return name[1] if name else None


def forget_claims(root: Path, folder: str) -> None:
    """Remove the claims on a deleted scratch folder, unless a process here holds them."""
    for claim in _claims(root, folder.partition(".")[0]):
        if claim.folder == folder and not (claim.process is not None and claim.process.here and not claim.free):
            claim.file.unlink(missing_ok=True)
