"""Ways to compute the same: each can be switched off, and the sparse fine-tuning stays what it was."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_phases import build, run, same
from tiny_models import make_rows

from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import load_tokenizer
from deftx.training.fit import fit_phase
from deftx.training.modules import MaskedLM
from deftx.training.profile import PARTS


def test_recomputed_activations_change_no_bit(folder, settings, trainer, tmp_path):
    _, plain = run(folder, settings, trainer, tmp_path / "a")
    module, again = run(folder, settings, replace(trainer, checkpointing=True), tmp_path / "b")
    assert same(plain, again)
    assert not module.model.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["language", "task"])
@pytest.mark.parametrize("rows", [False, True])
def test_gathering_and_profiling_change_no_bit(folder, settings, trainer, tmp_path, kind, rows):
    """With the embedding's gradient dense, and by the rows that occurred."""
    _, plain = run(folder, settings, replace(trainer, sparse_gradients=False), tmp_path / "a", kind)
    module, data = build(folder, settings, kind)
    if not rows:
        module.takes_sparse_rows = lambda: False
    callback = SparseFineTuning(l1_sparse=settings.l1_sparse, selection=plain.indices)
    fit_phase(module, data, callback, settings, replace(trainer, profile=True), tmp_path / "b", seed=2)
    assert module.gradients is None
    assert same(plain, callback.delta())


@pytest.mark.parametrize(
    ("kind", "off"),
    [
        ("language", {"masked_logits": False}),
        ("language", {"fused": False}),
        ("task", {"fused": False}),
    ],
)
def test_the_slow_way_gives_the_same_sft(folder, settings, trainer, tmp_path, kind, off):
    """Within 1e-4 of the largest change: float32 sums in another order, over a dozen steps of AdamW."""
    _, fast = run(folder, settings, trainer, tmp_path / "a", kind)
    _, slow = run(folder, settings, replace(trainer, **off), tmp_path / "b", kind)
    check_close(fast, slow)


def check_close(fast, slow):
    """Within 1e-4 of the largest change, but for two coordinates at the edge of the selection."""
    assert sum(map(len, fast.indices.values())) == sum(map(len, slow.indices.values())) == 200
    largest = max(float(values.abs().max()) for values in slow.values.values())
    shared = 0
    for name, index in slow.indices.items():
        common, here, there = np.intersect1d(index.numpy(), fast.indices[name].numpy(), return_indices=True)
        shared += len(common)
        difference = (slow.values[name][here] - fast.values[name][there]).abs().max() if len(common) else 0.0
        assert float(difference) <= 1e-4 * largest, name
    assert shared >= 198
    assert fast.head.keys() == slow.head.keys() != set()
    for name, tensor in slow.head.items():
        moved = 1e-4 * max(largest, float(tensor.abs().max()))
        assert float((fast.head[name] - tensor).abs().max()) <= moved, name


@pytest.mark.soak
def test_a_captured_encoder_changes_no_bit(folders, settings, trainer, tmp_path, monkeypatch):
    """The graphs that ``torch.compile`` captures, run by torch itself instead of by compiled code."""
    asked, compiler = [], torch.compile

    def capture(function, **options):
        asked.append(options)
        return compiler(function, dynamic=options["dynamic"], backend="eager")

    _, plain = run(folders["bert"], settings, trainer, tmp_path / "a")
    monkeypatch.setattr(torch, "compile", capture)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    resets, reset = [], torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1) or reset())
    try:
        module, again = run(folders["bert"], settings, replace(trainer, compile=True), tmp_path / "b")
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0
        assert len(resets) == 2
    finally:
        torch.compiler.reset()
    assert same(plain, again)
    assert asked == [{"dynamic": True, "options": {"fallback_random": True}}] * 2
    assert module.model.base_model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DEFTX_TEST_COMPILER"), reason="DEFTX_TEST_COMPILER is not set: a minute of C++")
def test_a_compiled_encoder_gives_the_same_sft(folders, settings, trainer, tmp_path):
    """The sparse phase: half the graphs to compile. Kernels fuse, which rounds elsewhere."""
    _, plain = run(folders["bert"], settings, trainer, tmp_path / "a")
    module, data = build(folders["bert"], settings, "language")
    callback = SparseFineTuning(l1_sparse=settings.l1_sparse, selection=plain.indices)
    torch.compiler.reset()
    try:
        fit_phase(module, data, callback, settings, replace(trainer, compile=True), tmp_path / "b", seed=2)
    finally:
        torch.compiler.reset()
    check_close(callback.delta(), plain)


WAYS = ("masked_logits", "fused", "checkpointing", "compile")


@pytest.mark.parametrize("on", [None, *WAYS])
def test_a_way_is_taken_where_it_is_switched_on(folder, settings, trainer, tmp_path, monkeypatch, on):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    seen = {"masked": 0, "rows": 0, "steps": 0, "layers": 0}
    step = MaskedLM.training_step

    def spy(self, batch, batch_idx):
        seen["steps"] += 1
        seen["masked"] += len(batch["targets"])
        (group,) = self.trainer.optimizers[0].param_groups
        seen["loop"] = (group["fused"], group["foreach"]) == (False, False)
        seen["compiled"] = self.model.base_model._compiled_call_impl is not None
        return step(self, batch, batch_idx)

    def count(name, by):
        def hook(module, inputs):
            if torch.is_grad_enabled():  # not in validation
                seen[name] += by(inputs[0])

        return hook

    monkeypatch.setattr(MaskedLM, "training_step", spy)
    module, data = build(folder, settings, "language")
    module.model.get_output_embeddings().register_forward_pre_hook(count("rows", lambda hidden: hidden[..., 0].numel()))
    layer = module.model.base_model.encoder.layer[0]
    layer.intermediate.register_forward_pre_hook(count("layers", lambda hidden: 1))
    trainer = replace(trainer, **{way: way == on for way in WAYS})
    fit_phase(module, data, None, settings, trainer, tmp_path, seed=1)
    taken = {
        "masked_logits": seen["rows"] == seen["masked"],
        "fused": not seen["loop"],
        "checkpointing": seen["layers"] == 2 * seen["steps"],
        "compile": seen["compiled"],
    }
    assert taken == {way: way == on for way in WAYS}


def test_the_parts_of_a_step_are_recorded(folder, settings, trainer, tmp_path):
    module, data = build(folder, settings, "language")
    result = fit_phase(module, data, None, settings, replace(trainer, profile=True), tmp_path, seed=1)
    assert set(result.profile) == set(PARTS)
    assert all(seconds >= 0 for seconds in result.profile.values())
    assert sum(result.profile.values()) * result.steps <= result.seconds
    assert result.peak_memory > 50 << 20
    plain = fit_phase(module, data, None, settings, trainer, tmp_path / "plain", seed=1)
    assert plain.profile == {}


def test_compiling_needs_a_compiler(folder, settings, trainer, tmp_path, monkeypatch):
    module, data = build(folder, settings, "language")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeftxError, match=r"needs a C\+\+ compiler"):
        fit_phase(module, data, None, settings, replace(trainer, compile=True), tmp_path, seed=1)


def stream(folder, rows, buckets, seed=1):
    data = TextDataModule.for_task(rows, rows, load_tokenizer(folder), max_length=120)
    data.schedule(batch_size=8, steps=2 * data.epoch_steps(8), seed=seed, buckets=buckets)
    return list(data.train_dataloader())


@pytest.mark.parametrize("sources", [1, 2])
def test_length_buckets_save_padding_and_lose_no_row(folders, sources):
    rows = make_rows(100, 3)
    rows["text"] = [" ".join([text] * (1 + number % 4)) for number, text in enumerate(rows["text"])]
    rows["label"] = range(100)  # tells rows apart
    if sources == 2:
        rows["source"] = [number % 3 // 2 for number in range(100)]
    plain, bucketed = stream(folders["bert"], rows, 0), stream(folders["bert"], rows, 5)
    for batches in (plain, bucketed):
        first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
        for epoch in (first, second):
            seen = torch.cat([batch["labels"] for batch in epoch])
            assert sorted(seen.tolist()) == list(range(100))
        if sources == 2:
            for batch in batches:
                assert {int(rows["source"][label]) for label in batch["labels"].tolist()} == {batch["source"]}

    def padding(batches):
        return 1 - sum(batch["tokens"] for batch in batches) / sum(batch["input_ids"].numel() for batch in batches)

    assert padding(bucketed) < 0.6 * padding(plain)
    again, other = stream(folders["bert"], rows, 5), stream(folders["bert"], rows, 5, seed=2)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(bucketed, again, strict=True))
    assert not all(torch.equal(a["labels"], b["labels"]) for a, b in zip(bucketed, other, strict=True))
    lengths = [int(batch["input_ids"].shape[1]) for batch in bucketed[:13]]
    assert lengths != sorted(lengths)  # short and long batches are mixed
