"""Writing whole or not at all: kills and full disks at every step, leftovers, permissions."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deftx import atomic
from deftx.processes import Process, host_id, mark, marked

REFUSED = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")]
STEPS = [*REFUSED, (Path, "unlink"), (shutil, "rmtree")]


def write_file(place: Path, text: str) -> None:
    with atomic.file(place) as temporary:
        temporary.write_text(text)


def write_folder(place: Path, text: str, *, replace: bool = False) -> None:
    with atomic.folder(place, replace=replace) as temporary:
        (temporary / "sub").mkdir()
        for name in ("a.txt", "sub/b.txt"):
            (temporary / name).write_text(text)


def replace_folder(place: Path, text: str) -> None:
    write_folder(place, text, replace=True)


def content(place: Path) -> str | None:
    """What is there, which must be whole: None where nothing is."""
    if place.is_dir():
        assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*")) == ["a.txt", "sub", "sub/b.txt"]
        assert (place / "a.txt").read_text() == (place / "sub" / "b.txt").read_text()
        return (place / "a.txt").read_text()
    return place.read_text() if place.exists() else None


@contextlib.contextmanager
def at_step(number: int, action: Callable[[], None], steps: Sequence[Any] = STEPS) -> Iterator[list[str]]:
    """Do something in place of the n-th call that changes the file system."""
    calls: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(real.__name__)
            if len(calls) == number:
                action()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in steps:
            patch.setattr(place, name, counted(getattr(place, name)))
        yield calls


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Work in a process that is killed before its n-th step; False when it got through."""
    pid = os.fork()
    if pid == 0:
        with at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            try:
                work()
            finally:
                os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("write", "before"),
    [(write_file, None), (write_file, "old"), (write_folder, None), (replace_folder, None), (replace_folder, "old")],
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    write: Callable[[Path, str], None], before: str | None, tmp_path: Path
) -> None:
    seen = []
    for number in range(1, 50):
        place = tmp_path / str(number) / "place"
        place.parent.mkdir()
        if before is not None:
            write(place, before)
        if not killed_at(number, lambda place=place: write(place, "new")):  # type: ignore[misc]
            break
        atomic.remove_leftovers(place)
        seen.append(content(place))
        assert list(place.parent.iterdir()) == ([place] if seen[-1] is not None else [])
    assert set(seen) == {before, "new"}
    assert seen == sorted(seen, key=[before, "new"].index), "from the rename on the new one"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("write", [write_file, write_folder, replace_folder])
def test_a_disk_that_refuses_at_any_step(write: Callable[[Path, str], None], code: int, tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    before, raised = None if write is write_folder else "old", 0
    for number in range(1, 50):
        place = tmp_path / str(number) / "place"
        place.parent.mkdir()
        if before is not None:
            write(place, before)
        found: int | None = None
        with at_step(number, refuse, REFUSED) as calls:
            try:
                write(place, "new")
            except OSError as error:
                found = error.errno
        assert content(place) == ("new" if found is None else before), calls
        assert list(place.parent.iterdir()) == ([place] if content(place) is not None else [])
        assert found in (None, code)
        raised += found is not None
        if len(calls) < number:
            break
    assert raised > 1


def test_all_is_synced_before_the_rename_and_the_rename_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for write in (write_file, write_folder):
        place = tmp_path / write.__name__
        write(place, "new")
        inside = [place, *place.rglob("*")] if place.is_dir() else [place]
        assert sorted(synced[:-1]) == sorted(path.stat().st_ino for path in inside)
        assert synced[-1] == tmp_path.stat().st_ino
        synced.clear()


@pytest.mark.parametrize("kind", [atomic.file, atomic.folder])
def test_what_the_block_raises_goes_on_and_leaves_nothing(kind: Any, tmp_path: Path) -> None:
    def write() -> None:
        with kind(tmp_path / "place") as temporary:
            (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_never_written_over(tmp_path: Path) -> None:
    place = tmp_path / "place"
    write_folder(place, "old")
    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
        write_folder(place, "new")
    assert content(place) == "old"
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", "new")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        write_folder(tmp_path / "file", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "place"]


def test_parents_are_made_and_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic.write(tmp_path / "a" / "b" / "file", b"x")
        write_folder(tmp_path / "a" / "folder", "x")
    finally:
        os.umask(before)
    modes = [(tmp_path / "a" / name).stat().st_mode & 0o777 for name in ("b/file", "folder", "folder/a.txt")]
    assert modes == [0o640, 0o750, 0o640]
    with pytest.raises(NotADirectoryError):
        atomic.write(tmp_path / "a" / "b" / "file" / "c", b"")


def test_a_pipe_is_written_in_place() -> None:
    code = "from pathlib import Path; from deftx import atomic; atomic.write(Path('/dev/stdout'), b'here')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "here"


def test_only_leftovers_of_this_place_and_of_no_living_process_go(tmp_path: Path) -> None:
    place = tmp_path / "place"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [
        f".place.{mark()}.tmp",  # ours
        ".place.otherhst.12.00.tmp",
        f".place.more.{host_id()}.{dead.pid}.00.tmp",  # of another place
        f".place.{host_id()}.{dead.pid}.00.txt",
        ".place.tmp",
    ]
    go = [f".place.{host_id()}.{dead.pid}.00.tmp", f".place.{host_id()}.{dead.pid}.01.old"]
    for name in [*keep, *go]:
        (tmp_path / name).write_text("left")
    place.write_text("there")
    atomic.remove_leftovers(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, "place"])
    os.utime(tmp_path / keep[1], (0, 0))
    os.utime(tmp_path / keep[0], (0, 0))
    atomic.remove_leftovers(place)
    assert (tmp_path / keep[1]).exists(), "of another host nothing is proven"
    atomic.write(place, b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([keep[0], *keep[2:], "place"])
    assert place.read_text() == "new"


def test_a_mark_is_read_back() -> None:
    assert marked(f"a.b.{mark()}") == ("a.b", Process.this())
    assert marked(atomic.temporary_name(Path("x/result.json")).name) == (
        ".result.json",
        Process.this(),
    )
    assert marked("a.otherhst.12.00.tmp") == ("a", Process("otherhst", 12, 0)), "as older versions wrote it"
    for name in ("a", "a.b.c.d", f"a.{mark()}.", f"{mark()}", "a.otherhst.x.00.tmp"):
        assert marked(name) is None
