"""The stage cache: keys, atomic publishing, verification, faults, several processes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import deftx.cache.files
import deftx.cache.verify
from deftx.cache import Entry, Stage, StageCache, Workspace, canonical_json, file_sha256, fingerprint_files
from deftx.errors import DeftxError
from deftx.processes import host_id


def stage(**changes: Any) -> Stage:
    fields: dict[str, Any] = {
        "kind": "full",
        "version": 1,
        "settings": {"lr": 5e-5, "batch": 8, "names": ["a", "b"]},
        "inputs": {"base": "f00d"},
        "seed": 3,
        "label": "ace",
    }
    return Stage(**{**fields, **changes})


def write_two(workspace: Workspace) -> None:
    (workspace.out / "sub").mkdir()
    (workspace.out / "a.bin").write_bytes(bytes(range(256)))
    (workspace.out / "sub" / "b.txt").write_text("b")


def never(workspace: Workspace) -> None:
    raise AssertionError("computed again")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


# ------------------------------------------------------------------------------------------------------ keys


def test_key_is_the_sha256_of_the_canonical_json() -> None:
    text = (
        '{"inputs":{"base":"f00d"},"kind":"full","seed":3,'
        '"settings":{"batch":8,"lr":5e-05,"names":["a","b"]},"version":1}'
    )
    assert stage().key == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "sparse"},
        {"version": 2},
        {"seed": 4},
        {"seed": None},
        {"inputs": {"base": "f00e"}},
        {"inputs": {"base": "f00d", "data": "1"}},
        {"settings": {"lr": 5.1e-5, "batch": 8, "names": ["a", "b"]}},
        {"settings": {"lr": 5e-5, "batch": 8.0, "names": ["a", "b"]}},
        {"settings": {"lr": 5e-5, "batch": 8, "names": ["b", "a"]}},
        {"settings": {"lr": 5e-5, "batch": 8, "names": ["a", "b"], "more": None}},
    ],
)
def test_key_changes_with_whatever_changes_the_result(changes: dict[str, Any]) -> None:
    assert stage(**changes).key != stage().key
    assert stage(**changes) != stage()


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "another"},
        {"settings": {"names": ("a", "b"), "batch": 8, "lr": 0.00005}},
    ],
)
def test_key_ignores_label_order_and_spelling(changes: dict[str, Any]) -> None:
    assert stage(**changes).key == stage().key
    assert len({stage(**changes), stage()}) == 1


def test_key_keeps_what_was_given_when_the_caller_changes_it_later() -> None:
    settings: dict[str, Any] = {"x": [1]}
    made = stage(settings=settings)
    settings["x"].append(2)
    assert made.key == stage(settings={"x": [1]}).key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_the_users_mistake(value: float) -> None:
    with pytest.raises(DeftxError, match=r"settings\.a\[1\] is (nan|inf)"):
        stage(settings={"a": [0.0, value]})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"p": Path("x")}, r"settings\.p is a Posix.*fingerprint"),
        ({"p": {"q": object()}}, r"settings\.p\.q is a object"),
        ({"p": {1: 2}}, "only strings"),
        ({"p": {"a"}}, "is a set"),
        ({"p": b"x"}, "is a bytes"),
    ],
)
def test_keys_refuse_what_is_not_json(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        stage(settings=settings)


@pytest.mark.parametrize("kind", ["", "Full", "a/b", "..", "scratch", "damaged"])
def test_kind_must_name_a_folder(kind: str) -> None:
    with pytest.raises(ValueError, match="cannot name a stage"):
        stage(kind=kind)


def test_canonical_json_tells_types_apart() -> None:
    texts = {canonical_json(value) for value in (1, 1.0, True, "1", [1], None, -0.0, 0.0)}
    assert len(texts) == 8
    assert canonical_json({"b": "é\ud800", "a": 0.1 + 0.2}) == '{"a":0.30000000000000004,"b":"\\u00e9\\ud800"}'


# ---------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_follow_contents_not_places(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "one.txt").write_text("1")
        (tmp_path / folder / "in" / "two.txt").write_text("2")
    x, y = tmp_path / "x", tmp_path / "y"
    assert file_sha256(x / "one.txt") == hashlib.sha256(b"1").hexdigest()
    assert fingerprint_files([x]) == fingerprint_files([y])
    both = [x / "one.txt", x / "in" / "two.txt"]
    assert fingerprint_files(both) == fingerprint_files([y / "one.txt", y / "in" / "two.txt"])
    assert fingerprint_files(both) != fingerprint_files(both[::-1])
    assert fingerprint_files(both, root=x) == fingerprint_files(both[::-1], root=x) == fingerprint_files([x], x)
    (y / ".hidden").write_text("not counted")
    assert fingerprint_files([x]) == fingerprint_files([y])
    (y / "one.txt").rename(y / "uno.txt")
    assert fingerprint_files([x]) != fingerprint_files([y])
    assert fingerprint_files([x / "one.txt"]) == fingerprint_files([y / "uno.txt"])


def test_fingerprints_of_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeftxError, match=r"gone\.txt does not exist"):
        fingerprint_files([tmp_path / "gone.txt"])
    with pytest.raises(DeftxError, match="empty has no files"):
        fingerprint_files([tmp_path / "empty"])


def test_fingerprint_memo_reads_settled_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one")
    cache = StageCache(tmp_path / "cache")
    reads: list[Path] = []
    monkeypatch.setattr(deftx.cache.files, "file_sha256", lambda path: (reads.append(path), file_sha256(path))[1])
    before = cache.fingerprint([file])
    assert cache.fingerprint([file]) == before
    assert len(reads) == 2, "a file changed a moment ago must be read again"

    monkeypatch.setattr(deftx.cache.files, "_RACY_NS", -1)
    assert cache.fingerprint([file]) == before
    assert StageCache(cache.root).fingerprint([file]) == before
    assert len(reads) == 3

    planning = StageCache(tmp_path / "other", remember=False)
    assert planning.fingerprint([file]) == planning.fingerprint([file]) == before
    assert len(reads) == 4
    assert not planning.root.exists()
    file.write_text("two")
    assert cache.fingerprint([file]) != before
    (cache.root / "fingerprints.json").write_text('["broken"')
    assert cache.fingerprint([file]) == fingerprint_files([file]) != before


# ----------------------------------------------------------------------------------------- computing, reading


def test_a_stage_is_computed_once_and_then_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = StageCache(tmp_path / "root", provenance={"threads": 2})
    assert not cache.root.exists()
    assert cache.find(stage()) is None
    assert cache.peek(stage()) is None
    assert not cache.root.exists(), "looking makes nothing"

    def compute(workspace: Workspace) -> None:
        write_two(workspace)
        workspace.notes.update(lines=3, loss=float("nan"), where=tmp_path)

    entry = cache.get_or_compute(stage(), compute)
    assert entry.path == cache.root / "full" / stage().key[:16]
    assert names(entry.path) == ["a.bin", "manifest.json", "sub", "sub/b.txt"]
    assert names(cache.root / "scratch") == []
    manifest = json.loads((entry.path / "manifest.json").read_text())
    assert manifest == entry.manifest
    assert manifest["files"]["a.bin"] == {
        "size": 256,
        "sha256": hashlib.sha256(bytes(range(256))).hexdigest(),
    }
    assert manifest["settings"] == {"lr": 5e-5, "batch": 8, "names": ["a", "b"]}
    assert {k: manifest[k] for k in ("key", "kind", "version", "label", "seed", "inputs")} == {
        "key": stage().key,
        "kind": "full",
        "version": 1,
        "label": "ace",
        "seed": 3,
        "inputs": {"base": "f00d"},
    }
    assert manifest["provenance"] == {"threads": 2}
    assert entry.notes == {"lines": 3, "loss": "nan", "where": str(tmp_path)}
    assert entry.size == 257
    assert entry.file("sub/b.txt").read_text() == "b"
    with pytest.raises(DeftxError, match=r"no file 'c\.txt'; it has a\.bin, sub/b\.txt"):
        entry.file("c.txt")

    again = StageCache(cache.root)
    assert again.peek(stage()) is not None
    assert again.get_or_compute(stage(label="other"), never).path == entry.path
    assert (again.hits, again.computed, cache.hits, cache.computed) == (1, 0, 0, 1)
    assert [event[:4] for event in again.events] == [("full", "other", stage().key, "cached")]
    assert [event.outcome for event in cache.events] == ["computed"]
    assert [(found.key, found.kind, found.label) for found in again.entries()] == [(stage().key, "full", "ace")]


def test_unchanged_files_are_hashed_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StageCache(tmp_path).get_or_compute(stage(), write_two)
    cache = StageCache(tmp_path)
    reads: list[Path] = []
    monkeypatch.setattr(deftx.cache.verify, "file_sha256", lambda path: (reads.append(path), file_sha256(path))[1])
    assert cache.find(stage())
    assert cache.find(stage())
    assert len(reads) == 4, "files written a moment ago must be read again"
    monkeypatch.setattr(deftx.cache.files, "_RACY_NS", -1)
    assert cache.find(stage())
    assert cache.find(stage())
    assert len(reads) == 6


def flip(entry: Entry) -> None:
    with entry.file("a.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")


def truncate(entry: Entry) -> None:
    with entry.file("a.bin").open("r+b") as file:
        file.truncate(10)


def cut_manifest(entry: Entry) -> None:
    path = entry.path / "manifest.json"
    path.write_text(path.read_text()[:-40])


def change_manifest(**changes: Any) -> Any:
    def change(entry: Entry) -> None:
        (entry.path / "manifest.json").write_text(json.dumps({**entry.manifest, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, r"sha256 of a\.bin differs"),
        (truncate, r"a\.bin has 10 bytes, not 256"),
        (lambda entry: entry.file("a.bin").unlink(), r"a\.bin cannot be read"),
        (lambda entry: (entry.path / "manifest.json").unlink(), "missing or broken"),
        (cut_manifest, "missing or broken"),
        (lambda entry: (entry.path / "manifest.json").write_bytes(b"\xff\xfe"), "missing or broken"),
        (lambda entry: (entry.path / "manifest.json").write_text("[]"), "missing or broken"),
        (change_manifest(key="0" * 64), "belongs to the key 000"),
        (change_manifest(files={"../x": {"size": 1, "sha256": "0"}}), "form"),
        (change_manifest(files=["a.bin"]), "missing or broken"),
        (change_manifest(notes=None), "form"),
    ],
)
def test_damage_is_set_aside_with_a_warning_and_recomputed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, reason: str
) -> None:
    cache = StageCache(tmp_path)
    entry = cache.get_or_compute(stage(), write_two)
    assert cache.find(stage()) is not None
    damage(entry)
    left = {path: path.read_bytes() for path in entry.path.rglob("*") if path.is_file()}
    with caplog.at_level(logging.WARNING):
        assert cache.find(stage()) is None
    (record,) = caplog.records
    assert str(entry.path) in record.getMessage()
    assert record.levelno == logging.WARNING
    assert re.search(reason, record.getMessage())
    (aside,) = (tmp_path / "damaged").iterdir()
    assert aside.name.startswith(f"full-{stage().key[:16]}-")
    assert {path: (aside / path.relative_to(entry.path)).read_bytes() for path in left} == left

    assert list(cache.entries()) == []
    assert cache.get_or_compute(stage(), write_two).file("a.bin").read_bytes() == bytes(range(256))
    assert cache.computed == 2
    assert len(list((tmp_path / "damaged").iterdir())) == 1


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_what_is_no_folder_in_an_entry_s_place_is_set_aside(tmp_path: Path, what: str) -> None:
    place = tmp_path / "full" / stage().key[:16]
    place.parent.mkdir()
    if what == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "gone")
    cache = StageCache(tmp_path)
    assert cache.get_or_compute(stage(), write_two).file("a.bin").is_file()
    assert cache.find(stage()) is not None
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_verify_names_the_damage_and_moves_nothing(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    entry = cache.get_or_compute(stage(), write_two)
    assert cache.verify(entry) is None
    flip(entry)
    assert "a.bin" in str(cache.verify(entry))
    assert cache.folder(stage()).is_dir()


def test_an_entry_of_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    entry = cache.get_or_compute(stage(), write_two)
    change_manifest(format_version=99)(entry)
    with pytest.raises(DeftxError, match=r"cache format 99.*reads up to 2"):
        cache.find(stage())
    assert list(cache.entries()) == []
    assert entry.file("a.bin").exists()


@pytest.mark.parametrize(
    ("compute", "text"),
    [
        (lambda workspace: None, "wrote no file"),
        (lambda workspace: (workspace.out / "manifest.json").write_text("{}"), "cannot be published"),
        (lambda workspace: (workspace.out / "link").symlink_to("/etc/hostname"), "cannot be published"),
    ],
)
def test_results_that_cannot_be_published(tmp_path: Path, compute: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        StageCache(tmp_path).get_or_compute(stage(), compute)
    assert names(tmp_path / "full") == []


# ----------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), DeftxError("NaN loss")])
def test_a_failed_stage_keeps_its_scratch_and_publishes_nothing(tmp_path: Path, error: BaseException) -> None:
    cache = StageCache(tmp_path)
    seen: list[list[str]] = []

    def compute(workspace: Workspace) -> None:
        seen.append(names(workspace.scratch))
        assert names(workspace.out) == []
        (workspace.out / "a").write_text("half")
        (workspace.scratch / "last.ckpt").write_text("step 10")
        if len(seen) == 1:
            raise error

    with pytest.raises(type(error)) as caught:
        cache.get_or_compute(stage(), compute)
    assert caught.value is error
    assert names(tmp_path / "full") == []
    assert cache.events == []
    cache.get_or_compute(stage(), compute)
    assert seen == [[], ["last.ckpt"]]
    assert names(tmp_path / "scratch") == []


def test_scratch_is_one_place_for_one_key(tmp_path: Path) -> None:
    places: list[Path] = []

    def compute(workspace: Workspace) -> None:
        places.append(workspace.scratch)
        raise RuntimeError

    for asked in (stage(), stage(label="x"), stage(seed=9)):
        with pytest.raises(RuntimeError):
            StageCache(tmp_path).get_or_compute(asked, compute)
    assert places[0] == places[1] != places[2]


def test_a_full_disk_while_computing(tmp_path: Path) -> None:
    def compute(workspace: Workspace) -> None:
        (workspace.out / "a").write_text("x")
        Path("/dev/full").write_text("x")

    with pytest.raises(DeftxError, match=r"No space left on device.*GiB free.*another folder") as caught:
        StageCache(tmp_path).get_or_compute(stage(), compute)
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path / "full") == []


def test_a_full_disk_reported_by_a_library(tmp_path: Path) -> None:
    def compute(workspace: Workspace) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(DeftxError, match="No space left"):
        StageCache(tmp_path).get_or_compute(stage(), compute)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EDQUOT),
        ("mkdir", errno.ENOSPC),
        ("mkdir", errno.EROFS),
        ("mkdir", errno.EACCES),
        ("rename", errno.ENOSPC),
        ("rename", errno.EACCES),
    ],
)
def test_a_disk_that_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def refuse(path: Any, *_: Any, **__: Any) -> None:
        # write(2) and fsync(2) name no file in their errors, and only fail for lack of space or quota.
        raise OSError(code, os.strerror(code), *([str(path)] if call != "fsync" else []))

    owner = os if call == "fsync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, refuse)
        with pytest.raises(DeftxError, match=os.strerror(code)):
            StageCache(tmp_path / "root").get_or_compute(stage(), write_two)
    assert names(tmp_path / "root" / "full") == []
    assert StageCache(tmp_path / "root").get_or_compute(stage(), write_two).size == 257


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeftxError, match="Not a directory"):
        StageCache(tmp_path / "file" / "root").get_or_compute(stage(), write_two)


def test_the_users_own_missing_permission_is_not_the_caches(tmp_path: Path) -> None:
    def compute(workspace: Workspace) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else.txt")

    with pytest.raises(PermissionError):
        StageCache(tmp_path).get_or_compute(stage(), compute)


# --------------------------------------------------------------------------------------------- many processes


def test_publishing_twice_keeps_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without any lock: another process publishes the same key while this one computes."""

    def compute(workspace: Workspace) -> None:
        StageCache(tmp_path, lock="none").get_or_compute(stage(), write_two)
        workspace.scratch.mkdir(exist_ok=True)
        (workspace.out / "a.bin").write_bytes(b"different")

    entry = StageCache(tmp_path).get_or_compute(stage(), compute)
    assert entry.file("sub/b.txt").read_text() == "b"
    assert "different bytes" in caplog.text
    assert names(tmp_path / "full") == [
        entry.path.name,
        *(f"{entry.path.name}/{name}" for name in ["a.bin", "manifest.json", "sub", "sub/b.txt"]),
    ]


def test_what_took_a_damaged_entry_s_place_meanwhile_is_left_there(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    entry = cache.get_or_compute(stage(), write_two)
    judged = deftx.cache.verify.identity(entry.path)
    entry.path.rename(tmp_path / "gone")  # pruned, and published anew by another process
    StageCache(tmp_path).get_or_compute(stage(), write_two)
    assert deftx.cache.verify.set_aside(tmp_path, entry.path, "damaged", judged) is None
    assert cache.find(stage()) is not None
    assert names(tmp_path / "damaged") == []


def test_publishing_over_a_damaged_entry_replaces_it(tmp_path: Path) -> None:
    def compute(workspace: Workspace) -> None:
        folder = tmp_path / "full" / stage().key[:16]
        folder.mkdir()
        (folder / "manifest.json").write_text("{")
        write_two(workspace)

    assert StageCache(tmp_path).get_or_compute(stage(), compute).size == 257
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_the_others_wait_for_the_one_that_computes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    working = threading.Event()

    def compute(workspace: Workspace) -> None:
        working.set()
        time.sleep(0.6)
        write_two(workspace)

    first = threading.Thread(target=lambda: StageCache(tmp_path).get_or_compute(stage(), compute))
    first.start()
    assert working.wait(5)
    cache = StageCache(tmp_path)
    assert cache.get_or_compute(stage(), never).size == 257
    first.join()
    assert cache.hits == 1
    assert "waiting" in caplog.text


CHILD = """
import os, sys, time
from pathlib import Path
from deftx.cache import Stage, StageCache
root, mode = Path(sys.argv[1]), sys.argv[2]
def compute(workspace):
    (workspace.out / "who").write_text(str(os.getpid()))
    (workspace.scratch / "last.ckpt").write_text("step 10")
    if mode == "hang":
        print("working", flush=True)
        time.sleep(60)
    with (root.parent / "computed.txt").open("a") as file:
        file.write("x")
    time.sleep(0.2)
entry = StageCache(root).get_or_compute(Stage("full", 1, {"a": 1}), compute)
print(entry.file("who").read_text())
"""


def child(root: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(root), mode], stdout=subprocess.PIPE, text=True)


def test_processes_started_at_once_compute_once(tmp_path: Path) -> None:
    children = [child(tmp_path / "root", "run") for _ in range(4)]
    answers = {process.communicate(timeout=30)[0] for process in children}
    assert len(answers) == 1
    assert answers != {""}
    assert (tmp_path / "computed.txt").read_text() == "x"


def test_a_killed_process_leaves_its_scratch_and_no_entry(tmp_path: Path) -> None:
    root = tmp_path / "root"
    killed = child(root, "hang")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "working\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    (leftover,) = (root / "full").iterdir()
    assert leftover.name.startswith(".")
    cache = StageCache(root)
    asked = Stage("full", 1, {"a": 1})
    assert list(cache.entries()) == []
    assert cache.find(asked) is None
    seen: list[str] = []

    def compute(workspace: Workspace) -> None:
        seen.extend(names(workspace.scratch))
        write_two(workspace)

    started = time.perf_counter()
    cache.get_or_compute(asked, compute)
    assert time.perf_counter() - started < 5, "the dead holder's lock was waited for"
    assert seen == ["last.ckpt"]
    assert [path.name for path in (root / "full").iterdir()] == [asked.key[:16]]


def test_leftovers_of_the_living_and_of_other_hosts_stay(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    kept = [
        folder / f".{stage().key[:16]}.{host_id()}.{os.getpid()}.00.tmp",
        folder / f".{stage().key[:16]}.otherhst.999999.00.tmp",
    ]
    for path in kept:
        path.mkdir(parents=True)
    StageCache(tmp_path).get_or_compute(stage(), write_two)
    assert all(path.is_dir() for path in kept)
    assert len(list(StageCache(tmp_path).entries())) == 1


def test_importing_is_light() -> None:
    code = "import sys, deftx.cache; print({'torch', 'filelock', 'wandb', 'rich'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_provenance_is_asked_for_when_something_is_computed_and_once(tmp_path: Path) -> None:
    asked = []

    def provenance() -> dict[str, int]:
        asked.append(1)
        return {"threads": 2}

    stages = [Stage(kind="full", version=number, settings={}) for number in (1, 2)]
    cache = StageCache(tmp_path, provenance=provenance)
    entries = [cache.get_or_compute(stage, lambda work: (work.out / "x").write_text("x") and None) for stage in stages]
    assert [entry.manifest["provenance"] for entry in entries] == [{"threads": 2}] * 2
    assert len(asked) == 1
    again = StageCache(tmp_path, provenance=provenance)
    for stage in stages:
        again.get_or_compute(stage, lambda _: pytest.fail("computed again"))
    assert len(asked) == 1


# ------------------------------------------------------------------------------------------------------ what it is from


def put(cache: StageCache, kind: str, text: str, timing: str = "", **inputs: Entry) -> Entry:
    """A result that says ``text``, and in another file how it was made; made from ``inputs``."""

    def compute(work: Workspace) -> None:
        work.inputs.update(inputs)
        (work.out / "result.txt").write_text(text)
        (work.out / "timing.txt").write_text(timing)

    keys = {name: entry.key for name, entry in inputs.items()}
    return cache.get_or_compute(stage(kind=kind, label=kind, inputs=keys, product=("result.txt",)), compute)


def prune(entry: Entry) -> None:
    for path in entry.path.iterdir():
        path.unlink()
    entry.path.rmdir()


def test_a_result_is_not_used_once_what_it_was_made_from_has_other_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = StageCache(tmp_path)
    full = put(cache, "full", "one")
    mask = put(cache, "select", "of one", full=full)
    sft = put(cache, "sparse", "of one", select=mask)
    assert [item.kind for item in sft.ancestors] == ["full", "select"]
    # Pruned, what stands on it is still what it was; made again with the same bits, too, however long it took.
    prune(full)
    assert put(cache, "sparse", "never", select=mask).digest == sft.digest
    again = put(cache, "full", "one", timing="slower")
    assert again.digest == full.digest
    assert put(cache, "sparse", "never", select=mask).digest == sft.digest
    # With other bits nothing of it is used: not the mask, not the SFT, even where the mask has gone.
    prune(again)
    prune(mask)
    other = put(cache, "full", "two")
    assert cache.peek(stage(kind="sparse", inputs={"select": mask.key})) is None
    assert sft.path.exists(), "a look moves nothing"
    made = put(cache, "sparse", "of two", select=put(cache, "select", "of two", full=other))
    assert (made.path / "result.txt").read_text() == "of two"
    assert "outdated (full full, which it was made from, was made again with other bits)" in caplog.text


def test_results_made_from_different_bits_of_a_pruned_one_do_not_meet(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    first = put(cache, "full", "one")
    task = put(cache, "sparse", "of one", full=first)
    prune(first)
    second = put(cache, "full", "two")
    language = put(cache, "direct", "of two", full=second)
    prune(second)
    assert cache.find(stage(kind="sparse", inputs={"full": first.key})) is not None
    assert cache.agree({"language": language})
    assert not cache.agree({"task": task, "language": language})
    # The older of the two went, so that it is made again from what the other was made from.
    assert [entry.kind for entry in cache.entries()] == ["direct"]


def test_a_manifest_tells_what_its_ancestors_were_computed_with(tmp_path: Path) -> None:
    full = put(StageCache(tmp_path, provenance={"threads": 1}), "full", "one")
    later = StageCache(tmp_path, provenance={"threads": 2})
    sft = put(later, "sparse", "of one", full=full)
    assert {item.kind: item.provenance for item in sft.lineage} == {"full": {"threads": 1}, "sparse": {"threads": 2}}
    prune(full)
    known = later.find(stage(kind="sparse", inputs={"full": full.key}))
    assert known is not None
    assert [item.provenance for item in known.lineage] == [{"threads": 2}, {"threads": 1}]


def test_the_seconds_of_a_result_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("deftx.cache.store.time.perf_counter", lambda: clock[0])
    cache = StageCache(tmp_path)

    def inner(workspace: Workspace) -> None:
        clock[0] += 100
        write_two(workspace)

    def outer(workspace: Workspace) -> None:
        cache.get_or_compute(stage(label="inner", seed=1), inner)
        clock[0] += 2
        write_two(workspace)

    entries = [cache.get_or_compute(stage(), outer), cache.get_or_compute(stage(label="inner", seed=1), never)]
    assert [entry.manifest["seconds"] for entry in entries] == [2, 100]


@pytest.mark.parametrize("odd", [{"provenance": [1]}, {"provenance": {"versions": 5}}, {"provenances": "x"}])
def test_a_manifest_with_odd_provenance_is_damaged(tmp_path: Path, odd: dict[str, Any]) -> None:
    cache = StageCache(tmp_path)
    full = put(cache, "full", "one")
    sft = put(cache, "sparse", "of one", full=full)
    path = sft.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    assert cache.find(stage(kind="sparse", inputs={"full": full.key})) is None
    assert not sft.path.exists()
