"""Kill a sweep at random moments, finish it, and compare every bit with a sweep that nobody disturbed.

    python -m benchmarks.faults --kills 10 [--reference CACHE] [override ...]

Without overrides it is the demo family's ``rank_x_sparsity`` for two languages and seeds. The whole process group gets
SIGKILL, so that launchers' workers die, too. After each kill all entries the cache shows are verified: a partial one
would be damaged. At the end tensors, predictions and metrics of both caches are compared byte by byte, by stage key.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from deftx.cache import StageCache

SWEEP = (
    "experiment=[demo,rank_x_sparsity]",
    "seed=0,1",
    "language=[qba,qbb]",
    "logger=csv",
    "trainer.progress=false",
)
COMPARED = ("sft/sft.safetensors", "predictions.parquet", "full.safetensors", "mask.safetensors")


def start(overrides: list[str], cache: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the sweep as a group of its own."""
    places = [f"paths.cache={cache}", f"hydra.sweep.dir={out}"]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "deftx", "run", "-m", *overrides, *places],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(overrides: list[str], cache: Path, out: Path, log: Path) -> float:
    """Run the sweep to its end; seconds."""
    started = time.perf_counter()
    status = start(overrides, cache, out, log).wait()
    if status:
        raise SystemExit(f"the sweep ended with {status}; see {log}")
    return time.perf_counter() - started


def damaged(root: Path) -> list[str]:
    """Entries that are visible and not whole."""
    cache = StageCache(root)
    return [f"{entry.path}: {reason}" for entry in cache.entries() if (reason := cache.verify(entry))]


def contents(root: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of what is compared, by stage: tensors, predictions, and scores of evaluations."""
    found = {}
    for entry in StageCache(root).entries():
        if entry.kind == "run":  # copies of evaluations, and what a version of deftx says about them
            continue
        names = [*COMPARED, *(["metrics.json"] if entry.kind == "evaluate" else [])]
        files = entry.manifest["files"]
        if any(name in files for name in names):
            found[f"{entry.kind} {entry.key[:16]}"] = {n: files[n]["sha256"] for n in names if n in files}
    return found


def main() -> int:
    """Run it; 0 when nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=float, default=90.0, help="seconds before a kill, at most")
    parser.add_argument("--shortest", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=Path("faults"))
    parser.add_argument("--reference", type=Path, help="stage cache of an undisturbed run of the same sweep")
    parser.add_argument("overrides", nargs="*", default=list(SWEEP))
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    log, cache = options.folder / "log.txt", options.folder / "cache"
    reference = options.reference
    if reference is None:
        reference = options.folder / "reference"
        seconds = finish(options.overrides, reference, options.folder / "undisturbed", log)
        print(f"undisturbed: {seconds:.0f} s", flush=True)
    draw = random.Random(options.seed)
    seen: Counter[str] = Counter()
    for number in range(options.kills):
        process = start(options.overrides, cache, options.folder / f"killed-{number}", log)
        wait = draw.uniform(options.shortest, options.longest)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            print(f"kill {number + 1}: the sweep had ended before {wait:.1f} s", flush=True)
            continue
        scratch = sorted(path.name for path in (cache / "scratch").glob("*-*") if path.is_dir())
        partial = damaged(cache) if cache.is_dir() else []
        count = sum(1 for _ in StageCache(cache).entries())
        seen["kills"] += 1
        seen["partial"] += len(partial)
        print(f"kill {number + 1} after {wait:.1f} s: {count} entries, {len(partial)} partial", *scratch, flush=True)
    seconds = finish(options.overrides, cache, options.folder / "finished", log)
    print(f"finished in {seconds:.0f} s more", flush=True)
    one, other = contents(reference), contents(cache)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{seen['kills']} kills, {seen['partial']} partial entries seen; {len(one)} stages compared, ", end="")
    print(f"{len(differing)} differ" + (f": {', '.join(differing[:5])}" if differing else ""))
    return 1 if differing or seen["partial"] or seen["kills"] < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
