"""A small grid through one stage cache beside the same jobs that share nothing, wall time and phases.

    python -m benchmarks.sharing

The generated family and its base are made before, for both sides: they stand for data and a download. The jobs are the
demo's, two ranks by two densities; each side runs in processes of its own, one job after the other.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from deftx.cache import StageCache

COMMON = ("experiment=demo", "language=qba", "compare=[]", "controls=[]", "logger=csv", "trainer.progress=false")
GRID = {"rank": ("4", "16"), "density": ("0.1", "0.3")}


def deftx(*arguments: str) -> float:
    """Run the command; seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "deftx", "run", *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def phases(cache: Path) -> Counter[str]:
    """Phases in a cache, by kind."""
    return Counter(entry.kind for entry in StageCache(cache).entries() if entry.kind in ("full", "sparse"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="further overrides of both sides")
    options = parser.parse_args()
    common = [*COMMON, *options.overrides]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        deftx(*common, "only=[base]", f"paths.cache={folder / 'base'}", f"paths.output={folder / 'out'}")
        shutil.copytree(folder / "base", folder / "shared")
        grid = [f"{knob}={','.join(values)}" for knob, values in GRID.items()]
        together = deftx(
            "-m", *common, *grid, f"paths.cache={folder / 'shared'}", f"hydra.sweep.dir={folder / 'sweep'}"
        )
        alone, counted = 0.0, Counter[str]()
        for number, values in enumerate(itertools.product(*GRID.values())):
            cache = folder / f"alone-{number}"
            shutil.copytree(folder / "base", cache)
            job = [f"{knob}={value}" for knob, value in zip(GRID, values, strict=True)]
            alone += deftx(*common, *job, f"paths.cache={cache}", f"paths.output={folder / 'out'}")
            counted += phases(cache)
        again = deftx("-m", *common, *grid, f"paths.cache={folder / 'shared'}", f"hydra.sweep.dir={folder / 'again'}")
        shared = phases(folder / "shared")
    print(f"jobs             {len(list(itertools.product(*GRID.values())))}")
    print(f"sharing a cache  {together:.0f} s, {shared['full']} full and {shared['sparse']} sparse phases")
    print(f"sharing nothing  {alone:.0f} s, {counted['full']} full and {counted['sparse']} sparse phases")
    print(f"ratio            {alone / together:.2f}")
    print(f"the sweep again  {again:.1f} s, nothing trained")


if __name__ == "__main__":
    main()
