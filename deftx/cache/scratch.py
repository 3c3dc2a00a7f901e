"""Scratch folders and what dead processes left: who may write where while a stage is computed.

The scratch of a key is ``scratch/<kind>-<digits>/``, the same at every attempt, so that checkpoints are found again.
Whoever computes claims it in ``<kind>-<digits>.claim-<n>``, made exclusively; the highest n is the claim in force. It
passes on when its process let go or is proven dead. A holder of another host that let its lease expire may still
live: its folder is renamed for the new holder, so the two never write to one place. Whoever gets no claim works in a
folder of its own. None of this needs a lock: two processes on one key may disturb each other's time, not their files.
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
        file: where it is written.
        number: its generation.
        process: who made it; None when the file cannot be read (it is just being written, or was cut).
        since: when, ISO 8601 in UTC.
        folder: name of the folder it is about.
        token: tells it from any other.
        released: whether its process ended orderly.
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
        """Whether nobody writes to its folder any more: let go, or proven dead."""
        return self.released or (self.process is not None and not self.process.lives())

    def text(self) -> bytes:
        """What stands in the file."""
        values = {"process": self.process, "since": self.since, "folder": self.folder, "token": self.token}
        return json.dumps({**values, "released": self.released}).encode()


def _claims(root: Path, name: str) -> list[Claim]:
    found = []
    for file in (root / SCRATCH).glob(f"{name}.claim-*"):
        number = file.name.rpartition("-")[2]
        if number.isdecimal():
            found.append(_read(file, int(number), name))
    return sorted(found, key=lambda claim: claim.number)


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
    """The claim on a key's scratch that was made last, if there is one."""
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
        """Whether another process took the claim over: this one was thought dead."""
        now = claim_in_force(self.root, self.name) if self.claim else None
        return self.claim is not None and (now is None or now.token != self.claim.token)

    def release(self) -> None:
        """Let go after a failure; what lies there stays for the next attempt."""
        if self.claim is None:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self.lost:
            with contextlib.suppress(OSError):
                atomic.write(self.claim.file, replace(self.claim, released=True).text())

    def discard(self) -> None:
        """Remove it after publishing, and whatever earlier attempts left."""
        shutil.rmtree(self.path, ignore_errors=True)
        for claim in _claims(self.root, self.name):
            if claim.free or (self.claim is not None and claim.number <= self.claim.number):
                with contextlib.suppress(OSError):
                    claim.file.unlink()


def claim_scratch(root: Path, stage: Stage, *, locked: bool, leased: bool) -> Scratch:
    """Claim the stage's scratch, or make one of our own.

    Args:
        root: the cache's folder.
        stage: what is computed.
        locked: a lock of the stage is held: another process of this host that claims it has lost its lock.
        leased: the lease is held: a process of another host that claims it has not renewed its own.

    Raises:
        OSError: nothing can be written there.
    """
    name = f"{stage.kind}-{stage.key[:16]}"
    (root / SCRATCH).mkdir(parents=True, exist_ok=True)
    while True:
        last = claim_in_force(root, name)
        number, folder = (last.number + 1, last.folder) if last else (1, name)
        fenced = False
        if last is not None and not last.free:
            here = last.process is not None and last.process.here
            if not (locked if here else leased):
                break
            # It may still live, and writes by name: its folder gets another name.
            folder, fenced = f"{name}.{mark()}", True
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file = root / SCRATCH / f"{name}.claim-{number}"
        claim = Claim(file, number, Process.this(), since, folder, os.urandom(8).hex())
        try:
            with file.open("xb") as stream:
                stream.write(claim.text())
        except FileExistsError:
            continue  # another process was faster: see what it says
        now = claim_in_force(root, name)
        if now is not None and now.number > number:
            file.unlink(missing_ok=True)  # what we took for the last claim had been passed on meanwhile
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
    """Remove the claims on a scratch folder that has gone, where nobody holds them."""
    for claim in _claims(root, folder.partition(".")[0]):
        if claim.folder == folder and not (claim.process is not None and claim.process.here and not claim.free):
            claim.file.unlink(missing_ok=True)
