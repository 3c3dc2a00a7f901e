"""``deftx cache``: what it lists and explains, what it finds damaged, and what pruning takes and leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deftx.cache.maintenance
import deftx.cache.processes
from deftx.cache import Entry, Stage, StageCache, Workspace
from deftx.cache.commands import parse_age, parse_size
from deftx.cache.locks import lock_stage
from deftx.cache.maintenance import Filter, last_used, leftovers_of, prunable, remove
from deftx.cache.processes import in_use
from deftx.cache.scratch import claim_scratch
from deftx.cli import main
from deftx.errors import DeftxError
from deftx.processes import Process

DAY = 86400.0
FULL = Stage("full", 1, {"training": {"lr": 1e-3, "max_steps": None}}, seed=3, label="language ace")
SELECT = Stage("select", 1, {"rank": "4"}, inputs={"full": FULL.key}, label="language ace")
SPARSE = Stage("sparse", 1, {}, inputs={"select": SELECT.key, "base": "f" * 64}, seed=3, label="language ace K=9")
EVALUATE = Stage("evaluate", 1, {}, inputs={}, label="ace deftx")


def sized(size: int, name: str = "a.bin") -> object:
    def compute(workspace: Workspace) -> None:
        path = workspace.out / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
        workspace.notes["lines"] = 7

    return compute


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache that other processes filled, the entries 1, 2, 3 and 4 days ago."""
    made = tmp_path / "root"
    cache = StageCache(made, provenance={"python": "3"})
    cache.get_or_compute(FULL, sized(5000))
    cache.get_or_compute(SELECT, sized(300))
    cache.get_or_compute(SPARSE, sized(2000, "sft/sft.safetensors"))
    sft = next(entry for entry in cache.entries() if entry.kind == "sparse")
    sha = sft.manifest["files"]["sft/sft.safetensors"]["sha256"]
    cache.get_or_compute(Stage("evaluate", 1, {}, inputs={"task": sha}, label="ace deftx"), sized(10))
    age(made, full=4, select=3, sparse=2, evaluate=1)
    forget_uses(made)
    return made


def age(root: Path, **days: float) -> None:
    for kind, count in days.items():
        (manifest,) = (root / kind).glob("*/manifest.json")
        os.utime(manifest, (time.time() - count * DAY,) * 2)


def forget_uses(root: Path) -> None:
    """As if this process had not used the entries."""
    for path in (root / "locks").glob("*.used"):
        path.unlink()
    deftx.cache.processes._RECORDS._names.pop(root / "locks" / f"{Process.this().text}.used", None)


class Answer:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def cache_command(root: Path, capsys: pytest.CaptureFixture[str]) -> object:
    def run(*arguments: str, cache: Path | None = root) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["cache", *arguments, *(["--cache", str(cache)] if cache else [])])
        streams = capsys.readouterr()
        return Answer(int(stop.value.code or 0), streams.out, streams.err)

    return run


def kinds(root: Path) -> list[str]:
    return sorted(entry.kind for entry in StageCache(root).entries())


# ------------------------------------------------------------------------------------------------------------ ls


def rows(out: str) -> list[list[str]]:
    """Cells of the listing's lines."""
    return [re.split(r"\s{2,}", line.strip()) for line in out.split("\n\n")[0].splitlines()[1:]]


def test_ls_shows_each_result_and_sums_by_kind(cache_command: object) -> None:
    answer = cache_command("ls")
    assert answer.status == 0
    assert [row[:4] for row in rows(answer.out)][1:] == [
        ["full", "language ace", FULL.key[:16], "4.9 KiB"],
        ["select", "language ace", SELECT.key[:16], "300 B"],
        ["sparse", "language ace K=9", SPARSE.key[:16], "2.0 KiB"],
    ]
    assert [row[5] for row in rows(answer.out)] == ["24 h", "4 d", "3 d", "2 d"]
    totals = [line.split() for line in answer.out.split("\n\n")[1].splitlines()]
    assert ["full", "1", "4.9", "KiB", "0.0"] in totals
    assert ["total", "4", "7.1", "KiB", "0.0"] in totals


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (["--sort", "size"], ["full", "sparse", "select", "evaluate"]),
        (["--sort", "used"], ["full", "select", "sparse", "evaluate"]),
        (["--sort", "kind"], ["evaluate", "full", "select", "sparse"]),
        (["--kind", "sparse", "--kind", "full"], ["full", "sparse"]),
        (["--kind", "sparse,full", "--sort", "size"], ["full", "sparse"]),
    ],
)
def test_ls_sorts_and_filters(cache_command: object, arguments: list[str], order: list[str]) -> None:
    assert [row[0] for row in rows(cache_command("ls", *arguments).out)] == order


def test_a_hit_is_a_use(root: Path) -> None:
    cache = StageCache(root)
    entry = next(found for found in cache.entries() if found.kind == "full")
    assert time.time() - last_used(entry) > 3.9 * DAY
    cache.find(FULL)
    assert time.time() - last_used(entry) < 60
    assert cache.verify(entry) is None


def test_ls_of_an_empty_cache(cache_command: object, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    answer = cache_command("ls", cache=tmp_path / "empty")
    assert (answer.status, answer.out) == (0, f"0 entries in {tmp_path / 'empty'}\n")


# ---------------------------------------------------------------------------------------------------------- info


def test_info_tells_a_manifest_and_follows_its_inputs(cache_command: object, root: Path) -> None:
    out = cache_command("info", SPARSE.key[:7]).out
    assert re.search(r"^stage +sparse language ace K=9$", out, re.MULTILINE)
    assert f"key        {SPARSE.key}" in out
    assert re.search(rf"^  select +{SELECT.key[:16]}  select language ace$", out, re.MULTILINE)
    assert re.search(r"^  base +f{16}  \(no entry here", out, re.MULTILINE)
    assert re.search(r"^  sft/sft.safetensors +2\.0 KiB$", out, re.MULTILINE)
    assert re.search(r"input of\n  evaluate  [0-9a-f]{16}  ace deftx\n", out), "an SFT is an input by its sha256"
    assert "  lines  7" in out
    assert str(root / "sparse" / SPARSE.key[:16]) in out
    full = cache_command("info", f"full/{FULL.key[:4]}").out
    assert "  training.lr         0.001" in full
    assert "  training.max_steps  null" in full


def test_info_says_who_uses_an_entry(cache_command: object, root: Path) -> None:
    assert "in use by" not in cache_command("info", FULL.key).out
    StageCache(root).find(FULL)
    assert f"in use by  process {os.getpid()}" in cache_command("info", FULL.key).out


def test_info_of_a_prefix_that_fits_none_or_several(cache_command: object, root: Path) -> None:
    answer = cache_command("info", "xyz")
    assert answer.status == 1
    assert "no entry has a key that starts with 'xyz'" in answer.err
    for number in range(20):
        StageCache(root).get_or_compute(Stage("corpus", 1, {"n": number}, label=f"text {number}"), sized(1))
    digits = [path.name[0] for path in (root / "corpus").iterdir()]
    double = next(digit for digit in digits if digits.count(digit) > 1)
    answer = cache_command("info", f"corpus/{double}")
    assert answer.status == 1
    assert re.search(rf"\d+ keys start with 'corpus/{double}': corpus/{double}[0-9a-f]+ \(text \d+\), ", answer.err)


# -------------------------------------------------------------------------------------------------------- verify


def damage(root: Path, kind: str) -> Path:
    (file,) = (root / kind).glob("*/a.bin")
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    return file.parent


def test_verify_reads_everything_and_moves_nothing_unasked(cache_command: object, root: Path) -> None:
    answer = cache_command("verify")
    assert (answer.status, answer.err) == (0, "")
    assert "4 entries verified (7.1 KiB), 0 damaged" in answer.out
    folder = damage(root, "full")
    (manifest,) = (root / "select").glob("*/manifest.json")
    manifest.write_text(manifest.read_text()[:100])
    (root / "evaluate").rename(root / "renamed")
    answer = cache_command("verify")
    assert answer.status == 1
    assert f"damaged: full/{folder.name}: the sha256 of a.bin differs" in answer.out
    assert f"damaged: select/{SELECT.key[:16]}: manifest.json is missing or broken" in answer.out
    assert "damaged: renamed/" in answer.out
    assert "4 entries verified" in answer.out
    assert folder.is_dir()
    assert not (root / "damaged").exists()
    assert cache_command("verify", "--kind", "sparse").status == 0


def test_verify_sets_aside_when_asked(cache_command: object, root: Path) -> None:
    damage(root, "full")
    answer = cache_command("verify", "--set-aside")
    assert answer.status == 1
    assert re.search(r"sha256 of a\.bin differs; set aside as .*/damaged/full-", answer.out)
    assert "damaged: 1 (" in answer.out
    assert kinds(root) == ["evaluate", "select", "sparse"]
    again = cache_command("verify")
    assert again.status == 0
    assert "3 entries verified" in again.out


# --------------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--kind", "full"], ["evaluate", "select", "sparse"]),
        (["--older-than", "60h"], ["evaluate", "sparse"]),
        (["--larger-than", "1K"], ["evaluate", "select"]),
        (["--larger-than", "1K", "--older-than", "3d"], ["evaluate", "select", "sparse"]),
        (["--kind", "full,select", "--older-than", "80h"], ["evaluate", "select", "sparse"]),
        (["--older-than", "0d"], []),
        (["--older-than", "1w"], ["evaluate", "full", "select", "sparse"]),
        (["--damaged", "--leftovers"], ["evaluate", "full", "select", "sparse"]),
        (["--leftovers", "--older-than", "0d"], ["evaluate", "full", "select", "sparse"]),
        (["--leftovers", "--kind", "full"], ["evaluate", "select", "sparse"]),
    ],
)
def test_prune_takes_what_is_meant_and_a_dry_run_says_the_same(
    cache_command: object, root: Path, arguments: list[str], left: list[str]
) -> None:
    before = kinds(root)
    dry = cache_command("prune", *arguments, "--dry-run")
    assert kinds(root) == before
    done = cache_command("prune", *arguments)
    assert kinds(root) == left
    assert (dry.status, done.status) == (0, 0)
    told = [set(re.findall(r": (\w+) .*\[([0-9a-f]{16})\]", answer.out)) for answer in (dry, done)]
    assert told[0] == told[1]
    assert len(told[0]) == len(before) - len(left)
    sizes = [re.search(r", ([\d.]+ \w+)(, nothing was removed| freed)$", text.out.strip())[1] for text in (dry, done)]
    assert sizes[0] == sizes[1]
    assert not [path for path in root.rglob("*.tmp")]


def test_prune_leaves_what_a_process_uses_or_computes(cache_command: object, root: Path) -> None:
    StageCache(root).find(FULL)
    with lock_stage(root, f"select-{SELECT.key[:16]}", "x", "auto", published=lambda: None, explain=lambda _: None):
        answer = cache_command("prune", "--older-than", "0d")
    assert kinds(root) == ["full", "select"]
    assert f"[{FULL.key[:16]}]  process {os.getpid()} uses it" in answer.out
    assert f"[{SELECT.key[:16]}]  it is being computed" in answer.out
    assert "2 removed" in answer.out


READER = """
import sys, time
from deftx.cache import Stage, StageCache
entry = next(iter(StageCache(sys.argv[1]).entries()))
stage = Stage(entry.kind, 1, entry.manifest["settings"], inputs=entry.manifest["inputs"], seed=entry.manifest["seed"])
assert StageCache(sys.argv[1]).find(stage)
print(entry.kind, flush=True)
time.sleep(60)
"""


def test_a_use_ends_with_its_process_however_that_ends(root: Path) -> None:
    reader = subprocess.Popen([sys.executable, "-c", READER, str(root)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    kind = reader.stdout.readline().strip()
    entries = list(StageCache(root).entries())
    _, kept = prunable(root, entries, Filter(kinds=(kind,)))
    assert [reason for _, reason in kept] == [f"process {reader.pid} uses it"]
    reader.kill()
    reader.communicate()
    go, kept = prunable(root, entries, Filter(kinds=(kind,)))
    assert [entry.kind for entry in go] == [kind]
    assert not kept
    assert not list((root / "locks").glob("*.used"))


@pytest.mark.parametrize(("minutes", "alive"), [(5, True), (15, False)])
def test_a_process_of_another_host_uses_an_entry_as_long_as_it_says_so(root: Path, minutes: float, alive: bool) -> None:
    record = root / "locks" / "00000000-12-34.used"
    record.write_text(f"full/{FULL.key[:16]}\n")
    os.utime(record, (time.time() - 60 * minutes,) * 2)
    expected = {f"full/{FULL.key[:16]}": Process("0" * 8, 12, 34)} if alive else {}
    assert in_use(root) == expected
    assert record.exists() == alive


def test_an_entry_taken_up_while_it_is_pruned_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(found for found in StageCache(root).entries() if found.kind == "full")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == entry.path:
            StageCache(root).find(FULL)  # another process, just before it goes
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert not remove(root, entry)
    assert StageCache(root).find(FULL) is not None
    assert [path.name for path in (root / "full").iterdir()] == [FULL.key[:16]]


def test_pruning_shows_readers_all_or_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(found for found in StageCache(root).entries() if found.kind == "full")
    seen: list[Entry | None] = []

    def rmtree(*_: object, **__: object) -> None:
        seen.append(StageCache(root).find(FULL))
        assert "full" not in kinds(root)

    monkeypatch.setattr(deftx.cache.maintenance.shutil, "rmtree", rmtree)
    assert remove(root, entry)
    assert seen == [None]


@pytest.mark.parametrize(
    ("owner", "alive"),
    [
        (Process.this().text, True),
        (Process.this()._replace(start=1).text, False),
        (f"{Process.this().host}.{os.getpid()}", True),
        ("0000aaaa-12-34", True),
        ("0000aaaa.12", True),
        ("0000aaaa-12-35", False),
        ("0000bbbb-12-34", False),
    ],
    ids=[
        "this process",
        "one whose id this process was given",
        "as older versions wrote names",
        "another host that renews its record",
        "another host, as older versions wrote it",
        "another host's other process",
        "another host that renews nothing",
    ],
)
@pytest.mark.parametrize("folder", ["full", "scratch"])
def test_a_leftover_belongs_to_the_process_in_its_name(root: Path, owner: str, alive: bool, folder: str) -> None:
    for name, minutes in (("0000aaaa-12-34", 5), ("0000bbbb-12-34", 15)):
        record = root / "locks" / f"{name}.used"
        record.write_text(f"full/{FULL.key[:16]}\n")
        os.utime(record, (time.time() - 60 * minutes,) * 2)
    name = f"full-{FULL.key[:16]}.{owner}.00" if folder == "scratch" else f".{FULL.key[:16]}.{owner}.00.tmp"
    (root / folder / name).mkdir()
    (residue,) = (item for item in leftovers_of(root) if item.path.name == name)
    assert (residue.running is not None) == alive


def test_prune_removes_leftovers_that_nobody_owns(cache_command: object, root: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    this = Process.this()
    for pid in (dead.pid, this.pid):
        (root / "full" / f".{FULL.key[:16]}.{this.host}.{pid}.00.tmp").mkdir()
    (root / "full" / f".{FULL.key[:16]}.00000000.12.00.tmp").mkdir()  # of another host that renews nothing
    running = claim_scratch(root, SELECT, locked=True, leased=True)
    ended = claim_scratch(root, FULL, locked=True, leased=True)
    for scratch in (running, ended):
        (scratch.path / "last.ckpt").write_bytes(b"x" * 100)
    ended.release()
    (root / "scratch" / "tokens").mkdir()
    for name, days in (("old.arrow", 3.0), ("new.arrow", 0.0)):
        file = root / "scratch" / "tokens" / name
        file.write_bytes(b"x" * 10)
        os.utime(file, (time.time() - days * DAY,) * 2)
    damage(root, "full")
    cache_command("verify", "--set-aside")
    assert len(leftovers_of(root)) == 8

    shown = cache_command("prune", "--leftovers", "--dry-run").out
    assert len(leftovers_of(root)) == 8
    done = cache_command("prune", "--leftovers").out
    assert [line.split(":", 1)[1] for line in done.splitlines()[:-1]] == [
        line.split(":", 1)[1] for line in shown.splitlines()[:-1]
    ]
    assert {(item.sort, item.running) for item in leftovers_of(root)} == {
        ("damaged", None),
        ("checkpoints", this),
        ("temporary", this._replace(start=0)),
        ("tokens", None),
    }
    assert (root / "scratch" / "tokens" / "new.arrow").exists()
    assert not list((root / "scratch").glob(f"{ended.name}*")), "its claim goes with it"
    assert not running.lost
    assert kinds(root) == ["evaluate", "select", "sparse"]
    cache_command("prune", "--damaged")
    assert not list((root / "damaged").iterdir())


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lss"], "unknown command 'lss'; did you mean 'ls'?; available: ls, info, verify, prune"),
        (["info"], "deftx cache info: the following arguments are required: KEY"),
        (["ls", "--sort", "weight"], "invalid choice: 'weight'"),
        (["ls", "--kind", "fulll"], "--kind fulll: the cache has evaluate, full, select, sparse; did you mean 'full'?"),
        (["prune"], "say what may go: --older-than AGE"),
        (["prune", "--dry-run"], "say what may go: --older-than AGE"),
        (["prune", "--older-than", "30"], "--older-than 30: an age is a number with m, h, d or w"),
        (["prune", "--older-than", "-3d"], "--older-than"),
        (["prune", "--larger-than", "big"], "--larger-than big: a size is a number with K, M, G or T"),
        (["verify", "--fix"], "unrecognized arguments: --fix"),
    ],
)
def test_a_mistake_is_one_message(cache_command: object, root: Path, arguments: list[str], message: str) -> None:
    before = kinds(root)
    answer = cache_command(*arguments)
    assert answer.status == 1
    assert answer.out == ""
    assert answer.err.startswith("deftx: error: ")
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1
    assert kinds(root) == before


def test_no_cache_there(cache_command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"no stage cache at {tmp_path / 'gone'}" in cache_command("ls", cache=tmp_path / "gone").err
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"DEFTX_CACHE": "mine", "XDG_CACHE_HOME": "xdg"}, "mine"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/deftx"),
        ({}, "home/.cache/deftx"),
    ],
)
def test_the_folder_is_the_one_that_runs_use(
    cache_command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    from hydra import compose

    from deftx.config import hydra_session

    for name in ("DEFTX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **variables}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert f"no stage cache at {tmp_path / place};" in cache_command("ls", cache=None).err
    with hydra_session():
        assert compose("run").paths.cache == str(tmp_path / place)


@pytest.mark.parametrize(("text", "seconds"), [("45m", 2700), ("12h", 43200), ("1.5d", 129600), ("2w", 1209600)])
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("10", 10), ("1k", 1024), ("500M", 500 << 20), ("1.5GiB", 3 << 29), ("2TB", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "d", "3", "3y", "-1d", "1d2h"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(DeftxError, match="an age is a number"):
        parse_age(text)


# ---------------------------------------------------------------------------------------------------------- help


def test_help_is_light_and_names_every_option() -> None:
    code = (
        "import sys\nfrom deftx.cli import main\ntry:\n    main(['cache', '--help'])\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'hydra', 'omegaconf', 'rich', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for name in ("ls", "info", "verify", "prune"):
        one = subprocess.run([sys.executable, "-m", "deftx", "cache", name, "-h"], capture_output=True, text=True)
        assert one.returncode == 0
        for option in set(re.findall(r"--[a-z-]+", one.stdout)) - {"--help"}:
            assert option in done.stdout
