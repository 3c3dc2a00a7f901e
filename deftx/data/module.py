"""Text turned into batches: tokenised once (cached by ``datasets``), batched by pure functions of the seed.

Masked language modelling: lines are tokenised with their special tokens, concatenated and cut into blocks of one
length; of each batch 15 % of the ordinary tokens are predicted, 80 % of them masked, 10 % replaced by a random
ordinary token, 10 % left as they are (Devlin et al. 2019). Classification: texts or pairs, truncated (the longer of a
pair first), padded to the longest of the batch.

Training is one stream of batches over all epochs. Batch i depends on (seed, i) alone: never on what trains, on workers,
or on whether the fit was interrupted. Validation masks are drawn once from the module's seed, example by example.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from deftx.data.encode import Batch, encode_texts, pad, padding_of, tokenise_blocks
from deftx.errors import DeftxError
from deftx.seeds import seed_of


class TextDataModule(pl.LightningDataModule):
    """Training stream and validation batches of one phase's data; see :meth:`for_language` and :meth:`for_task`.

    Attributes:
        examples: training rows or blocks; one epoch is ``ceil(examples / batch_size)`` optimizer steps.
        valid_examples: validation rows or blocks.
    """

    def __init__(self, source: _Source, *, seed: int) -> None:
        """Use the class methods; ``seed`` decides the validation masks."""
        super().__init__()
        self._source = source
        self._seed = seed
        self._plan: dict[str, int] = {}
        self.examples = source.examples("train")
        self.valid_examples = source.examples("valid")

    def epoch_steps(self, batch_size: int) -> int:
        """Optimizer steps of one epoch; a batch never mixes source languages, so each has a smaller last one."""
        return len(_cuts(self._source.groups("train"), batch_size))

    @classmethod
    def for_language(
        cls,
        train: Sequence[str],
        valid: Sequence[str],
        tokenizer: Any,
        *,
        block_length: int,
        seed: int,
        mlm_probability: float = 0.15,
        cache_dir: Path | None = None,
    ) -> TextDataModule:
        """Prepare lines for masked language modelling.

        Args:
            train: lines to train on.
            valid: lines held out.
            tokenizer: a fast transformers tokenizer with a mask token.
            block_length: tokens per block, special tokens included.
            seed: decides the validation masks.
            mlm_probability: share of ordinary tokens to predict.
            cache_dir: folder for tokenised text, named by content; None keeps it in memory.

        Raises:
            DeftxError: either part holds less than one block of tokens.
        """
        blocks = []
        for split, lines in (("training", list(train)), ("validation", list(valid))):
            blocks.append(tokenise_blocks(lines, tokenizer, block_length, cache_dir))
            if not len(blocks[-1]):
                tokens = sum(map(len, tokenizer(lines)["input_ids"])) if lines else 0
                raise DeftxError(
                    f"too little {split} text: {len(lines)} lines make {tokens} tokens, fewer than one block of "
                    f"{block_length}; add text or lower max_length"
                )
        return cls(_Blocks(blocks[0], blocks[1], tokenizer, mlm_probability), seed=seed)

    @classmethod
    def for_task(cls, train: Any, valid: Any, tokenizer: Any, *, max_length: int, seed: int = 0) -> TextDataModule:
        """Prepare labelled rows for classification.

        Args:
            train: frame with columns ``text``, ``label`` and, for pairs, ``text_pair``; with several source languages
                also ``source``, a small integer: no batch mixes two, and each says its own.
            valid: the same for validation.
            tokenizer: a fast transformers tokenizer.
            max_length: tokens a text or pair is truncated to.
            seed: unused here but for symmetry; the training order comes from :meth:`schedule`.

        Raises:
            DeftxError: a frame without rows.
        """
        for split, frame in (("training", train), ("validation", valid)):
            if not len(frame):
                raise DeftxError(f"there are no {split} rows")
        return cls(_Rows(train, valid, tokenizer, max_length), seed=seed)

    def schedule(
        self, *, batch_size: int, steps: int, accumulate: int = 1, seed: int, num_workers: int = 0, buckets: int = 0
    ) -> TextDataModule:
        """Fix the training stream: ``steps`` steps of ``batch_size`` examples, each in ``accumulate`` batches.

        Args:
            batch_size: examples of one optimizer step, over all devices.
            steps: optimizer steps; epochs follow one another until they are reached.
            accumulate: batches one step is split into.
            seed: decides order and masking.
            num_workers: processes that prepare batches.
            buckets: rows of like length go together within every so many batches of shuffled rows; 0: as shuffled.
        """
        self._plan = {
            "batch_size": batch_size,
            "steps": steps,
            "accumulate": accumulate,
            "seed": seed,
            "num_workers": num_workers,
            "buckets": buckets,
        }
        return self

    def fingerprint(self) -> str:
        """Return the digest of what a fit sees: sizes, first and last training batch, first validation batch."""
        if not self._plan:
            raise RuntimeError("call schedule() before fingerprint()")
        stream, valid = _Stream(self._source, self._plan, 0, 1), _Validation(self._source, self._seed, 8, 0, 1)
        digest = hashlib.sha256(f"{self.examples}/{self.valid_examples}".encode())
        for batch in (stream[0], stream[len(stream) - 1], valid[0]):
            for name in sorted(batch):
                value = batch[name]
                digest.update(name.encode())
                digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode())
        return digest.hexdigest()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the stream from the trainer's current step on."""
        if not self._plan:
            raise RuntimeError("call schedule() before training")
        plan = self._plan
        start = self.trainer.global_step * plan["accumulate"] if self.trainer is not None else 0
        stream = _Stream(self._source, plan, *self._rank_and_world())
        return DataLoader(
            stream,
            batch_size=None,
            sampler=range(start, len(stream)),  # what is left of the stream is Lightning's epoch
            num_workers=plan["num_workers"],
            pin_memory=self._on_gpu(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches, in a fixed order and, for language modelling, with fixed masks."""
        size = math.ceil(self._plan.get("batch_size", 32) / self._plan.get("accumulate", 1))
        batches = _Validation(self._source, self._seed, size, *self._rank_and_world())
        return DataLoader(batches, batch_size=None, shuffle=False, pin_memory=self._on_gpu())

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _on_gpu(self) -> bool:
        strategy = getattr(self.trainer, "strategy", None)
        return strategy is not None and strategy.root_device.type == "cuda"


class _Stream(Dataset[Batch]):
    """Batch i of the training stream: a part of the optimizer step i // accumulate."""

    def __init__(self, source: _Source, plan: Mapping[str, int], rank: int, world: int) -> None:
        self.source, self.plan, self.rank, self.world = source, plan, rank, world
        self.groups = source.groups("train")
        self.cuts = _cuts(self.groups, plan["batch_size"])
        self.lengths = source.lengths("train") if plan["buckets"] else None
        self._order: tuple[int, np.ndarray, np.ndarray] = (-1, self.groups, self.groups)

    def __len__(self) -> int:
        return self.plan["steps"] * self.plan["accumulate"]

    def rows_of(self, epoch: int, position: int) -> np.ndarray:
        """Return the training examples of a step of an epoch."""
        if self._order[0] != epoch:
            random = np.random.default_rng(seed_of(self.plan["seed"], "order", epoch))
            order, steps = random.permutation(len(self.groups)), np.arange(len(self.cuts))
            if self.groups.any():  # several source languages, their steps mixed
                order, steps = order[np.argsort(self.groups[order], kind="stable")], random.permutation(len(steps))
            if self.lengths is not None:
                order, steps = self._bucketed(order, self.lengths), random.permutation(len(steps))
            self._order = (epoch, order, steps)
        _, order, steps = self._order
        first, last = self.cuts[steps[position]]
        return order[first:last]

    def _bucketed(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Sort by length within every ``buckets`` batches of one language; the cuts stay where they are."""
        order = order.copy()
        for pool in _cuts(np.sort(self.groups), self.plan["batch_size"] * self.plan["buckets"]):
            rows = order[pool[0] : pool[1]]
            order[pool[0] : pool[1]] = rows[np.argsort(lengths[rows], kind="stable")]
        return order

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.plan["accumulate"])
        epoch, position = divmod(step, len(self.cuts))
        rows = self.rows_of(epoch, position)
        parts = self.plan["accumulate"] * self.world
        seed = seed_of(self.plan["seed"], "mask", epoch, position)
        return self.source.batch("train", rows, seed, part * self.world + self.rank, parts)


class _Validation(Dataset[Batch]):
    """Validation batch i: consecutive rows, every ``world``-th batch for a device."""

    def __init__(self, source: _Source, seed: int, size: int, rank: int, world: int) -> None:
        self.source, self.seed = source, seed
        groups = source.groups("valid")
        self.order = np.argsort(groups, kind="stable")
        size = max(1, min(size, len(groups) // world))  # a batch for each device, or some would not take part
        self.cuts = _cuts(groups, size)[rank::world]

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        first, last = self.cuts[index]
        return self.source.batch("valid", self.order[first:last], seed_of(self.seed, "valid"), 0, 1)


def _cuts(groups: np.ndarray, size: int) -> np.ndarray:
    """Return where examples sorted by group are cut into pieces of one group, at most ``size``: int64 [pieces, 2]."""
    ends = np.cumsum(np.bincount(groups))
    firsts = [np.arange(start, end, size) for start, end in zip([0, *ends], ends, strict=False)]
    lasts = [np.minimum(first + size, end) for first, end in zip(firsts, ends, strict=True)]
    return np.stack([np.concatenate(firsts), np.concatenate(lasts)], axis=1) if firsts else np.empty((0, 2), np.int64)


class _Source(ABC):
    """Examples of both splits, and how a step's rows become the batch of one part of it."""

    @abstractmethod
    def examples(self, split: str) -> int:
        """Return how many examples a split has."""

    def groups(self, split: str) -> np.ndarray:
        """Return the source language of each example, a small integer: a batch holds one language's."""
        return np.zeros(self.examples(split), dtype=np.int64)

    def lengths(self, split: str) -> np.ndarray | None:
        """Return the tokens of each example, None where all are of one length."""
        return None

    @abstractmethod
    def batch(self, split: str, rows: np.ndarray, seed: int, part: int, parts: int) -> Batch:
        """Return part ``part`` of ``parts`` of the step that consists of ``rows``.

        ``normalizer`` is the step's number of loss terms divided by ``parts``: the mean over the parts of
        (summed loss / normalizer) is the step's mean loss, however unequal the parts are.
        """


class _Blocks(_Source):
    """Blocks of tokens with dynamic masks."""

    def __init__(self, train: Any, valid: Any, tokenizer: Any, probability: float) -> None:
        self.blocks = {"train": train, "valid": valid}
        self.probability = probability
        self.mask_id = int(tokenizer.mask_token_id)
        special = sorted({int(token) for token in tokenizer.all_special_ids})
        self.special = np.array(special, dtype=np.int64)
        self.ordinary = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int64), self.special)

    def examples(self, split: str) -> int:
        return len(self.blocks[split])

    def batch(self, split: str, rows: np.ndarray, seed: int, part: int, parts: int) -> Batch:
        tokens = np.asarray(self.blocks[split][rows]["input_ids"], dtype=np.int64)
        if split == "valid":  # by example, so that the masks don't depend on the batch size
            drawn = [self.mask(block[None], seed_of(seed, int(row))) for row, block in zip(rows, tokens, strict=True)]
            inputs, chosen = (np.concatenate(pieces) for pieces in zip(*drawn, strict=True))
        else:
            inputs, chosen = self.mask(tokens, seed)
        total = int(chosen.sum())
        own_rows = _share(len(rows), part, parts)
        if len(own_rows):
            inputs, chosen, tokens = inputs[own_rows], chosen[own_rows], tokens[own_rows]
        else:  # fewer rows than parts: a row without loss keeps the devices in step
            inputs, chosen, tokens = tokens[:1], np.zeros_like(chosen[:1]), tokens[:1]
        positions = np.flatnonzero(chosen)
        targets = tokens.reshape(-1)[positions]
        return {
            "input_ids": torch.from_numpy(inputs),
            "positions": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets),
            "normalizer": torch.tensor(max(1, total) / parts, dtype=torch.float32),
            "tokens": int(inputs.size),
        }

    def mask(self, tokens: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, which tokens are predicted) for int64 ``tokens`` [B, T]; 80/10/10 of the chosen."""
        random = np.random.default_rng(seed)
        chosen = (random.random(tokens.shape) < self.probability) & ~np.isin(tokens, self.special)
        kind = random.random(tokens.shape)
        replacement = self.ordinary[random.integers(0, len(self.ordinary), tokens.shape)]
        inputs = np.where(chosen & (kind < 0.8), self.mask_id, tokens)
        inputs = np.where(chosen & (kind >= 0.8) & (kind < 0.9), replacement, inputs)
        return inputs, chosen


class _Rows(_Source):
    """Labelled texts or pairs, tokenised and truncated."""

    def __init__(self, train: Any, valid: Any, tokenizer: Any, max_length: int) -> None:
        self.padding = padding_of(tokenizer)
        self.encoded = {}
        self.labels = {}
        self.sources = {}
        for split, frame in (("train", train), ("valid", valid)):
            texts = frame["text"].tolist()
            pairs = frame["text_pair"].tolist() if "text_pair" in frame else None
            self.encoded[split] = encode_texts(tokenizer, texts, pairs, max_length)
            self.labels[split] = np.asarray(frame["label"], dtype=np.int64)
            if "source" in frame:
                self.sources[split] = np.asarray(frame["source"], dtype=np.int64)

    def examples(self, split: str) -> int:
        return len(self.labels[split])

    def lengths(self, split: str) -> np.ndarray:
        return np.array([len(row) for row in self.encoded[split]["input_ids"]])

    def groups(self, split: str) -> np.ndarray:
        return self.sources.get(split, super().groups(split))

    def batch(self, split: str, rows: np.ndarray, seed: int, part: int, parts: int) -> Batch:
        own_rows = rows[_share(len(rows), part, parts)]
        padding_row = not len(own_rows)
        if padding_row:
            own_rows = rows[:1]
        batch = pad(
            {name: [column[row] for row in own_rows] for name, column in self.encoded[split].items()}, self.padding
        )
        labels = torch.from_numpy(self.labels[split][own_rows])
        if padding_row:
            labels = torch.full_like(labels, -100)  # F.cross_entropy's ignore_index: no loss from this row
        normalizer = torch.tensor(len(rows) / parts, dtype=torch.float32)
        source = {"source": int(self.sources[split][own_rows[0]])} if self.sources else {}
        return {**batch, **source, "labels": labels, "normalizer": normalizer}


def _share(count: int, part: int, parts: int) -> np.ndarray:
    return np.array_split(np.arange(count), parts)[part]
