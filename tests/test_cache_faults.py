"""Kills and full disks at every step, missing permission: no partial entry is ever visible, the next run is sound."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deftx.cache import Stage, StageCache, Workspace
from deftx.cache.maintenance import leftovers_of
from deftx.errors import DeftxError

STAGE = Stage("full", 1, {"a": 1}, label="ace")
WRITING = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")]
STEPS = [*WRITING, (Path, "unlink"), (shutil, "rmtree")]


def write(workspace: Workspace) -> None:
    (workspace.scratch / "last.ckpt").write_text("step 10")
    (workspace.out / "sub").mkdir()
    (workspace.out / "a.bin").write_bytes(bytes(range(256)) * 200)
    (workspace.out / "sub" / "b.txt").write_text("b")


@contextlib.contextmanager
def at_step(number: int, action: Callable[[], None], steps: Sequence[Any] = STEPS) -> Iterator[list[str]]:
    """Do something instead of the n-th call that changes the file system."""
    done: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(real.__name__)
            if len(done) == number:
                action()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in steps:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield done


def killed_at(number: int, root: Path) -> bool:
    """Compute the stage in a process that is killed before its n-th step; False when it got through."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                StageCache(root).get_or_compute(STAGE, write)
            status = 0
        finally:
            os._exit(status)
    _, end = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(end) or os.WEXITSTATUS(end) == 0
    return os.WIFSIGNALED(end)


def test_a_kill_at_any_step_leaves_all_or_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    published = []
    for number in range(1, 100):
        root = tmp_path / str(number)
        if not killed_at(number, root):
            break
        cache = StageCache(root)
        entries = list(cache.entries())
        assert all(cache.verify(entry) is None for entry in entries)
        found = cache.find(STAGE)
        assert (found is not None) == bool(entries)
        published.append(found is not None)
        started = time.perf_counter()
        assert cache.get_or_compute(STAGE, write).size == 256 * 200 + 1
        assert time.perf_counter() - started < 3
        left = [path.name for path in (root / "full").iterdir()]
        assert left == [STAGE.key[:16]], "what the killed process wrote is removed by the next"
        assert not (root / "damaged").exists()
    assert number > 12, "the steps were not counted"
    assert published == sorted(published), "before the rename nothing, from then on all of it"
    assert {False, True} == set(published)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_at_any_step_leaves_all_or_nothing(tmp_path: Path, code: int) -> None:
    def full() -> None:
        raise OSError(code, os.strerror(code))

    refused = 0
    for number in range(1, 100):
        root = tmp_path / str(number)
        cache = StageCache(root)
        with at_step(number, full, WRITING) as done:
            try:
                cache.get_or_compute(STAGE, write)
            except DeftxError as error:
                refused += 1
                assert os.strerror(code) in str(error)  # noqa: PT017
        assert [path.name for path in (root / "full").glob(".*")] == []
        assert all(cache.verify(entry) is None for entry in cache.entries())
        assert cache.get_or_compute(STAGE, write).size == 256 * 200 + 1
        if len(done) < number:
            break
    assert refused > 5


def test_readers_see_all_or_nothing_while_writers_are_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop, seen, wrong = threading.Event(), {"there": 0, "not": 0}, []

    def read() -> None:
        while not stop.is_set():
            cache = StageCache(tmp_path)
            found = cache.find(STAGE)
            seen["there" if found else "not"] += 1
            for entry in cache.entries():
                if not {"a.bin", "sub/b.txt"} <= set(entry.manifest["files"]):
                    wrong.append(entry)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in (3, 6, 9, 11, 13, 15, 99) * 6:
            killed_at(number, tmp_path)
            folder = tmp_path / "full" / STAGE.key[:16]
            if folder.exists():  # what pruning does
                hidden = folder.with_name(".gone")
                folder.rename(hidden)
                shutil.rmtree(hidden)
    finally:
        stop.set()
        reader.join()
    assert not wrong
    assert seen["there"]
    assert seen["not"]
    assert not (tmp_path / "damaged").exists()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def as_nobody(action: Callable[[], object]) -> list[str]:
    """What an action says when a user does it who owns nothing (the tests may run as root, whom nothing stops)."""
    import filelock  # before the change of user, who may not even read the interpreter's folder

    assert filelock.SoftFileLease
    read, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            try:
                text = str(action())
            except DeftxError as error:
                text = f"DeftxError: {error}"
            os.write(written, text.encode())
        finally:
            os._exit(0)
    os.close(written)
    os.waitpid(pid, 0)
    with open(read, encoding="utf-8") as stream:  # noqa: PTH123
        return stream.read().splitlines()


def never(workspace: Workspace) -> None:
    raise AssertionError("computed again")


@pytest.fixture
def public_root() -> Iterator[Path]:
    """A cache folder that anybody can reach; pytest's own folders are their user's alone."""
    place = Path(tempfile.mkdtemp())
    yield place / "root"
    for path in [place, *place.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(place)


def restrict(root: Path, folders: int, files: int) -> None:
    root.parent.chmod(0o755)
    for path in sorted([root, *root.rglob("*")], reverse=True):
        path.chmod(folders if path.is_dir() else files)


def test_a_complete_cache_that_may_only_be_read_serves_hits(public_root: Path) -> None:
    StageCache(public_root).get_or_compute(STAGE, write)
    restrict(public_root, 0o555, 0o444)

    def read() -> str:
        cache = StageCache(public_root)
        entry = cache.get_or_compute(STAGE, never)
        return f"{cache.hits} {entry.size} {len(list(cache.entries()))} {cache.verify(entry)}"

    assert as_nobody(read) == ["1 51201 1 None"]
    (message,) = as_nobody(lambda: StageCache(public_root).get_or_compute(Stage("full", 2, {}), never))
    assert message.startswith(f"DeftxError: cannot write to the stage cache {public_root}: Permission denied")


def test_a_cache_that_may_not_be_read_is_one_message(public_root: Path) -> None:
    StageCache(public_root).get_or_compute(STAGE, write)
    restrict(public_root, 0o755, 0o000)
    (message,) = as_nobody(lambda: StageCache(public_root).get_or_compute(STAGE, never))
    assert message.startswith(f"DeftxError: cannot read the cache entry {public_root}")
    assert not (public_root / "damaged").exists()


def test_what_killed_processes_left_is_listed(tmp_path: Path) -> None:
    number = 1
    while not list(tmp_path.glob("full/.*/a.bin")):
        assert killed_at(number, tmp_path)
        number += 1
    assert {item.sort for item in leftovers_of(tmp_path)} == {"temporary", "checkpoints"}
    assert all(item.running is None for item in leftovers_of(tmp_path))
