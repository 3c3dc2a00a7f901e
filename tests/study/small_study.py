"""A study small enough for tests: two targets of the generated family, a two-layer encoder, four steps a phase."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deftx.settings import READS

SMALL = [
    "experiment=demo",
    "budget=smoke",
    "language=[qba,qbb]",
    "logger=csv",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.progress=false",
    "synthetic.lines_high=200",
    "synthetic.lines_low=150",
    "synthetic.train=48",
    "synthetic.valid=24",
    "synthetic.test=30",
    "corpus.valid_fraction=0.2",
    "model.pretrain.hidden=16",
    "model.pretrain.heads=2",
    "model.pretrain.intermediate=32",
    "model.pretrain.vocab_size=300",
    "model.pretrain.steps=4",
    "model.pretrain.batch_size=8",
    "model.pretrain.max_length=32",
    "model.pretrain.positions=64",
    "model.pretrain.valid_fraction=0.1",
]

FEW = ("language=qba", "compare=[]", "controls=[]")
"""Its smallest part: one target, one method."""

GRID = ("-m", *FEW, "source=shared", "rank=2,none")


def small_for(command: str) -> list[str]:
    """What of the small study a command reads; the rest it would refuse."""
    return [text for text in SMALL if text.split("=")[0].split(".")[0] in {*READS[command], "experiment"}]


@dataclass
class Outcome:
    """What a command left: exit status, both streams, and the folder of its newest run."""

    status: int
    out: str
    err: str
    folder: Path

    def result(self) -> dict[str, Any]:
        """The newest ``result.json``."""
        return json.loads(
            sorted(self.folder.rglob("result.json"), key=lambda path: path.stat().st_mtime)[-1].read_text()
        )

    def runs(self) -> list[dict[str, Any]]:
        """Every ``result.json`` of the command, by path."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.rglob("result.json"))]


Command = Callable[..., Outcome]


def own_rows(tmp_path: Path, shared_cache: Path) -> Path:
    """Own data: text of the family, and labelled rows in two languages, made of its test sets."""
    data = Path(shutil.copytree(next(shared_cache.glob("family/*/family")), tmp_path / "own"))
    for code in ("qab", "qac"):
        header, *rows = (data / "sentiment" / code / "test.tsv").read_text().splitlines(keepends=True)
        (data / "sentiment" / code / "train.tsv").write_text(header + "".join(rows[:20]))
        (data / "sentiment" / code / "test.tsv").write_text(header + "".join(rows[20:]))
    shutil.copy(data / "sentiment" / "qba" / "test.tsv", data / "sentiment" / "qba" / "valid.tsv")
    return data
