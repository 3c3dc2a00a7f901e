"""Zero-shot evaluation of twelve target languages with one task SFT.

Ours loads the model once, composes it with φ_T, and for each language adds φ_L, tokenises once, predicts batches of
rows of like length padded to their longest, and removes φ_L. Plain loads the model afresh for each language, adds both
SFTs with ``index_add_``, and predicts the rows in their order, padded to the longest input the model was trained with.
Both read the same folder, the SFTs come from memory (on a GPU from its own), batches hold as many rows, logits are
compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import device, shapes
from benchmarks.harness import Row, Run, timed_row
from benchmarks.shapes import Shape
from benchmarks.sweep import sentences
from deftx.core.composition import Composition
from deftx.core.delta import SparseDelta
from deftx.data.encode import batches_by_length, encode_texts, padding_of
from deftx.training.encoder import (
    base_fingerprint_of,
    base_parameters,
    load_classifier,
    load_tokenizer,
    quiet_transformers,
)
from deftx.training.predict import predict
from deftx.training.pretrain import train_tokenizer

LABELS = ("negative", "neutral", "positive")
LANGUAGES = 12
LONGEST = 128
BATCH = 64


class Study:
    """A model folder, a task SFT, language SFTs and rows; written below ``root``."""

    def __init__(self, root: Path, shape: Shape, languages: int = LANGUAGES) -> None:
        from transformers import AutoModelForSequenceClassification

        self.folder = root / "model"
        text = sentences(300, 0)
        train_tokenizer(text, min(2000, shape.vocabulary), self.folder)
        auto: Any = AutoModelForSequenceClassification
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)
            config = shapes.config_of(shape)
            config.num_labels = len(LABELS)
            model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
            model.save_pretrained(str(self.folder))
        fingerprint = base_fingerprint_of(model)
        del model
        self.task = shapes.sparse_delta(shape, shape.k_task, 1, fingerprint)
        made = shapes.sparse_delta(shape, shape.k, 2, fingerprint)
        # the languages share coordinates, or twelve of them would fill the memory; their values differ
        self.sfts = [_scaled(made, 1 + number / languages) for number in range(languages)]
        self.rows = [sentences(shape.rows, 100 + number) for number in range(languages)]

    def ours(self, languages: int | None = None) -> list[Tensor]:
        """Logits of each language: one model that walks from composition to composition."""
        model = self._classifier()
        tokenizer = load_tokenizer(self.folder)
        parameters = {name: parameter.data for name, parameter in base_parameters(model).items()}
        composition = Composition(parameters, base_fingerprint=base_fingerprint_of(model))
        composition.add("task", self.task)
        found = []
        for sft, rows in list(zip(self.sfts, self.rows, strict=True))[:languages]:
            composition.add("language", sft)
            columns = encode_texts(tokenizer, rows, None, LONGEST)
            found.append(predict(model, batches_by_length(columns, padding_of(tokenizer), BATCH), rows=len(rows)))
            composition.remove("language")
        return found

    def plain(self, languages: int | None = None) -> list[Tensor]:
        """The same, from a fresh model each."""
        tokenizer = load_tokenizer(self.folder)
        pairs = list(zip(self.sfts, self.rows, strict=True))[:languages]
        return [self._plain_one(tokenizer, sft, rows) for sft, rows in pairs]

    def _plain_one(self, tokenizer: Any, sft: SparseDelta, rows: Sequence[str]) -> Tensor:
        model = self._classifier()  # the same head from the same seed
        model.eval()
        logits = []
        with torch.inference_mode():
            parameters = base_parameters(model)
            for delta in (self.task, sft):
                for name, index in delta.indices.items():
                    parameters[name].view(-1).index_add_(0, index, delta.values[name])
            for first in range(0, len(rows), BATCH):
                part = list(rows[first : first + BATCH])
                batch = tokenizer(part, truncation=True, max_length=LONGEST, padding="max_length", return_tensors="pt")
                logits.append(model(**device.put(dict(batch))).logits)
        return torch.cat(logits).cpu()

    def _classifier(self) -> Any:
        return device.put(load_classifier(self.folder, labels=LABELS, seed=0)[0])


def _scaled(delta: SparseDelta, factor: float) -> SparseDelta:
    values = {name: value * factor for name, value in delta.values.items()}
    return SparseDelta(delta.indices, values, delta.shapes, metadata=delta.metadata)


def measure(run: Run) -> list[Row]:
    """Seconds of all languages."""
    run.say("writing a model and SFTs")
    with tempfile.TemporaryDirectory() as root:
        study = Study(Path(root), run.shape)
        logits: dict[str, list[Tensor]] = {}
        sides = {
            "ours": lambda: logits.update(ours=study.ours()),
            "plain": lambda: logits.update(plain=study.plain()),
        }
        times = run.alternate("evaluation", sides)
        pairs = zip(logits["ours"], logits["plain"], strict=True)
        distance = max(float((a - b).abs().max()) for a, b in pairs)
    return [
        timed_row(
            f"evaluate {LANGUAGES} languages × {run.shape.rows} rows",
            times,
            note=f"largest difference of logits {distance:.1e}; plain: a fresh model for each language, padding to "
            f"{LONGEST}",
            facts={"largest_difference": distance},
        )
    ]
