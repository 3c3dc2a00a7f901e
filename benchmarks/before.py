"""What an earlier commit computes beside what this checkout does: the same bits, the same stages.

    python -m benchmarks.before bits COMMIT             # the demo and a two-rank sweep in both, every result compared
    python -m benchmarks.before stages COMMIT           # the stages of every experiment file in both
    python -m benchmarks.before stages COMMIT --data FOLDER --model FOLDER    # also those that need real data

The commit is checked out beside this one; both run with this interpreter, each with a stage cache of its own. Keys may
differ, so results are matched by what they are: kind, label and seed of a stage; language, condition and example of a
prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "demo": ["experiment=demo", "logger=csv"],
    "sweep": ["-m", "experiment=demo", "rank=4,16", "compare=[]", "controls=[]", "logger=csv"],
}
COMPARED = ("sft/sft.safetensors", "full.safetensors", "decompositions.safetensors", "mask.safetensors")
# Lists the stages of every job of a command as JSON: imports, studies, stages of one; in the words of a checkout whose
# studies are graphs, and of one from before that.
WORDS = {
    True: (
        "from deftx.stages.graph import graph",
        "[job.study for job in check().jobs]",
        "[item.stage for item in graph(study).nodes]",
    ),
    False: (
        "from deftx.stages.plan import Planner",
        "[study_settings(config) for config in check(validate=lambda *_: []).configs]",
        "[item.stage for item in Planner(cache).plan(study).stages]",
    ),
}
LISTER = """
import functools, json, sys
from deftx.config import check_command, hydra_session, study_settings
{imports}
overrides, cache = json.loads(sys.argv[1]), sys.argv[2]
with hydra_session():
    check = functools.partial(check_command, "run", [*overrides, f"paths.cache={{cache}}"], multirun=False)
    studies = {studies}
found = []
for number, study in enumerate(studies):
    # The plan of old gave a base that had still to be made another name, and the seed of the run.
    found += [[number, s.kind, *(("base", 0) if s.kind == "pretrain" else (s.label, s.seed))] for s in {stages}]
print(json.dumps(found))
"""


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the tree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True
        )
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def python(tree: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python on the code of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, *arguments], env=environment, text=True, check=True, **options)


def run_all(tree: Path, folder: Path) -> None:
    """Run the commands, unless the folder holds their results already."""
    for name, overrides in COMMANDS.items():
        if (folder / name).exists():
            continue
        places = [
            f"paths.cache={folder / 'cache'}",
            f"paths.output={folder / name}",
            f"hydra.sweep.dir={folder / name}",
        ]
        print(f"{folder.name}: {name} ...", flush=True)
        python(tree, "-m", "deftx", "run", *overrides, *places, cwd=folder, capture_output=True)


def tensors(cache: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors, by what its stage is."""
    found = {}
    for path in sorted(cache.glob("*/*/manifest.json")):
        manifest = json.loads(path.read_bytes())
        for name in COMPARED:
            if name in manifest["files"]:
                # A stage without randomness of its own says no seed; its label tells it in these commands.
                key = f"{manifest['kind']} {manifest['label']} seed={manifest['seed']} {name}"
                found[key] = manifest["files"][name]["sha256"]
    return found


def results(folder: Path) -> dict[str, tuple[list[Any], pd.DataFrame]]:
    """Scores and predictions of every run below a folder, by what was asked for."""
    found = {}
    for path in sorted(folder.rglob("predictions.parquet")):
        record = json.loads(path.with_name("result.json").read_bytes())
        name = f"{record['study']} {record['settings']['method']} rank={record['settings']['rank']}"
        scores = sorted((m["language"], m["condition"], m["metric"], m["value"], m["n"]) for m in record["metrics"])
        found[name] = scores, pd.read_parquet(path).sort_values(["language", "condition", "variant", "id"])
    return found


def compare_bits(before: Path, after: Path) -> int:
    """Say what differs; how much does."""
    one, other = tensors(before / "cache"), tensors(after / "cache")
    differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    counts = Counter(key.split()[-1] for key in one)
    print("tensor files compared:", ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    for command in COMMANDS:
        was, now = results(before / command), results(after / command)
        rows = 0
        for name in was.keys() | now.keys():
            if name not in was or name not in now or was[name][0] != now[name][0]:
                differing.append(f"scores of {command}: {name}")
                continue
            rows += len(was[name][1])
            frames = [frame.reset_index(drop=True) for _, frame in (was[name], now[name])]
            if not frames[0].equals(frames[1]):
                differing.append(f"predictions of {command}: {name}")
        print(
            f"{command}: {len(was)} runs, {sum(len(scores) for scores, _ in was.values())} scores, {rows} predictions"
        )
    print(f"{len(differing)} differ" + "".join(f"\n  {name}" for name in differing))
    return len(differing)


def experiments(data: Path | None, model: Path | None) -> dict[str, list[str]]:
    """Overrides that compose each experiment file; those on real data only where there are data and a model."""
    found = {}
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        own = "defaults" in content
        if own and (data is None or model is None):
            continue
        real = [f"data.root={data}", "model=minilm", f"model.path={model}", "missing_text=skip"] if own else []
        found[path.stem] = [f"experiment={path.stem}", *real]
        if own:
            # A collection that lacks some languages is planned for those it has.
            found[path.stem] += [f"language={LANGUAGES[path.stem]}"]
    return found


LANGUAGES = {"nusax": "[ace,ban,min]", "americasnli": "[aym,gn,quy]", "xnli_morphology": "[tur]"}


def compare_stages(tree: Path, data: Path | None, model: Path | None) -> int:
    """Say which stages of the experiments differ; how many do."""
    total = 0
    with tempfile.TemporaryDirectory() as empty:
        for name, overrides in experiments(data, model).items():
            lists = {}
            for side, place in (("before", tree), ("after", ROOT)):
                imports, studies, stages = WORDS[(place / "deftx" / "stages" / "graph.py").is_file()]
                code = LISTER.format(imports=imports, studies=studies, stages=stages)
                words = [json.dumps(overrides), str(Path(empty) / side)]
                said = python(place, "-c", code, *words, cwd=empty, capture_output=True).stdout
                lists[side] = Counter(tuple(item) for item in json.loads(said.splitlines()[-1]))
            kinds = Counter(kind for _, kind, _, _ in lists["after"].elements())
            told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            print(f"{name}: {lists['before'].total()} stages before, {lists['after'].total()} nodes: {told}")
            for side, other in (("before", "after"), ("after", "before")):
                for item in sorted((lists[side] - lists[other]).elements(), key=str):
                    total += 1
                    print(f"  only {side}: {item}")
    return total


def main() -> int:
    """Run it; 0 when nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bits", "stages"])
    parser.add_argument("commit")
    parser.add_argument("--folder", type=Path, help="keeps results of bits; those of an earlier attempt are used")
    parser.add_argument("--data", type=Path, help="clones of the data sets")
    parser.add_argument("--model", type=Path, help="a BERT or XLM-R folder")
    options = parser.parse_args()
    with checked_out(options.commit) as tree, tempfile.TemporaryDirectory() as scratch:
        if options.what == "stages":
            return min(1, compare_stages(tree, options.data, options.model))
        folder = (options.folder or Path(scratch)).absolute()
        for name, place in (("before", tree), ("after", ROOT)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            run_all(place, folder / name)
        return min(1, compare_bits(folder / "before", folder / "after"))


if __name__ == "__main__":
    sys.exit(main())
