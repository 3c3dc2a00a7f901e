"""A method is an entry of the table and a file in conf/: everything else reads the table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_study import small_for

from deftx.training.encoder import load_masked_lm, maskable_parameters

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("methods")]

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES = {
    "SCORED: dict[str, Scored] = {\n": '    "weights": Scored(lambda it: it.base(), ("base",)),\n',
    "METHODS: dict[str, SparseMethod] = {\n": '    "by_weight": SparseMethod("largest weights", "weights"),\n',
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a method more, whose mask is that of the largest |θ⁰|."""
    root = tmp_path_factory.mktemp("house")
    for name in ("deftx", "conf"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    table = root / "deftx" / "methods" / "table.py"
    text = table.read_text(encoding="utf-8")
    for place, entry in ENTRIES.items():
        assert text.count(place) == 1
        text = text.replace(place, place + entry)
    table.write_text(text, encoding="utf-8")
    (root / "conf" / "method" / "by_weight.yaml").write_text("name: by_weight\n", encoding="utf-8")
    return root


def run(house: Path, *words: str) -> str:
    told = {**os.environ, "PYTHONPATH": str(house)}
    command = [sys.executable, "-m", "deftx", *words]
    result = subprocess.run(command, cwd=house, env=told, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def ran(house: Path) -> tuple[Path, dict[str, Any]]:
    """Two runs of the new method beside those that there were: their folder, and the first one's result."""
    words = ["method=by_weight", "compare=[deftx,random_mask]", "language=qba", "controls=[no_language_sft]"]
    places = [f"paths.cache={house / 'cache'}", f"hydra.sweep.dir={house / 'out'}"]
    run(house, "run", "-m", *small_for("run"), *words, "rank=2,3", *places)
    return house / "out", json.loads((house / "out" / "0" / "result.json").read_text(encoding="utf-8"))


def test_a_new_method_is_run_told_and_reported(house: Path, ran: tuple[Path, dict[str, Any]]) -> None:
    folder, result = ran
    cells = {cell["condition"]: cell for cell in result["cells"]}
    assert list(cells) == ["no_language_sft", "by_weight", "deftx", "random_mask"]
    told = {
        name: {(term["method"], term["rank"], term["mask"]) for term in cell["terms"]}
        for name, cell in cells.items()
        if name != "no_language_sft"
    }
    assert told == {
        "by_weight": {("by_weight", None, "magnitude")},
        "deftx": {("deftx", "2", "magnitude")},
        "random_mask": {("random_mask", None, "random")},
    }
    run(house, "report", str(folder), "--out", str(house / "report"))
    scores = pd.read_csv(house / "report" / "scores.csv").fillna("")
    # Only DeFT-X reads a rank, whatever the main method is; the others' scores of both runs are one column each.
    assert sorted(zip(scores["condition"], scores["setting"], strict=True)) == [
        ("by_weight", ""),
        ("deftx", "rank=2"),
        ("deftx", "rank=3"),
        ("no_language_sft", ""),
        ("random_mask", ""),
    ]


def test_its_mask_is_that_of_the_largest_weights_and_no_full_phase_was_needed(
    house: Path, ran: tuple[Path, dict[str, Any]]
) -> None:
    (mine,) = (
        path.parent
        for path in (house / "cache").glob("select/*/manifest.json")
        if (item := json.loads(path.read_text(encoding="utf-8")))["settings"]["scored"] == "weights"
        and item["settings"]["objective"] == "language"
    )
    # It reads θ⁰ alone, so that φ_S and every target have one mask.
    assert set(json.loads((mine / "manifest.json").read_text(encoding="utf-8"))["inputs"]) == {"base"}
    mask = load_file(mine / "mask.safetensors")
    model, _ = load_masked_lm(next((house / "cache").glob("pretrain/*/model")), seed=0)
    weights = {name: tensor.detach().abs().flatten() for name, tensor in maskable_parameters(model).items()}
    k = sum(index.numel() for index in mask.values())
    least = torch.cat(list(weights.values())).topk(k).values.min()
    for name, index in mask.items():
        assert (weights[name][index] >= least).all()
