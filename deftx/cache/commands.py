"""``deftx cache``: list, explain, verify and prune the results of stages.

Each command is a thin layer over ``maintenance``; what it prints goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deftx.cache.entry import Entry
from deftx.cache.maintenance import (
    DAY,
    Filter,
    Leftover,
    all_folders,
    check_all,
    find_entry,
    last_used,
    leftovers_of,
    prunable,
    remove,
)
from deftx.cache.processes import in_use
from deftx.cache.store import StageCache
from deftx.cache.verify import DamageError, load, set_aside
from deftx.errors import DeftxError, did_you_mean
from deftx.folders import cache_root
from deftx.units import size_text, time_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["parse_age", "parse_size", "run"]

AGES = {"m": 60.0, "h": 3600.0, "d": DAY, "w": 7 * DAY}
SIZES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
COMMANDS = ("ls", "info", "verify", "prune")
EXAMPLES = """\
options of the commands (deftx cache COMMAND --help says more); all take --cache FOLDER
  ls      --kind KIND  --sort age|kind|seconds|size|used
  info    KEY
  verify  --kind KIND  --set-aside
  prune   --older-than AGE  --larger-than SIZE  --kind KIND  --damaged  --leftovers  --dry-run
          What meets all of age, size and kind goes. --damaged and --leftovers go by themselves: results are then
          left alone unless --larger-than or --kind is given, too, and --older-than is their age.

examples
  deftx cache ls --sort size                            the largest first
  deftx cache info 3f9c                                 what a key stands for, from its first digits
  deftx cache verify --set-aside                        every checksum; damaged entries are moved to damaged/
  deftx cache prune --kind full --older-than 30d --dry-run   full-phase changes are the large ones
  deftx cache prune --leftovers --damaged               checkpoints of stages that no process computes, damaged entries

ages are times since the last use: 45m, 12h, 30d, 2w. Sizes: 500M, 1.5G (powers of 1024).
A finished SFT needs none of its earlier stages; what was pruned is computed again when it is asked for.
"""
SORTS: dict[str, Callable[[Entry], Any]] = {
    "kind": lambda entry: (entry.kind, entry.label, entry.key),
    "size": lambda entry: -entry.size,
    "age": lambda entry: str(entry.manifest["created"]),
    "used": last_used,
    "seconds": lambda entry: -_seconds(entry),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DeftxError(f"{self.prog}: {message}; {self.prog} --help shows what there is")


def _parser() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument("--cache", metavar="FOLDER", help="the cache (default: DEFTX_CACHE, else ~/.cache/deftx)")
    parser = _Parser(
        prog="deftx cache",
        description="The stage cache: what is in it, whether it is intact, and making room.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="{ls,info,verify,prune}", parser_class=_Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    ls = add("ls", "list the results: kind, label, key, size, age, last use, seconds")
    ls.add_argument("--sort", choices=sorted(SORTS), default="kind", help="order (default: kind)")
    info = add("info", "say what a key stands for: settings, inputs, files, who uses it")
    info.add_argument("key", metavar="KEY", help="first digits of the key, or kind/digits")
    verify = add("verify", "read every file and compare size and sha256; exits with 1 when something is damaged")
    verify.add_argument("--set-aside", action="store_true", help="move damaged entries to damaged/")
    prune = add("prune", "remove results that nothing uses, by age, size and kind; acts at once without --dry-run")
    prune.add_argument("--older-than", metavar="AGE", help="not used for so long: 45m, 12h, 30d, 2w")
    prune.add_argument("--larger-than", metavar="SIZE", help="at least so large: 500M, 1.5G")
    for command in (ls, verify, prune):
        command.add_argument(
            "--kind", help="only this kind; may be repeated", action="append", default=[], metavar="KIND"
        )
    prune.add_argument("--damaged", action="store_true", help="entries that were set aside as damaged")
    prune.add_argument(
        "--leftovers", action="store_true", help="checkpoints and temporary folders that no running process owns"
    )
    prune.add_argument("--dry-run", action="store_true", help="only show what would go")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run ``deftx cache``.

    Args:
        arguments: what follows ``cache`` on the command line.

    Returns:
        The exit status.

    Raises:
        DeftxError: a mistake in the arguments, or no cache there.
    """
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        guess = did_you_mean(arguments[0], COMMANDS)
        raise DeftxError(f"deftx cache: unknown command {arguments[0]!r}{guess}; available: {', '.join(COMMANDS)}")
    try:
        options = parser.parse_args(list(arguments))
    except SystemExit as end:  # --help
        return int(end.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    cache = StageCache(_root(options.cache))
    if not cache.root.is_dir():
        raise DeftxError(f"no stage cache at {cache.root}; a run makes one there, or give --cache FOLDER")
    try:
        return {"ls": _ls, "info": _info, "verify": _verify, "prune": _prune}[options.command](cache, options)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise DeftxError(f"cannot read the stage cache {cache.root}: {error.strerror or error}") from error


def _root(root: str | None) -> Path:
    """Return the folder as conf/run.yaml's ``paths.cache`` has it."""
    found = cache_root() if root is None else root
    if not found.strip():
        raise DeftxError(
            "there is no home folder to look for a stage cache in; give --cache FOLDER or DEFTX_CACHE=FOLDER"
        )
    return Path(found)


def parse_age(text: str) -> float:
    """Return the seconds of ``45m``, ``12h``, ``30d`` or ``2w``.

    Raises:
        DeftxError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if match is None:
        raise DeftxError(f"--older-than {text}: an age is a number with m, h, d or w, such as 12h or 30d")
    return float(match[1]) * AGES[match[2]]


def parse_size(text: str) -> int:
    """Return the bytes of ``500M``, ``1.5G``, ``2GiB`` or a plain number.

    Raises:
        DeftxError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise DeftxError(f"--larger-than {text}: a size is a number with K, M, G or T, such as 500M or 1.5G")
    return int(float(match[1]) * 1024 ** SIZES[match[2].upper()])


def _kinds(cache: StageCache, texts: Sequence[str]) -> tuple[str, ...]:
    kinds = tuple(kind for text in texts for kind in text.split(","))
    available = sorted({folder.parent.name for folder in all_folders(cache.root)})
    for kind in kinds:
        if kind not in available:
            raise DeftxError(
                f"--kind {kind}: the cache has {', '.join(available) or 'nothing'}{did_you_mean(kind, available)}"
            )
    return kinds


def _console() -> Console:
    """Return a console that wraps on a terminal alone: what goes to a file or a pipe keeps its lines."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


def _ls(cache: StageCache, options: argparse.Namespace) -> int:
    kinds = _kinds(cache, options.kind)
    entries = [entry for entry in cache.entries() if not kinds or entry.kind in kinds]
    if entries:
        console = _console()
        console.print(_listing(sorted(entries, key=SORTS[options.sort])))
        console.print()
        console.print(_totals(entries))
    print(f"{len(entries)} entries in {cache.root}")
    _print_leftovers(leftovers_of(cache.root))
    return 0


def _listing(entries: Sequence[Entry]) -> Table:
    from rich.text import Text

    now = time.time()
    table = _table("kind", "label", "key", right=("size", "age", "used", "seconds"))
    for entry in entries:
        ages = [time_text(now - at) for at in (_created(entry), last_used(entry))]
        sizes = [size_text(entry.size), *ages, f"{_seconds(entry):.1f}"]
        table.add_row(entry.kind, Text(entry.label), entry.key[:16], *sizes)
    for column in table.columns:
        column.no_wrap = column.header != "label"
    return table


def _totals(entries: Sequence[Entry]) -> Table:
    table = _table("kind", right=("entries", "size", "seconds"))
    for kind in [*sorted({entry.kind for entry in entries}), "total"]:
        group = [entry for entry in entries if kind in (entry.kind, "total")]
        size, seconds = sum(entry.size for entry in group), sum(map(_seconds, group))
        table.add_row(kind, str(len(group)), size_text(size), f"{seconds:.1f}")
    return table


def _table(*left: str, right: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in left:
        table.add_column(title)
    for title in right:
        table.add_column(title, justify="right")
    return table


def _seconds(entry: Entry) -> float:
    return float(entry.manifest["seconds"])


def _created(entry: Entry) -> float:
    try:
        return datetime.fromisoformat(str(entry.manifest["created"])).timestamp()
    except ValueError:
        return last_used(entry)


def _print_leftovers(leftovers: Sequence[Leftover]) -> None:
    for sort in ("damaged", "checkpoints", "temporary", "tokens"):
        group = [item for item in leftovers if item.sort == sort]
        if group:
            busy = sum(item.running is not None for item in group)
            running = f", {busy} of running processes" if busy else ""
            print(f"{sort}: {len(group)} ({size_text(sum(item.size for item in group))}{running})")


def _info(cache: StageCache, options: argparse.Namespace) -> int:
    entries = list(cache.entries())
    entry = find_entry(entries, options.key)
    manifest, now = entry.manifest, time.time()
    lines = [
        ("stage", f"{entry.kind} {entry.label}".strip()),
        ("key", entry.key),
        ("folder", str(entry.path)),
        ("created", f"{manifest['created']} ({time_text(now - _created(entry))} ago, {manifest['seconds']} s)"),
        ("last used", f"{time_text(now - last_used(entry))} ago"),
        ("size", f"{size_text(entry.size)} in {len(manifest['files'])} files"),
        ("version", str(manifest.get("version"))),
        ("seed", str(manifest.get("seed"))),
    ]
    user = in_use(cache.root).get(entry.path.relative_to(cache.root).as_posix())
    lines += [("in use by", str(user))] if user else []
    for name, value in lines:
        print(f"{name:<10} {value}")
    _section("settings", _flat(manifest.get("settings")))
    origins = {value: f"{item.kind} {item.label}".strip() for item in entries for value in _names(item)}
    unknown = "(no entry here: files, or pruned)"
    inputs = manifest.get("inputs") or {}
    _section("inputs", [(name, f"{value[:16]}  {origins.get(value, unknown)}") for name, value in inputs.items()])
    users = [item for item in entries if _names(entry) & set((item.manifest.get("inputs") or {}).values())]
    _section("input of", [(item.kind, f"{item.key[:16]}  {item.label}") for item in users])
    _section("notes", _flat(entry.notes))
    _section("provenance", _flat(manifest.get("provenance")))
    _section("files", [(name, size_text(record["size"])) for name, record in manifest["files"].items()])
    return 0


def _names(entry: Entry) -> set[str]:
    """Return what an entry is called in the ``inputs`` of others: its key, or the sha256 of an SFT in it."""
    files = entry.manifest["files"].items()
    return {entry.key, *(record["sha256"] for name, record in files if name.endswith("sft.safetensors"))}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [line for key in value for line in _flat(value[key], f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))] if prefix else []


def _section(title: str, lines: Sequence[tuple[str, str]]) -> None:
    if lines:
        width = max(len(name) for name, _ in lines)
        print(f"\n{title}")
        for name, value in lines:
            print(f"  {name:<{width}}  {value}".rstrip())


def _verify(cache: StageCache, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    folders = all_folders(cache.root, _kinds(cache, options.kind))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    damaged: list[tuple[Path, str]] = []
    total = 0
    for folder in folders:
        try:
            total += load(folder).size
        except (DamageError, DeftxError):
            continue
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("verifying", total=total)
        for folder, reason in check_all(folders, lambda size: bar.advance(task, size)):
            if reason is not None:
                damaged.append((folder, reason))
    for folder, reason in damaged:
        moved_to = set_aside(cache.root, folder, reason) if options.set_aside else None
        print(
            f"damaged: {folder.relative_to(cache.root)}: {reason}" + (f"; set aside as {moved_to}" if moved_to else "")
        )
    print(f"{len(folders)} entries verified ({size_text(total)}), {len(damaged)} damaged")
    if damaged and not options.set_aside:
        print("next: deftx cache verify --set-aside, or just run again: a damaged entry is set aside and recomputed")
    _print_leftovers(leftovers_of(cache.root))
    return 1 if damaged else 0


def _prune(cache: StageCache, options: argparse.Namespace) -> int:
    age = None if options.older_than is None else parse_age(options.older_than)
    size = None if options.larger_than is None else parse_size(options.larger_than)
    criteria = Filter(age, size, _kinds(cache, options.kind))
    if not (criteria.given or options.damaged or options.leftovers):
        raise DeftxError(
            "deftx cache prune: say what may go: --older-than AGE, --larger-than SIZE, --kind KIND, --damaged, "
            "--leftovers; with --dry-run it is only shown"
        )
    # With --damaged or --leftovers alone, no result is meant; an age then is theirs.
    results = size is not None or bool(criteria.kinds) or not (options.damaged or options.leftovers)
    chosen, refused = prunable(cache.root, list(cache.entries()), criteria) if results else ([], [])
    rest = _prunable_leftovers(cache, options, age)
    removed, freed = 0, 0
    verb = "would go" if options.dry_run else "gone"
    for entry in sorted(chosen, key=lambda item: -item.size):
        if options.dry_run or remove(cache.root, entry):
            removed, freed = removed + 1, freed + entry.size
            used = time_text(time.time() - last_used(entry)) if options.dry_run else ""
            about = f"  used {used} ago" if used else ""
            print(f"{verb}: {entry.kind} {entry.label} [{entry.key[:16]}]  {size_text(entry.size)}{about}")
    for item in rest:
        if options.dry_run or item.remove(cache.root):
            removed, freed = removed + 1, freed + item.size
            print(f"{verb}: {item.sort} {item.path.relative_to(cache.root)}  {size_text(item.size)}")
    for entry, reason in refused:
        print(f"kept: {entry.kind} {entry.label} [{entry.key[:16]}]  {reason}")
    if options.dry_run:
        print(f"{removed} would go, {size_text(freed)}, nothing was removed")
    else:
        print(f"{removed} removed, {size_text(freed)} freed")
    return 0


def _prunable_leftovers(cache: StageCache, options: argparse.Namespace, age: float | None) -> list[Leftover]:
    sorts = {"damaged"} if options.damaged else set()
    sorts |= {"checkpoints", "temporary", "tokens"} if options.leftovers else set()
    now = time.time()
    return [
        item
        for item in leftovers_of(cache.root)
        if item.sort in sorts
        and item.running is None
        # Tokenised text belongs to nobody: what is young may be in use.
        and now - item.changed >= max(age or 0.0, DAY if item.sort == "tokens" else 0.0)
    ]
