"""Several processes and hosts on one cache: who computes, who waits, who takes over, and that no lock is needed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import deftx.cache.locks
from deftx.cache import Entry, Stage, StageCache, Workspace
from deftx.cache.locks import is_locked, lock_mode, lock_stage
from deftx.cache.scratch import claim_in_force, claim_scratch
from deftx.errors import DeftxError
from deftx.processes import Process, host_id

STAGE = Stage("full", 1, {"a": 1}, label="ace")
NAME = f"full-{STAGE.key[:16]}"

# A process that computes STAGE. It writes a checkpoint, says where, and goes on when the file "go" is there.
CHILD = """
import os, platform, socket, sys, time
from pathlib import Path
root, host, lease, marks = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])
if host:
    platform.node = socket.gethostname = lambda: host
import deftx.cache.locks
from deftx.cache import Stage, StageCache
deftx.cache.locks.LEASE_SECONDS = lease
def compute(workspace):
    mine = workspace.scratch / "last.ckpt"
    found = mine.read_text() if mine.exists() else ""
    mine.write_text(f"{os.getpid()}")
    (marks / f"computing-{os.getpid()}").write_text(f"{workspace.scratch.name} {found}")
    while not (marks / "go").exists():
        time.sleep(0.02)
    if mine.read_text() != str(os.getpid()):
        (marks / "corrupted").write_text("another process wrote to this scratch")
    (workspace.out / "a.bin").write_bytes(bytes(range(256)))
entry = StageCache(root).get_or_compute(Stage("full", 1, {"a": 1}, label="ace"), compute)
print(entry.manifest["files"]["a.bin"]["sha256"])
"""


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    made = tmp_path / "marks"
    made.mkdir()
    return made


@pytest.fixture
def start(tmp_path: Path, marks: Path) -> Iterator[object]:
    running: list[subprocess.Popen[str]] = []

    def run(mode: str, *, host: str = "", lease: float = 60.0) -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(tmp_path / "root"), host, str(lease), str(marks)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "DEFTX_LOCK": mode},
            )
        )
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(*paths: Path, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"{paths} did not come"
        time.sleep(0.02)


def computing(marks: Path, process: subprocess.Popen[str]) -> str:
    """Name of the scratch the process computes in and what it found there, once it computes."""
    mark = marks / f"computing-{process.pid}"
    wait_for(mark)
    time.sleep(0.05)
    return mark.read_text()


def write(workspace: Workspace) -> None:
    (workspace.out / "a.bin").write_bytes(bytes(range(256)))


def never(workspace: Workspace) -> None:
    raise AssertionError("computed again")


def scratches(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "scratch").iterdir())


# ------------------------------------------------------------------------------------------------- without locks


def test_without_any_lock_two_processes_at_once_disturb_nothing(tmp_path: Path, marks: Path, start: object) -> None:
    one, two = start("none"), start("none")
    places = [computing(marks, process).split()[0] for process in (one, two)]  # both compute at the same time
    assert sorted(place == NAME for place in places) == [False, True], "they must not share a scratch"
    (marks / "go").touch()
    ends = [process.communicate(timeout=20) for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], ends
    assert len({out for out, _ in ends}) == 1
    assert not (marks / "corrupted").exists()
    cache = StageCache(tmp_path / "root")
    (entry,) = cache.entries()
    assert cache.verify(entry) is None
    assert [path.name for path in (tmp_path / "root" / "full").iterdir()] == [entry.path.name]
    assert scratches(cache.root) == []


def test_without_any_lock_a_killed_process_is_resumed(tmp_path: Path, marks: Path, start: object) -> None:
    killed = start("none")
    computing(marks, killed)
    killed.kill()
    killed.wait()
    after = start("none")
    assert computing(marks, after) == f"{NAME} {killed.pid}"


@pytest.mark.parametrize("refused", ["file", "soft", "both"])
def test_a_lock_that_the_file_system_refuses_is_gone_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    import filelock

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    for name, lock in (("file", filelock.FileLock), ("soft", filelock.SoftFileLease)):
        if refused in (name, "both"):
            monkeypatch.setattr(lock, "acquire", refuse)
    cache = StageCache(tmp_path)
    cache.get_or_compute(STAGE, write)
    assert cache.computed == 1


# ---------------------------------------------------------------------------------------------------- one computes


@pytest.mark.parametrize("mode", ["auto", "file", "soft"])
def test_one_computes_and_the_others_wait_and_say_for_whom(
    tmp_path: Path, marks: Path, start: object, mode: str
) -> None:
    first = start(mode)
    computing(marks, first)
    others = [start(mode) for _ in range(2)]
    time.sleep(1.5)
    (marks / "go").touch()
    ends = [process.communicate(timeout=20) for process in (first, *others)]
    assert len({out for out, _ in ends}) == 1
    assert [path.name for path in marks.glob("computing-*")] == [f"computing-{first.pid}"]
    for _, err in ends[1:]:
        assert f"full ace [{STAGE.key[:8]}]: process {first.pid} (since " in err
        assert "waiting for its result" in err
    assert "waiting" not in ends[0][1]
    assert sorted(path.name for path in (tmp_path / "root" / "locks").iterdir() if path.suffix == ".lease") == []


def test_a_waiter_sees_what_was_published_though_the_lock_is_never_let_go(tmp_path: Path) -> None:
    with lock_stage(tmp_path, NAME, "held", "auto", published=lambda: None, explain=lambda _: None) as held:
        assert held.locked
        assert held.leased
        got: list[Entry] = []
        cache = StageCache(tmp_path)
        waiter = threading.Thread(target=lambda: got.append(cache.get_or_compute(STAGE, never)))
        waiter.start()
        time.sleep(0.5)
        assert not got
        StageCache(tmp_path, lock="none").get_or_compute(STAGE, write)
        waiter.join(5)
        assert [entry.key for entry in got] == [STAGE.key]
    assert cache.events[0].outcome == "cached"
    assert 0.3 < cache.events[0].waited <= cache.events[0].seconds


@pytest.mark.parametrize("mode", ["auto", "file", "soft"])
def test_a_dead_holder_of_this_host_is_noticed_at_once(tmp_path: Path, marks: Path, start: object, mode: str) -> None:
    killed = start(mode)
    assert computing(marks, killed).strip() == NAME
    waiter = start(mode)
    time.sleep(1)
    assert not (marks / f"computing-{waiter.pid}").exists()
    killed.kill()
    killed.wait()
    at = time.monotonic()
    assert computing(marks, waiter) == f"{NAME} {killed.pid}", "the same scratch, as it was left"
    assert time.monotonic() - at < 5
    (marks / "go").touch()
    assert waiter.communicate(timeout=20)[0]
    assert scratches(tmp_path / "root") == []


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "exchange"), [("auto", True), ("soft", True), ("soft", False)])
def test_a_dead_holder_of_another_host_is_noticed_when_its_lease_is_not_renewed(
    tmp_path: Path, marks: Path, start: object, monkeypatch: pytest.MonkeyPatch, mode: str, exchange: bool
) -> None:
    monkeypatch.setattr(deftx.cache.locks, "LEASE_SECONDS", 2.0)
    if not exchange:  # NFS and SMB cannot exchange two names, which filelock needs to pass a lease on
        holders = [module for name, module in sys.modules.items() if name.partition(".")[0] == "filelock"]
        exchanging = [module for module in holders if hasattr(module, "exchange_names")]
        assert exchanging, "filelock exchanges names under another name"
        for module in exchanging:
            monkeypatch.setattr(module, "exchange_names", lambda *_: False)
    killed = start(mode, host="elsewhere", lease=2.0)
    computing(marks, killed)
    killed.kill()
    killed.wait()
    seen: list[tuple[str, list[str]]] = []

    def compute(workspace: Workspace) -> None:
        seen.append((workspace.scratch.name, sorted(path.name for path in workspace.scratch.iterdir())))
        write(workspace)

    cache = StageCache(tmp_path / "root", lock=mode)
    cache.get_or_compute(STAGE, compute)
    assert 1.0 < cache.events[0].waited < 15
    ((name, files),) = seen
    assert files == ["last.ckpt"], "its checkpoints are taken over"
    assert name.startswith(f"{NAME}."), "under another name: it might have lived"
    assert scratches(cache.root) == []


@pytest.mark.soak
def test_a_renewed_lease_of_another_host_is_respected(
    tmp_path: Path, marks: Path, start: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deftx.cache.locks, "LEASE_SECONDS", 1.0)
    living = start("soft", host="elsewhere", lease=1.0)
    computing(marks, living)
    cache = StageCache(tmp_path / "root", lock="soft")
    threading.Timer(3.5, (marks / "go").touch).start()
    cache.get_or_compute(STAGE, never)
    assert cache.events[0].waited > 2


@pytest.mark.soak
def test_a_holder_that_was_thought_dead_and_comes_back_disturbs_nothing(
    tmp_path: Path, marks: Path, start: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deftx.cache.locks, "LEASE_SECONDS", 1.0)
    stopped = start("soft", host="elsewhere", lease=1.0)
    computing(marks, stopped)
    stopped.send_signal(signal.SIGSTOP)
    try:

        def compute(workspace: Workspace) -> None:
            mine = workspace.scratch / "last.ckpt"
            mine.write_text("ours")
            stopped.send_signal(signal.SIGCONT)
            (marks / "go").touch()
            # It finds its checkpoint gone, fails, and waits for us.
            until = time.monotonic() + 3
            while time.monotonic() < until:
                assert mine.read_text() == "ours"
                time.sleep(0.05)
            write(workspace)

        cache = StageCache(tmp_path / "root", lock="soft")
        cache.get_or_compute(STAGE, compute)
    finally:
        stopped.send_signal(signal.SIGCONT)
    out, err = stopped.communicate(timeout=20)
    assert stopped.returncode == 0, err
    assert "another process took it over" in err
    assert out.strip() == next(cache.entries()).manifest["files"]["a.bin"]["sha256"]
    assert cache.computed == 1


# ------------------------------------------------------------------------------------------------- scratch claims


def other_host(root: Path) -> None:
    """Make the claim in force another host's."""
    claim = claim_in_force(root, NAME)
    assert claim is not None
    values = json.loads(claim.file.read_bytes())
    claim.file.write_text(json.dumps({**values, "process": ["0" * 8, 4, 5]}))


@pytest.mark.parametrize(
    ("holder", "locked", "leased", "place"),
    [
        ("none", False, False, "same"),
        ("released", False, False, "same"),
        ("dead", False, False, "same"),
        ("dead", True, True, "same"),
        ("alive", False, False, "empty"),
        ("alive", True, False, "moved"),  # it holds no lock any more: a lease that ran out, a lock file removed
        ("elsewhere", False, False, "empty"),
        ("elsewhere", True, False, "empty"),  # the kernel's lock may not reach over hosts
        ("elsewhere", True, True, "moved"),
        ("unreadable", True, True, "moved"),
        ("unreadable", True, False, "empty"),
    ],
)
def test_who_may_use_a_scratch(tmp_path: Path, holder: str, locked: bool, leased: bool, place: str) -> None:
    if holder != "none":
        first = claim_scratch(tmp_path, STAGE, locked=True, leased=True)
        (first.path / "last.ckpt").write_text("step 10")
        assert first.claim is not None
        if holder == "released":
            first.release()
        elif holder == "dead":
            values = json.loads(first.claim.file.read_bytes())
            first.claim.file.write_text(json.dumps({**values, "process": [host_id(), os.getpid(), 1]}))
        elif holder == "elsewhere":
            other_host(tmp_path)
        elif holder == "unreadable":
            first.claim.file.write_text("{")
    got = claim_scratch(tmp_path, STAGE, locked=locked, leased=leased)
    assert (got.path.name == NAME) == (place == "same")
    expected = [] if holder == "none" or place == "empty" else ["last.ckpt"]
    assert [path.name for path in got.path.iterdir()] == expected
    if place == "moved":
        assert first.lost
        assert not first.path.exists()
        assert not got.lost
    got.discard()
    assert not got.path.exists()


def test_a_scratch_that_was_moved_stays_where_it_is_for_the_next(tmp_path: Path) -> None:
    claim_scratch(tmp_path, STAGE, locked=True, leased=True)
    other_host(tmp_path)
    moved = claim_scratch(tmp_path, STAGE, locked=True, leased=True)
    moved.release()
    # The first holder may still write to the first name.
    assert claim_scratch(tmp_path, STAGE, locked=True, leased=True).path == moved.path


def test_a_process_is_dead_when_its_id_was_given_to_another() -> None:
    this = Process.this()
    assert this.lives()
    assert not this._replace(start=this.start - 1).lives()
    assert not this._replace(pid=2**22 + 1).lives()
    assert Process("0" * 8, 2**22 + 1, 1).lives(), "of another host nothing is proven"


# --------------------------------------------------------------------------------------------------------- modes


def test_the_lock_is_chosen_by_argument_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DEFTX_LOCK", raising=False)
    assert lock_mode() == "auto"
    monkeypatch.setenv("DEFTX_LOCK", "soft")
    assert lock_mode() == "soft"
    assert lock_mode("none") == "none"
    monkeypatch.setenv("DEFTX_LOCK", "sofd")
    with pytest.raises(DeftxError, match=r"DEFTX_LOCK=sofd: available are auto, file, soft, none; did you mean 'soft'"):
        StageCache(tmp_path)


@pytest.mark.parametrize("mode", ["auto", "file", "soft"])
def test_a_running_stage_is_seen_as_locked(tmp_path: Path, mode: str) -> None:
    assert not is_locked(tmp_path, NAME)
    with lock_stage(tmp_path, NAME, "held", mode, published=lambda: None, explain=lambda _: None):
        assert is_locked(tmp_path, NAME)
    assert not is_locked(tmp_path, NAME)
