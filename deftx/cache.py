"""Content-addressed results of stages: each is computed once for all that changes its result, then read.

The key of a stage is the sha256 of canonical JSON over its kind, version, settings, seed and the keys or
fingerprints of its inputs; paths, labels and devices are not in it. A result is written to a temporary
sibling folder, synced, and renamed into place together with a manifest that lists every file's size and
sha256. A rename never replaces an existing result, so publishing is idempotent: correctness rests on that
alone, and the lock a computing process holds only saves others the work. Every read verifies; a damaged entry
is set aside, not deleted.

On disk: ``<root>/<kind>/<first 16 digits of the key>/{manifest.json, files}``, and beside the kinds
``scratch/`` (checkpoints of unfinished stages), ``damaged/``, ``locks/`` and ``fingerprints.json`` (memo of
file hashes).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from deftx.errors import DeftxError

__all__ = [
    "Entry",
    "Event",
    "Stage",
    "StageCache",
    "Workspace",
    "canonical_json",
    "file_sha256",
    "fingerprint_files",
]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FINGERPRINTS = "fingerprints.json"
RESERVED = frozenset({"scratch", "damaged", "locks"})
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,40}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_RACY_NS = 2_000_000_000
_LEAST_FREE = 1 << 20


class _DamageError(Exception):
    """An entry is not what its manifest says; the text is the reason."""


# ------------------------------------------------------------------------------------------------------- keys


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a plain value: sorted keys, no whitespace, ASCII, floats by ``repr``.

    Integers and floats are distinct (``1`` and ``1.0`` give different texts, hence different keys), so are
    ``True`` and ``1``; tuples count as lists.

    Raises:
        DeftxError: a float is NaN or infinite (a user can type one).
        TypeError: a value is not plain JSON, such as a path or an object; the text says where it stands.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DeftxError(f"{where} is {float(value)!r}: a setting must be a finite number")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: only strings can be keys")
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    hint = "; give the fingerprint of what lies there" if isinstance(value, os.PathLike) else ""
    raise TypeError(f"{where} is a {type(value).__name__}, which has no place in a stage key{hint}")


def _loose(value: Any) -> Any:
    """Make any value JSON: what a computation notes must not be able to spoil its result."""
    if isinstance(value, Mapping):
        return {str(key): _loose(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_loose(item) for item in value]
    try:
        return _plain(value, "value")
    except (DeftxError, TypeError):
        return str(value)


@dataclass(frozen=True, eq=False)
class Stage:
    """What a stage computes, as plain values; two stages are equal when their keys are.

    Args:
        kind: lower-case name of the stage and of its folder in the cache, such as ``full`` or ``sparse``.
        version: number of the stage's code; raise it when the same settings would give another result.
        settings: the settings that change the result, plain JSON values; copied.
        inputs: name -> key of another stage, or fingerprint of data.
        seed: the run's seed where the stage draws from it.
        label: for people (logs, listings); not in the key.

    Raises:
        DeftxError: a setting is NaN or infinite.
        TypeError: a setting is not plain JSON.
        ValueError: ``kind`` cannot name a folder.
    """

    kind: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind) or self.kind in RESERVED:
            raise ValueError(f"{self.kind!r} cannot name a stage: use a-z, 0-9, - and _, not {sorted(RESERVED)}")
        object.__setattr__(self, "settings", _plain(self.settings, "settings"))
        object.__setattr__(self, "inputs", _plain(self.inputs, "inputs"))
        for name, value in self.inputs.items():
            if not isinstance(value, str):
                raise TypeError(f"inputs.{name} is a {type(value).__name__}: give a key or a fingerprint")

    @functools.cached_property
    def key(self) -> str:
        """64 hexadecimal digits that change when, and only when, something changes the result."""
        parts = {name: getattr(self, name) for name in ("kind", "version", "settings", "inputs", "seed")}
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return f"{self.kind} {self.label} [{self.key[:8]}]" if self.label else f"{self.kind} [{self.key[:8]}]"


# ----------------------------------------------------------------------------------------------- fingerprints


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_files(
    paths: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None = None,
    *,
    memo: Path | None = None,
) -> str:
    """Return one sha256 for the contents of files, wherever they lie.

    Args:
        paths: files or folders. A folder stands for its files, recursively and by sorted relative name, which
            then counts too; names that start with a dot are left out.
        root: when given, each file's name relative to it counts and the order of ``paths`` does not. When
            not, only contents and their order count: moving or renaming a file keeps the fingerprint.
        memo: a JSON file that remembers hashes of unchanged files (path, inode, size, times); may be absent.

    Raises:
        DeftxError: a path does not exist or cannot be read.
    """
    named: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted((found.relative_to(path).as_posix(), found) for found in path.rglob("*") if found.is_file())
            inside = [(name, found) for name, found in inside if not any(p.startswith(".") for p in name.split("/"))]
            if not inside:
                raise DeftxError(f"{path} has no files")
        elif path.is_file():
            inside = [("", path)]
        else:
            raise DeftxError(f"{path} does not exist (or is neither a file nor a folder)")
        named += inside
    if root is not None:
        named = sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for _, path in named)
    known = _read_memo(memo)
    total = hashlib.sha256()
    fresh: dict[str, list[Any]] = {}
    for name, path in named:
        try:
            now, identity, stat = time.time_ns(), os.path.realpath(path), path.stat()
            mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            digest = known[identity][-1] if known.get(identity, [None])[:-1] == mark else file_sha256(path)
        except OSError as error:
            raise DeftxError(f"cannot read {path}: {error.strerror}") from error
        if _settled(stat, now) and known.get(identity) != [*mark, digest]:
            fresh[identity] = [*mark, digest]
        total.update(json.dumps([name, digest]).encode())
    if memo is not None and fresh:
        # Losing this file costs time only: a cache that cannot be written is not an error here.
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(memo, json.dumps({**_read_memo(memo), **fresh}, indent=0).encode())
    return total.hexdigest()


def _read_memo(memo: Path | None) -> dict[str, list[Any]]:
    if memo is None:
        return {}
    try:
        content = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        return {}
    return {path: mark for path, mark in content.items() if isinstance(mark, list) and len(mark) == 5}


# ------------------------------------------------------------------------------------------------------ cache


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
            kind).

    Attributes:
        events: one :class:`Event` for each request, in order.
    """

    def __init__(self, root: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self.provenance = dict(provenance or {"python": platform.python_version(), "machine": platform.machine()})
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
        if not folder.is_dir():
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
                        entry = self._compute(stage, compute, self.provenance if provenance is None else provenance)
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
                files[name] = {"size": path.stat().st_size, "sha256": _sync_and_hash(path)}
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
            "provenance": _loose(provenance),
            "notes": _loose(workspace.notes),
            "files": files,
        }
        _write_synced(out / MANIFEST, json.dumps(manifest, indent=1).encode())
        for directory in reversed(directories):
            _sync_directory(directory)
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
            _sync_directory(folder.parent)
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
                if _settled(stat, now):
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


def _settled(stat: os.stat_result, now: int) -> bool:
    """Whether another change would surely show in the time stamps (they tick: git's "racy" entries)."""
    return now - max(stat.st_mtime_ns, stat.st_ctime_ns) > _RACY_NS


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a directory; the rename is atomic there all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
