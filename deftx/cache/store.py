"""The cache itself: published results, verified on every read."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deftx import atomic
from deftx.cache.entry import FORMAT_VERSION, MANIFEST, Ancestor, Entry, Event, Workspace, product_digest
from deftx.cache.files import file_sha256, fingerprint_files
from deftx.cache.keys import Stage, loose
from deftx.cache.locks import StageLock, lock_mode, lock_stage
from deftx.cache.processes import note_use
from deftx.cache.scratch import Scratch, claim_scratch
from deftx.cache.verify import DamageError, OutdatedError, Verifier, entry_folders, identity, load, set_aside
from deftx.errors import DeftxError
from deftx.units import size_text

__all__ = ["StageCache"]

log = logging.getLogger(__name__)

FINGERPRINTS = "fingerprints.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_LEAST_FREE = 1 << 20


class StageCache:
    """Results of stages under one root; any number of processes may share it.

    Args:
        root: The cache's folder; created at the first write.
        provenance: What manifests say about the origin of results (versions, threads, kind of machine). A function is
            called once, before the first computation, so that a run that computes nothing does not load what the
            answer takes.
        remember: Whether the cache keeps digests of files; a dry run, which writes nothing, passes False.
        lock: ``auto``, ``file``, ``soft`` or ``none`` (:mod:`deftx.cache.locks`); None reads ``DEFTX_LOCK``.

    Raises:
        DeftxError: There is no such lock.

    Attributes:
        events: One :class:`Event` for each request, in order.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        provenance: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        remember: bool = True,
        lock: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self._provenance = provenance or {"python": platform.python_version(), "machine": platform.machine()}
        self.events: list[Event] = []
        self._inner_seconds = 0.0  # spent by stages that the one being computed asked for
        self._verifier = Verifier()
        self._remember = remember
        self._digests: dict[str, list[Any]] = {}
        self._lock = lock_mode(lock)

    @property
    def hits(self) -> int:
        """Number of requests answered from the cache."""
        return sum(event.outcome == "cached" for event in self.events)

    @property
    def computed(self) -> int:
        """Number of requests that computed their stage."""
        return sum(event.outcome == "computed" for event in self.events)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What manifests say about the origin of results."""
        return dict(self._provenance() if callable(self._provenance) else self._provenance)

    def find(self, stage: Stage) -> Entry | None:
        """Return the stage's result after verifying manifest and checksums, or None.

        Moves a damaged entry to ``damaged/`` with a warning and returns None; treats an entry alike that was made from
        a result which now has other bits. Hashes the files of an entry once per process while their size and times
        stay the same.

        Raises:
            DeftxError: the entry cannot be read, cannot be set aside, or was written by a newer format.
        """
        folder = self.folder(stage)
        if not os.path.lexists(folder):
            return None
        note_use(self.root, folder)  # before it is read, so that nothing prunes it meanwhile
        while True:
            seen = identity(folder)
            try:
                entry = load(folder)
                if entry.key != stage.key:
                    raise DamageError(f"it belongs to the key {entry.key}")
                self._verifier.check(entry)
                if (outdated := self._outdated(entry)) is not None:
                    raise OutdatedError(outdated)
            except DamageError as damage:
                if seen is None:
                    return None  # pruned, or set aside by another process
                if seen == identity(folder):
                    set_aside(self.root, folder, damage, seen)
                    return None
                continue  # it was pruned, and perhaps published anew, while we read
            break
        with contextlib.suppress(OSError):  # when it was used last; a cache that only may be read does not tell
            os.utime(folder / MANIFEST)
        return entry

    def peek(self, stage: Stage) -> Entry | None:
        """Return the stage's result after reading only its manifest; None if there is no sound one."""
        try:
            entry = load(self.folder(stage))
        except DamageError:
            return None
        return entry if entry.key == stage.key and self._outdated(entry) is None else None

    def _outdated(self, entry: Entry) -> str | None:
        """Say why an intact entry must not be used: a result it was made from now has other bits."""
        for ancestor in entry.ancestors:
            try:
                now = load(self.root / ancestor.kind / ancestor.key[:16])
            except (DamageError, DeftxError):
                continue  # pruned: what was made from it is still what it was
            if now.key == ancestor.key and now.digest != ancestor.digest:
                return f"{now.kind} {now.label}, which it was made from, was made again with other bits"
        return None

    def agree(self, inputs: Mapping[str, Entry]) -> bool:
        """Tell whether results may be read together; if not, set the older of two contradicting ones aside.

        Two results contradict each other if they were made from different bits of a third one that has been pruned
        since.
        """
        seen: dict[str, tuple[str, Entry]] = {}
        for entry in inputs.values():
            for ancestor in entry.lineage:
                digest, other = seen.setdefault(ancestor.key, (ancestor.digest, entry))
                if digest != ancestor.digest:
                    older = min(entry, other, key=lambda item: str(item.manifest["created"]))
                    reason = (
                        f"it was made from another result of {ancestor.kind} [{ancestor.key[:8]}] than what it meets"
                    )
                    set_aside(self.root, older.path, OutdatedError(reason))
                    return False
        return True

    def verify(self, entry: Entry) -> str | None:
        """Return why an entry is damaged, or None when every file has its size and sha256; moves nothing."""
        try:
            self._verifier.check(entry)
        except DamageError as damage:
            return str(damage)
        return None

    def entries(self) -> Iterator[Entry]:
        """Yield the published results by kind and key without verifying checksums; log unreadable ones."""
        for folder in entry_folders(self.root):
            try:
                entry = load(folder)
            except (DamageError, DeftxError) as problem:
                if folder.is_dir():  # else it was pruned or set aside a moment ago
                    log.warning("%s is left out: %s", folder, problem)
            else:
                yield entry

    def fingerprint(self, paths: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None = None) -> str:
        """Return :func:`fingerprint_files` with this cache's memo, so that unchanged files are read once."""
        memo = self.root / FINGERPRINTS
        return fingerprint_files(paths, root, memo=memo, remember=self._remember, hashes_by_path=self._digests)

    def get_or_compute(
        self,
        stage: Stage,
        compute: Callable[[Workspace], None],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Return the stage's verified result, computing and publishing it when there is none.

        Args:
            stage: The stage.
            compute: Writes the result into ``workspace.out``; a pure function of the stage.
            provenance: Replaces the cache's own in the manifest.

        Raises:
            DeftxError: The cache cannot be written (space, permission) or read; nothing half-written stays.
            Exception: Whatever ``compute`` raises; ``workspace.scratch`` stays for the next attempt.
        """
        started = time.perf_counter()
        around, self._inner_seconds = self._inner_seconds, 0.0
        outcome, waited = "cached", 0.0
        try:
            entry = self.find(stage)
            while entry is None:
                with self._locked(stage) as lock:
                    waited += lock.waited
                    entry = lock.published or self.find(stage)
                    if entry is None:
                        outcome = "computed"
                        if provenance is None:
                            started = time.perf_counter()
                            provenance = self.provenance
                            self._inner_seconds += time.perf_counter() - started  # not this stage's work
                        entry = self._compute(stage, compute, provenance, lock)
        finally:
            total = time.perf_counter() - started
            seconds = total - self._inner_seconds
            self._inner_seconds = around + total
        (log.info if outcome == "computed" else log.debug)("%s: %s in %.1f s", stage, outcome, seconds)
        self.events.append(Event(stage.kind, stage.label, stage.key, outcome, seconds, waited))
        return entry

    # ---------------------------------------------------------------------------------------------- computing

    def folder(self, stage: Stage) -> Path:
        """Return the folder of the stage's result, whether it exists or not."""
        return self.root / stage.kind / stage.key[:16]

    def _locked(self, stage: Stage) -> contextlib.AbstractContextManager[StageLock[Entry]]:
        return lock_stage(
            self.root,
            f"{stage.kind}-{stage.key[:16]}",
            str(stage),
            self._lock,
            published=lambda: self.find(stage),
            explain=self._explain,
        )

    def _compute(
        self, stage: Stage, compute: Callable[[Workspace], None], provenance: Mapping[str, Any], lock: StageLock[Entry]
    ) -> Entry | None:
        """Compute and publish; return None if another process took over, whose result is then to be waited for."""
        folder = self.folder(stage)
        out = atomic.temporary_name(folder)
        scratch: Scratch | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            atomic.remove_leftovers(folder)
            note_use(self.root, folder)
            scratch = claim_scratch(self.root, stage, locked=lock.locked, leased=lock.leased)
            out.mkdir()
            workspace = Workspace(out, scratch.path)
            started, inner = time.perf_counter(), self._inner_seconds
            compute(workspace)
            seconds = time.perf_counter() - started - (self._inner_seconds - inner)  # of this stage alone
            entry = self._publish(stage, workspace, seconds, provenance)
        except BaseException as error:
            problem = self._explain(error)
            shutil.rmtree(out, ignore_errors=True)
            was_lost = scratch is not None and scratch.lost
            if scratch is not None:
                scratch.release()
            # Another process may have published meanwhile, and removed the scratch folder we worked in.
            published = self.find(stage) if isinstance(error, Exception) and folder.is_dir() else None
            if published is None:
                if was_lost and isinstance(error, Exception):
                    log.warning("%s: another process took it over, and this one failed (%s)", stage, error)
                    return None
                if problem is not None:
                    raise problem from error
                raise
            log.info("%s: another process published it first", stage)
            entry = published
        if scratch is not None:
            scratch.discard()
        return entry

    def _publish(self, stage: Stage, workspace: Workspace, seconds: float, provenance: Mapping[str, Any]) -> Entry:
        folder, out = self.folder(stage), workspace.out
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(out.rglob("*")):
            name = path.relative_to(out).as_posix()
            if path.is_symlink() or name == MANIFEST:
                raise ValueError(f"{stage} wrote {name}: links and {MANIFEST} cannot be published")
            if not path.is_dir():
                files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        if not files:
            raise ValueError(f"{stage} wrote no file")
        manifest = {
            "format_version": FORMAT_VERSION,
            "key": stage.key,
            "kind": stage.kind,
            "version": stage.version,
            "label": stage.label,
            "settings": stage.settings,
            "inputs": stage.inputs,
            "seed": stage.seed,
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(seconds, 3),
            "provenance": loose(provenance),
            "notes": loose(workspace.notes),
            "digest": product_digest(files, stage.product),
            **_ancestry(workspace.inputs),
            "files": files,
        }
        (out / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())
        for _ in range(3):
            try:
                atomic.publish(out, folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                existing = self.find(stage)
                if existing is None:
                    continue
                if existing.manifest["files"] != files:
                    log.warning("%s was computed twice with different bytes; the first result stays", stage)
                shutil.rmtree(out, ignore_errors=True)
                return existing
            return Entry(folder, manifest)
        raise DeftxError(f"cannot publish {stage}: {folder} is damaged again and again; check the disk")

    def _explain(self, error: BaseException) -> DeftxError | None:
        """Return the user's view of an error that the disk caused, None for any other."""
        if isinstance(error, DeftxError) or not isinstance(error, Exception):
            return None
        reason = None
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            name = error.filename
            ours = isinstance(name, str) and Path(name).absolute().is_relative_to(self.root)
            # An error of write(2) names no file; only a full disk is then surely the cache's.
            if ours or _contains(name, self.root) or (name is None and error.errno in _FULL):
                reason = os.strerror(error.errno)
        elif "No space left on device" in str(error) or _free_bytes(self.root) < _LEAST_FREE:
            reason = os.strerror(errno.ENOSPC)
        if reason is None:
            return None
        return DeftxError(
            f"cannot write to the stage cache {self.root}: {reason} ({size_text(_free_bytes(self.root))} free). "
            "Nothing half-written was kept. Make room or permission there, or choose another folder for the "
            "cache, and run the command again."
        )


def _ancestry(inputs: Mapping[str, Entry]) -> dict[str, Any]:
    """Return what a manifest says about its ancestors; equal provenances, which are the rule, appear once."""
    by_key: dict[str, Ancestor] = {}
    for entry in inputs.values():
        by_key |= {item.key: item for item in entry.lineage}
    provenances: list[Mapping[str, Any]] = []
    for item in by_key.values():
        if item.provenance not in provenances:
            provenances.append(item.provenance)
    rows = [item._asdict() | {"provenance": provenances.index(item.provenance)} for item in by_key.values()]
    return {"ancestors": sorted(rows, key=lambda item: (item["kind"], item["key"])), "provenances": provenances}


def _contains(name: Any, root: Path) -> bool:
    """Tell whether the path is one of the root's parents, so that the root could not be made."""
    return isinstance(name, str) and root.is_relative_to(Path(name).absolute())


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return _LEAST_FREE
