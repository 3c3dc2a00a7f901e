"""The cache itself: published results, verified on every read."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from deftx.cache.files import file_sha256, fingerprint_files, settled, sync_and_hash, sync_directory, write_synced
from deftx.cache.keys import RESERVED, Stage, loose
from deftx.errors import DeftxError

__all__ = ["Entry", "Event", "StageCache", "Workspace"]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FINGERPRINTS = "fingerprints.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_LEAST_FREE = 1 << 20


class _DamageError(Exception):
    """An entry is not what its manifest says; the text is the reason."""


class Event(NamedTuple):
    """One request to the cache.

    ``outcome`` is ``cached`` or ``computed``; ``seconds`` is its own wall time, that of stages it asked for left out.
    """

    kind: str
    label: str
    key: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class Workspace:
    """Where a stage writes while it computes.

    Attributes:
        out: a new empty folder; what lies in it when the computation returns is published, all or nothing.
        scratch: a folder of this key alone, for checkpoints; it survives failures and interruptions (a later
            attempt finds it as it was) and is removed after publishing.
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


class StageCache:
    """Results of stages under one root; any number of processes may share it.

    Args:
        root: the folder; made when something is first written.
        provenance: what the manifests should say about where results come from (versions, threads, machine
            kind); a function is asked once, when something is first about to be computed, so that a run that
            finds everything here need not load what it takes to answer.

    Attributes:
        events: one :class:`Event` for each request, in order.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        provenance: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self._provenance = provenance or {"python": platform.python_version(), "machine": platform.machine()}
        self.events: list[Event] = []
        self._inner_seconds = 0.0  # spent by stages that the one being computed asked for
        self._verified: dict[tuple[int, ...], str] = {}

    @property
    def hits(self) -> int:
        """How many requests were answered from the cache."""
        return sum(event.outcome == "cached" for event in self.events)

    @property
    def computed(self) -> int:
        """How many requests computed their stage."""
        return sum(event.outcome == "computed" for event in self.events)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What manifests say about where results come from."""
        return dict(self._provenance() if callable(self._provenance) else self._provenance)

    def has(self, stage: Stage) -> bool:
        """Whether a result is there, without reading it (for dry runs)."""
        return (self._folder(stage) / MANIFEST).is_file()

    def find(self, stage: Stage) -> Entry | None:
        """Return the stage's result after verifying manifest and checksums, or None.

        A damaged entry is moved to ``damaged/`` with a warning, and None is returned. Files of an entry are
        hashed once per process as long as their size and times stay the same.

        Raises:
            DeftxError: the entry cannot be read, cannot be set aside, or was written by a newer format.
        """
        folder = self._folder(stage)
        if not os.path.lexists(folder):
            return None
        try:
            entry = self._load(folder)
            if entry.key != stage.key:
                raise _DamageError(f"it belongs to the key {entry.key}")
            self._check(entry)
        except _DamageError as damage:
            self._set_aside(folder, str(damage))
            return None
        return entry

    def peek(self, stage: Stage) -> Entry | None:
        """Return the stage's result by its manifest alone, files not verified; None where there is no sound one."""
        try:
            entry = self._load(self._folder(stage))
        except _DamageError:
            return None
        return entry if entry.key == stage.key else None

    def verify(self, entry: Entry) -> str | None:
        """Return why an entry is damaged, or None when every file has its size and sha256; moves nothing."""
        try:
            self._check(entry)
        except _DamageError as damage:
            return str(damage)
        return None

    def entries(self) -> Iterator[Entry]:
        """Yield the published results by kind and key, checksums not verified, unreadable ones logged."""
        kinds = sorted(self.root.iterdir()) if self.root.is_dir() else []
        for kind in kinds:
            if kind.name in RESERVED or kind.name.startswith(".") or not kind.is_dir():
                continue
            for folder in sorted(kind.iterdir()):
                if folder.name.startswith(".") or not folder.is_dir():
                    continue
                try:
                    entry = self._load(folder)
                except (_DamageError, DeftxError) as problem:
                    log.warning("%s is left out: %s", folder, problem)
                else:
                    yield entry

    def fingerprint(self, paths: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None = None) -> str:
        """Return :func:`fingerprint_files` with this cache's memo, so that unchanged files are read once."""
        return fingerprint_files(paths, root, memo=self.root / FINGERPRINTS)

    def get_or_compute(
        self,
        stage: Stage,
        compute: Callable[[Workspace], None],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Return the stage's verified result, computing and publishing it when there is none.

        Args:
            stage: what is wanted.
            compute: writes the result into ``workspace.out``; a pure function of the stage.
            provenance: for the manifest, in place of the cache's own.

        Raises:
            DeftxError: the cache cannot be written (space, permission) or read; nothing half-written stays.
            Exception: whatever ``compute`` raises; ``workspace.scratch`` stays for the next attempt.
        """
        started = time.perf_counter()
        around, self._inner_seconds = self._inner_seconds, 0.0
        outcome = "cached"
        try:
            entry = self.find(stage)
            if entry is None:
                with self._lock(stage):
                    entry = self.find(stage)
                    if entry is None:
                        outcome = "computed"
                        if provenance is None:
                            asked = time.perf_counter()
                            provenance = self.provenance
                            self._inner_seconds += time.perf_counter() - asked  # not this stage's work
                        entry = self._compute(stage, compute, provenance)
        finally:
            total = time.perf_counter() - started
            seconds = total - self._inner_seconds
            self._inner_seconds = around + total
        log.info("%s: %s in %.1f s", stage, outcome, seconds)
        self.events.append(Event(stage.kind, stage.label, stage.key, outcome, seconds))
        return entry

    # ---------------------------------------------------------------------------------------------- computing

    def _folder(self, stage: Stage) -> Path:
        return self.root / stage.kind / stage.key[:16]

    def _compute(self, stage: Stage, compute: Callable[[Workspace], None], provenance: Mapping[str, Any]) -> Entry:
        folder = self._folder(stage)
        scratch = self.root / "scratch" / f"{stage.kind}-{folder.name}"
        out = folder.parent / f".{folder.name}.{_owner()}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            out.mkdir()
            workspace = Workspace(out, scratch)
            started = time.perf_counter()
            compute(workspace)
            seconds = time.perf_counter() - started
            entry = self._publish(stage, workspace, seconds, provenance)
        except BaseException as error:
            problem = self._explain(error)
            shutil.rmtree(out, ignore_errors=True)
            # Another process may have published meanwhile, and removed the scratch folder we worked in.
            published = self.find(stage) if isinstance(error, Exception) and folder.is_dir() else None
            if published is None:
                if problem is not None:
                    raise problem from error
                raise
            log.info("%s: another process published it first", stage)
            entry = published
        shutil.rmtree(scratch, ignore_errors=True)
        return entry

    def _publish(self, stage: Stage, workspace: Workspace, seconds: float, provenance: Mapping[str, Any]) -> Entry:
        folder, out = self._folder(stage), workspace.out
        files: dict[str, dict[str, Any]] = {}
        directories = [out]
        for path in sorted(out.rglob("*")):
            name = path.relative_to(out).as_posix()
            if path.is_symlink() or name == MANIFEST:
                raise ValueError(f"{stage} wrote {name}: links and {MANIFEST} cannot be published")
            if path.is_dir():
                directories.append(path)
            else:
                files[name] = {"size": path.stat().st_size, "sha256": sync_and_hash(path)}
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
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "provenance": loose(provenance),
            "notes": loose(workspace.notes),
            "files": files,
        }
        write_synced(out / MANIFEST, json.dumps(manifest, indent=1).encode())
        for directory in reversed(directories):
            sync_directory(directory)
        for _ in range(3):
            try:
                out.rename(folder)
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
            sync_directory(folder.parent)
            return Entry(folder, manifest)
        raise DeftxError(f"cannot publish {stage}: {folder} is damaged again and again; check the disk")

    def _explain(self, error: BaseException) -> DeftxError | None:
        """Return the user's view of an error that is the disk's fault, None for any other."""
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
        free = _free_bytes(self.root) / 2**30
        return DeftxError(
            f"cannot write to the stage cache {self.root}: {reason} ({free:.1f} GiB free). "
            "Nothing half-written was kept. Make room or permission there, or choose another folder for the "
            "cache, and run the command again."
        )

    @contextlib.contextmanager
    def _lock(self, stage: Stage) -> Iterator[None]:
        import filelock

        lock = filelock.FileLock(self.root / "locks" / f"{stage.kind}-{stage.key[:16]}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0.2)
            except filelock.Timeout:
                log.warning("%s: another process is computing it; waiting for its result", stage)
                lock.acquire(poll_interval=0.2)
        except (OSError, NotImplementedError) as error:
            if problem := self._explain(error):
                raise problem from error
            log.debug("no lock for %s (%s); going on without", stage, error)
        try:
            yield
        finally:
            lock.release()

    # ---------------------------------------------------------------------------------------------- verifying

    def _load(self, folder: Path) -> Entry:
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            version = manifest["format_version"]
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise DeftxError(
                    f"{folder} was written in cache format {version}, this deftx reads up to "
                    f"{FORMAT_VERSION}: update deftx or choose another folder for the cache"
                )
            entry = Entry(folder, manifest)
            sound = all(isinstance(text, str) for text in (manifest["key"], manifest["kind"], manifest["label"]))
            sound &= isinstance(manifest["notes"], dict) and isinstance(entry.size, int)
            for name, record in manifest["files"].items():
                sound &= isinstance(record["sha256"], str) and ".." not in Path(name).parts
                sound &= not Path(name).is_absolute()
        except PermissionError as error:
            raise DeftxError(f"cannot read the cache entry {folder}: {error.strerror}") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise _DamageError(f"{MANIFEST} is missing or broken ({type(error).__name__})") from error
        if not sound:
            raise _DamageError(f"{MANIFEST} does not have the form of one")
        return entry

    def _check(self, entry: Entry) -> None:
        for name, record in entry.manifest["files"].items():
            path, now = entry.path / name, time.time_ns()
            try:
                stat = path.stat()
                if stat.st_size != record["size"]:
                    raise _DamageError(f"{name} has {stat.st_size} bytes, not {record['size']}")
                mark = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                digest = self._verified.get(mark) or file_sha256(path)
                if settled(stat, now):
                    self._verified[mark] = digest
            except PermissionError as error:
                raise DeftxError(f"cannot read {path}: {error.strerror}") from error
            except OSError as error:
                raise _DamageError(f"{name} cannot be read ({error.strerror})") from error
            if digest != record["sha256"]:
                raise _DamageError(f"the sha256 of {name} differs")

    def _set_aside(self, folder: Path, reason: str) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        place = self.root / "damaged" / f"{folder.parent.name}-{folder.name}-{stamp}-{os.urandom(2).hex()}"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(place)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DeftxError(
                f"the cache entry {folder} is damaged ({reason}) and cannot be moved aside: {error.strerror}"
            ) from error
        log.warning("the cache entry %s is damaged (%s); it was set aside as %s", folder, reason, place)


def _contains(name: Any, root: Path) -> bool:
    """Whether the path is one of the root's parents (the root itself could not be made)."""
    return isinstance(name, str) and root.is_relative_to(Path(name).absolute())


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return _LEAST_FREE


@functools.cache
def _owner() -> str:
    """Eight digits for this host and process-id namespace, within which a process id means something."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of this key whose process, on this host, is dead."""
    for path in folder.parent.glob(f".{folder.name}.{_owner()}.*.tmp"):
        with contextlib.suppress(ValueError, PermissionError, OverflowError):
            try:
                os.kill(int(path.name.split(".")[3]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
