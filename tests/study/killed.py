"""Run the command line and die by SIGKILL at a chosen moment: ``python killed.py WHAT WHERE N run ...``.

WHAT is ``step`` or ``validation`` (a batch of it), ``write`` (half of a checkpoint is written) or ``written`` (a stage
has written what it will publish). WHERE is part of the scratch folder's path, or of the stage's method; N counts.
``none`` lets it live.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import deftx.training.checkpoint as checkpoint
from deftx.atomic import temporary_name
from deftx.cli import main
from deftx.stages import learn
from deftx.stages.evaluate import Evaluator
from deftx.training.modules import Encoder, MaskedLM, SequenceClassifier

WHAT, WHERE, LAST = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0


def moment(what: str, where: Any) -> bool:
    global seen
    seen += what == WHAT and WHERE in str(where)
    return what == WHAT and seen == LAST


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(kind: type[Encoder], name: str, what: str) -> None:
    original = getattr(kind, name)

    def watched(self: Encoder, batch: Any, batch_idx: int) -> Any:
        if moment(what, self.trainer.default_root_dir):
            die()
        return original(self, batch, batch_idx)

    setattr(kind, name, watched)


def write(path: Path, payload: Any, write: Any = checkpoint.write) -> None:
    if moment("write", path):
        write(path.with_name("whole"), payload)
        content = path.with_name("whole").read_bytes()
        temporary_name(path).write_bytes(content[: len(content) // 2])
        die()
    write(path, payload)


checkpoint.write = write
for kind in (MaskedLM, SequenceClassifier):
    watch(kind, "training_step", "step")
    watch(kind, "validation_step", "validation")


def written(kind: type, name: str) -> None:
    """Die when a stage has written its result, and nothing of it is published."""
    original = getattr(kind, name)

    def watched(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if moment("written", name):
            die()
        return found

    setattr(kind, name, watched)


for stage in ("decompose", "select"):
    written(learn._Phases, stage)
written(Evaluator, "_compute")

if __name__ == "__main__":
    main(sys.argv[4:])
