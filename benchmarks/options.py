"""What the ways to compute bring: bfloat16 autocast, compiling, recomputing activations, batches of like length.

Each row is deftx beside itself without the option: one full-phase step of masked language modelling, its peak memory
in a fresh process, and for the batches an epoch of a classifier over rows whose lengths are spread as sentences' are.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from benchmarks import mlm_step, shapes
from benchmarks.harness import Row, Run, one_side, timed_row
from benchmarks.shapes import Shape
from benchmarks.sweep import sentences
from deftx.data.module import TextDataModule
from deftx.training.encoder import load_classifier, load_tokenizer, quiet_transformers
from deftx.training.fit import computing
from deftx.training.modules import MaskedLM, SequenceClassifier
from deftx.training.pretrain import train_tokenizer
from deftx.training.settings import TrainerSettings, TrainingSettings

OPTIONS = {
    "bf16-mixed": replace(TrainerSettings(), precision="bf16-mixed"),
    "checkpointing": replace(TrainerSettings(), checkpointing=True),
    "compile": replace(TrainerSettings(), compile=True),
}
ROWS, BATCH, BUCKETS = 256, 16, 50


def prepare(shape: Shape, side: str, option: str) -> Callable[[], object]:
    """A full-phase step with the option (``ours``) or without any (``plain``)."""
    trainer = OPTIONS[option] if side == "ours" else TrainerSettings()
    model = shapes.masked_lm(shape)
    # closed with the process: the option holds for every step
    contextlib.ExitStack().enter_context(computing(MaskedLM(model, TrainingSettings()), trainer))
    step, batch = mlm_step.ours(model), mlm_step.labelled(shapes.masked_batch(shape))

    def call() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.precision == "bf16-mixed"):
            return step(batch)

    return call


class Epochs:
    """A classifier of a shape and its training rows, 3 to 40 words each."""

    def __init__(self, root: Path, shape: Shape) -> None:
        texts = sentences(ROWS, 1)
        folder = root / "model"
        folder.mkdir()
        tokenizer = train_tokenizer(texts, min(2000, shape.vocabulary), folder)
        with quiet_transformers():
            shapes.masked_lm(replace(shape, vocabulary=max(shape.vocabulary, len(tokenizer)))).save_pretrained(folder)
        self.rows = pd.DataFrame({"text": texts, "label": [number % 2 for number in range(ROWS)]})
        self.tokenizer = load_tokenizer(str(folder))
        model, _ = load_classifier(str(folder), labels=("a", "b"), seed=0)
        self.module = SequenceClassifier(model, TrainingSettings())

    def batches(self, buckets: int) -> Sequence[dict[str, Any]]:
        """The training stream of one epoch."""
        data = TextDataModule.for_task(self.rows, self.rows, self.tokenizer, max_length=128)
        data.schedule(batch_size=BATCH, steps=ROWS // BATCH, seed=0, buckets=buckets)
        return list(data.train_dataloader())

    def run(self, batches: Sequence[dict[str, Any]]) -> None:
        """Forward and backward over all of them."""
        for batch in batches:
            self.module.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
            self.module.zero_grad()


def padding(batches: Sequence[dict[str, Any]]) -> float:
    """Share of the tokens computed that are padding."""
    computed = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(
        int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        for batch in batches
    )
    return 1 - real / computed


def measure(run: Run) -> list[Row]:
    """A row of seconds and one of memory for each option, and one for batches of like length."""
    rows = []
    for option in OPTIONS:
        if option == "compile" and not any(map(shutil.which, ("g++", "clang++"))):
            run.say("no C++ compiler: compile is left out")
            continue
        found = {side: run.peak_memory("options", side, option, repeats=run.repeats) for side in ("ours", "plain")}
        rows.append(Row(f"{option}: MLM step", found["ours"]["seconds"], found["plain"]["seconds"], facts=found))
        rows.append(Row(f"{option}: peak memory", found["ours"]["peak"], found["plain"]["peak"], "bytes"))
    with TemporaryDirectory() as root:
        epochs = Epochs(Path(root), run.shape)
        streams = {"ours": epochs.batches(BUCKETS), "plain": epochs.batches(0)}
        times = run.alternate(
            "length buckets", {side: (lambda stream=stream: epochs.run(stream)) for side, stream in streams.items()}
        )
    shares = {side: padding(stream) for side, stream in streams.items()}
    note = f"padding {shares['ours']:.0%} and {shares['plain']:.0%}; {statistics.mean(epochs.rows.text.str.len()):.0f}"
    rows.append(timed_row(f"length_buckets={BUCKETS}: an epoch", times, note=f"{note} characters a row", facts=shares))
    return rows


if __name__ == "__main__":
    one_side(prepare)
