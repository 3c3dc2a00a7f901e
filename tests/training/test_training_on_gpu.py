"""What fits promise on a CUDA device: frozen and rewound bits, the CPU's results, resuming, one fit of both phases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_own_module import OPTIMIZERS, OwnClassifier, batches, loader, one_fit, trainer_of
from tiny_models import LABELS, make_lines, make_rows

from deftx.core.composition import Composition
from deftx.data.module import TextDataModule
from deftx.training.callback import SparseFineTuning, change_of
from deftx.training.encoder import (
    base_fingerprint_of,
    base_parameters,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
)
from deftx.training.fit import fit_phase
from deftx.training.modules import Encoder, MaskedLM, SequenceClassifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU, DEVICE = "gpu", "cuda"
PRECISIONS = ("32-true", "bf16-mixed")
PHASES = ("full", "sparse")
KINDS = ("language", "task")
K = 150


@pytest.fixture
def on_gpu(trainer):
    """Trainer settings of a fit on the GPU."""
    return replace(trainer, accelerator=GPU)


def build(folder, settings, kind):
    tokenizer = load_tokenizer(folder)
    if kind == "language":
        module = MaskedLM(load_masked_lm(folder, seed=0)[0], settings)
        lines = make_lines(60, 1), make_lines(20, 2)
        return module, TextDataModule.for_language(*lines, tokenizer, block_length=16, seed=0)
    module = SequenceClassifier(load_classifier(folder, labels=LABELS, seed=0)[0], settings)
    return module, TextDataModule.for_task(make_rows(60, 1), make_rows(9, 2), tokenizer, max_length=24)


def bits(module):
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


def differing(first, second):
    return {name for name in first if not torch.equal(first[name], second[name])}


def without_dropout(module):
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return module


def only_selected_moved(module, start, selection, maskable, head):
    """How many coordinates moved; all of them selected or in the head, and nothing else."""
    names, count = {id(p): name for name, p in maskable.items()}, 0
    for full_name, now in bits(module).items():
        if full_name in head:
            continue
        moved = (now != start[full_name]).flatten().nonzero().flatten()
        index = selection.get(names.get(id(module.get_parameter(full_name)), ""), torch.empty(0, dtype=torch.int64))
        assert set(moved.tolist()) <= set(index.tolist()), f"{full_name} moved outside the selection"
        count += len(moved)
    return count


@pytest.fixture
def where(monkeypatch):
    """Notes of each training step on which device, and whether in bfloat16, it computed."""
    seen = set()
    for kind in (MaskedLM, SequenceClassifier):

        def noted(self, batch, index, step=kind.training_step):
            loss = step(self, batch, index)
            device = next(self.parameters()).device.type
            seen.add((device, loss.device.type, torch.is_autocast_enabled(device)))
            return loss

        monkeypatch.setattr(kind, "training_step", noted)
    return seen


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_unselected_bits_stay_and_the_rewind_is_bit_for_bit(folder, settings, on_gpu, tmp_path, kind, precision, where):
    """With weight decay and clipping, which a mask on gradients alone would not stop."""
    settings, on_gpu = replace(settings, weight_decay=0.5, clip_norm=0.05), replace(on_gpu, precision=precision)
    module, data = build(folder, settings, kind)
    start = bits(module)
    callback = SparseFineTuning(k=K, rank="2", l1_full=0.1, l1_sparse=0.1)
    fit_phase(module, data, callback, settings, on_gpu, tmp_path / "full", seed=1)
    full = callback.full_state()
    trained = {f"model.{name}" for name, p in module.model.named_parameters() if p.requires_grad}
    assert differing(start, bits(module)) == trained
    callback.begin_sparse()
    for device in (DEVICE, "cpu"):
        module.to(device)
        module.load_trained(full)
        assert differing(start, bits(module)) == trained
        callback.rewind()
        assert not differing(start, bits(module)), f"rewound on {device}"
    module.load_trained(full)

    fit_phase(module, data, callback, settings, on_gpu, tmp_path / "sparse", seed=2)
    head = {f"model.{name}" for name in module.head}
    moved = only_selected_moved(module, start, callback.selection, module.maskable, head)
    assert moved > K * 0.6
    delta = callback.delta({"base_fingerprint": "0" * 64})
    assert delta.k == K
    assert set(delta.head) == set(module.head)
    assert all(p.requires_grad for p in module.maskable.values())
    assert where == {(DEVICE, DEVICE, precision == "bf16-mixed")}

    # a freshly loaded model rebuilds what was trained, and selects the same from the full phase's state
    fresh, _ = build(folder, settings, kind)
    again = callback.select(change_of(full, fresh))
    assert all(torch.equal(again[name], callback.selection[name]) for name in again)
    fresh.to(DEVICE)
    parameters = {name: p.data for name, p in base_parameters(fresh.model).items()}
    Composition(parameters, base_fingerprint="0" * 64).add("sft", delta)
    for name, index in delta.indices.items():
        trained_values = module.maskable[name].detach().flatten()[index]
        torch.testing.assert_close(parameters[name].flatten().cpu()[index], trained_values, rtol=1e-6, atol=1e-8)
    assert base_fingerprint_of(build(folder, settings, kind)[0].model) != base_fingerprint_of(fresh.model)


@pytest.mark.parametrize("kind", KINDS)
def test_both_phases_train_as_on_a_cpu(folder, settings, trainer, on_gpu, tmp_path, kind):
    """Without dropout, whose draws are a device's own. Adam turns a gradient that is all rounding into a whole step
    (attention's key biases have no other), so that a few coordinates may differ."""
    runs = {}
    selection = None
    for name, options in (("cpu", trainer), ("gpu", on_gpu)):
        module, data = build(folder, settings, kind)
        without_dropout(module)
        callback = SparseFineTuning(k=K, rank="none", l1_full=0.1, l1_sparse=0.1)
        full = fit_phase(module, data, callback, settings, options, tmp_path / name / "full", seed=1)
        change = callback.change()
        selection = callback.select(change) if selection is None else selection
        own = callback.select(change)
        callback.begin_sparse(selection)
        sparse = fit_phase(module, data, callback, settings, options, tmp_path / name / "sparse", seed=2)
        runs[name] = (full, sparse, change, own, callback.delta())
    (full, sparse, change, own, delta), (gpu_full, gpu_sparse, gpu_change, gpu_own, gpu_delta) = runs.values()
    for expected, found in ((full, gpu_full), (sparse, gpu_sparse)):
        assert found.steps == expected.steps
        assert [entry["step"] for entry in found.history] == [entry["step"] for entry in expected.history]
        for entry, other in zip(expected.history, found.history, strict=True):
            losses = {key: value for key, value in entry.items() if "loss" in key}
            assert {key: other[key] for key in losses} == pytest.approx(losses, rel=2e-3)
        assert found.padding == expected.padding
    assert full.best_step == gpu_full.best_step
    for ours, theirs in ((change, gpu_change), (delta.values, gpu_delta.values)):
        kept = {name for name in ours if not name.endswith("key.bias")}
        one, other = (torch.cat([side[name].flatten() for name in sorted(kept)]) for side in (ours, theirs))
        assert float(one.abs().max()) > 5e-3
        assert float(((one - other).abs() > 1e-4).float().mean()) < 0.01
    shared = sum(len(set(index.tolist()) & set(gpu_own[name].tolist())) for name, index in own.items())
    assert shared > 0.9 * K


class Killed(BaseException):
    """Ends a fit where it stands, as a kill would."""


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_fit_resumes_to_the_bits_of_one_that_ran_through(
    folders, settings, on_gpu, tmp_path, monkeypatch, caplog, kind, phase, precision
):
    """Dropout included: a batch's draws depend on its number alone."""
    settings = replace(settings, max_steps=5, eval_every=3, epochs=5, clip_norm=0.5)
    on_gpu = replace(on_gpu, precision=precision, checkpoint_minutes=0)
    step, count = Encoder.training_step, {"steps": 0, "last": None}

    def counted(self, batch, index):
        if count["steps"] == count["last"]:
            raise Killed
        count["steps"] += 1
        return step(self, batch, index)

    monkeypatch.setattr(Encoder, "training_step", counted)

    def fit(scratch, last=None):
        count.update(steps=0, last=last)
        module, data = build(folders["bert"], settings, kind)
        selection = {name: torch.arange(0, p.numel(), 3) for name, p in list(module.maskable.items())[:-3]}
        callback = SparseFineTuning(l1_full=0.1, l1_sparse=0.1, selection=selection if phase == "sparse" else None)
        result = fit_phase(module, data, callback, settings, on_gpu, tmp_path / scratch, seed=1)
        if phase == "sparse":
            callback.verify()
        return bits(module), result

    expected, whole = fit("whole")
    again, _ = fit("again")
    assert not differing(expected, again), "the same fit twice gives the same bits"
    with pytest.raises(Killed):
        fit("killed", last=4)
    resumed, result = fit("killed")
    assert "resumes at step 4 of 5" in caplog.text
    assert count["steps"] == 1
    assert not differing(expected, resumed)
    assert (result.best_score, result.best_step, result.history) == (whole.best_score, whole.best_step, whole.history)


@pytest.mark.parametrize(("begins_on", "precision"), [("cpu", "bf16-mixed"), (DEVICE, "32-true")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_fit_of_both_phases_around_an_own_module(folder, optimizer, begins_on, precision):
    items = batches(folder, 4, 1)
    module = OwnClassifier(folder, OPTIMIZERS[optimizer]).to(begins_on)
    start, callback = bits(module), one_fit(k=K, rank="2", l1_full=0.3, l1_sparse=0.2, clip_norm=0.5)
    trainer_of(callback, accelerator=GPU, devices=1, precision=precision).fit(module, loader(items))
    maskable = {name.removeprefix("backbone."): p for name, p in module.named_parameters() if "backbone." in name}
    moved = only_selected_moved(module, start, callback.selection, maskable, {"linear.weight", "linear.bias"})
    assert moved > K * 0.6
    assert all(p.requires_grad for p in module.parameters()), "the module is free again"
    delta = callback.delta({"kind": "task"})
    assert delta.k == K
    for name, index in delta.indices.items():
        change = (maskable[name].detach().cpu() - start[f"backbone.{name}"]).flatten()[index]
        assert torch.equal(delta.values[name], change)
    callback.rewind()
    assert not differing(start, bits(module))


def test_one_fit_of_both_phases_gives_what_it_gives_on_a_cpu(folder):
    items = batches(folder, 4, 1)
    sides = []
    for accelerator in ("cpu", GPU):
        module, callback = OwnClassifier(folder), one_fit(k=K, l1_full=0.3, l1_sparse=0.2, clip_norm=0.5)
        trainer_of(callback, accelerator=accelerator, devices=1).fit(module, loader(items))
        sides.append((bits(module), callback.selection))
    (expected, chosen), (found, gpu_chosen) = sides
    shared = sum(len(set(index.tolist()) & set(gpu_chosen[name].tolist())) for name, index in chosen.items())
    assert shared >= K * 0.95
    one, other = (torch.cat([side[name].flatten() for name in sorted(expected)]) for side in (expected, found))
    different = int(((one - other).abs() > 1e-4).sum())
    assert different <= 4 * (K - shared), "but for coordinates that only one of the two selected"
