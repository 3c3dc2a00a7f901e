"""Losses, gradients and schedules of the two modules against independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import LABELS, make_lines, make_rows

from deftx.data.module import TextDataModule, _Validation
from deftx.errors import DeftxError
from deftx.knobs import problems
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import load_classifier, load_masked_lm, load_tokenizer
from deftx.training.modules import MaskedLM, SequenceClassifier
from deftx.training.settings import TrainingSettings


def language(folder, settings, probability=0.15):
    model, _ = load_masked_lm(folder, seed=0)
    tokenizer = load_tokenizer(folder)
    data = TextDataModule.for_language(
        make_lines(60, 1), make_lines(20, 2), tokenizer, block_length=16, seed=0, mlm_probability=probability
    )
    return MaskedLM(model, settings), data


def task(folder, settings, pairs=False):
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    tokenizer = load_tokenizer(folder)
    data = TextDataModule.for_task(make_rows(22, 1, pairs), make_rows(9, 2, pairs), tokenizer, max_length=24)
    return SequenceClassifier(model, settings), data


def batches(data, **plan):
    data.schedule(**{"batch_size": 8, "steps": 4, "seed": 1, **plan})
    return list(data.train_dataloader())


def test_masked_only_loss_is_the_model_s_own(folder, settings):
    module, data = language(folder, settings)
    module.eval()
    for batch in batches(data)[:2]:
        labels = torch.full_like(batch["input_ids"], -100)
        labels.view(-1)[batch["positions"]] = batch["targets"]
        own = module.model(input_ids=batch["input_ids"], labels=labels)
        assert module(batch).shape == (len(batch["targets"]), own.logits.shape[-1])
        assert torch.allclose(module.loss(batch), own.loss, rtol=1e-6)
        assert torch.allclose(module.training_step(batch, 0), own.loss, rtol=1e-6)
        module.loss(batch).backward()
        gradients = {n: p.grad.clone() for n, p in module.trained().items()}
        module.zero_grad()
        own.loss.backward()
        for name, parameter in module.trained().items():
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7), name
        module.zero_grad()


@pytest.mark.parametrize("pairs", [False, True])
def test_classifier_loss_is_the_model_s_own(folder, settings, pairs):
    module, data = task(folder, settings, pairs)
    module.eval()
    batch = batches(data)[2]
    assert len(batch["labels"]) == 6  # 22 rows: the last batch of the epoch is kept
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
    own = module.model(**inputs, attention_mask=mask, labels=batch["labels"])
    assert torch.allclose(module.training_step(batch, 0), own.loss, rtol=1e-5)


@pytest.mark.parametrize("make", [language, task])
@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_a_step_in_several_batches_has_the_whole_step_s_gradient(folders, settings, make, accumulate):
    module, data = make(folders["bert"], settings)
    module.eval()
    whole = batches(data)
    parts = batches(data, accumulate=accumulate)
    assert len(parts) == accumulate * len(whole)
    for step in (0, 2):
        module.training_step(whole[step], 0).backward()
        expected = {name: p.grad.clone() for name, p in module.trained().items()}
        module.zero_grad()
        for batch in parts[step * accumulate : (step + 1) * accumulate]:
            (module.training_step(batch, 0) / accumulate).backward()
        for name, parameter in module.trained().items():
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-7), name
        module.zero_grad()


def gradient_of(module, parameter, index):
    """What the step would use of a parameter's gradient, flat: gathered already, or still within ``.grad``."""
    if module.gradients is not None and parameter in module.gradients.values:
        return module.gradients.values[parameter].clone()
    return parameter.grad.flatten()[slice(None) if index is None else index].clone()


@pytest.mark.parametrize("phase", ["full", "sparse", "gathered"])
def test_l1_is_the_penalty_s_autograd_gradient(folder, settings, phase):
    """λ/P · (Σ|θ − θ⁰| + Σ|h − h⁰|) over what trains, P all parameters of the model."""
    module, data = language(folder, settings)
    module.eval()
    selection = None
    if phase != "full":
        module.options.sparse_gradients = phase == "gathered"
        generator = torch.Generator().manual_seed(0)
        selection = {
            name: torch.randperm(p.numel(), generator=generator)[: p.numel() // 3].sort().values
            for name, p in module.maskable.items()
        }
        selection["encoder.layer.0.output.dense.bias"] = torch.empty(0, dtype=torch.int64)
    callback = SparseFineTuning(l1_full=7.0, l1_sparse=7.0, selection=selection)
    callback.begin(module)
    callback.watch(module.configure_optimizers()["optimizer"])
    trained = module.trained()
    assert ("encoder.layer.0.output.dense.bias" in trained) == (phase == "full")
    starts = {name: p.detach().clone() for name, p in trained.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in trained.items():
            moved = torch.randn(p.shape, generator=generator) * 0.01
            moved[torch.rand(p.shape, generator=generator) < 0.2] = 0  # |x| has gradient 0 there
            if selection is not None and name in selection:
                keep = torch.zeros(p.numel())
                keep[selection[name]] = 1
                moved *= keep.view(p.shape)
            p.add_(moved)
    batch = batches(data)[0]
    module.training_step(batch, 0).backward()
    places = selection or {}
    plain = {name: gradient_of(module, p, places.get(name)) for name, p in trained.items()}
    assert (trained["embeddings.word_embeddings.weight"].grad is None) == (phase == "gathered")
    callback.on_before_optimizer_step(None, module, None)
    found = {name: gradient_of(module, p, places.get(name)) - plain[name] for name, p in trained.items()}
    callback.teardown(None, module, "fit")
    assert not module.model.get_input_embeddings().sparse

    total = sum(p.numel() for p in module.model.parameters())
    module.zero_grad()
    penalty = 7.0 / total * sum((p - starts[name]).abs().sum() for name, p in trained.items())
    penalty.backward()
    for name, p in trained.items():
        pull = gradient_of(module, p, places.get(name))
        assert torch.allclose(found[name], pull, rtol=1e-2, atol=1e-9), name
        assert torch.allclose(plain[name] + pull, plain[name] + found[name], rtol=1e-6, atol=1e-10), name
    assert all(p.requires_grad for p in module.maskable.values())


@pytest.mark.parametrize("limit", [0.01, 1e9])
@pytest.mark.parametrize("gathered", [False, True])
def test_clipping_takes_the_norm_over_what_trains(folder, settings, limit, gathered):
    settings = TrainingSettings(**{**settings.__dict__, "clip_norm": limit})
    module, data = language(folder, settings)
    module.eval()
    module.options.sparse_gradients = gathered
    selection = {name: torch.arange(0, p.numel(), 2) for name, p in module.maskable.items()}
    callback = SparseFineTuning(selection=selection)
    callback.begin(module)
    module.configure_optimizers()
    module.training_step(batches(data)[0], 0).backward()

    def trained_gradients():
        for name, p in module.maskable.items():
            yield gradient_of(module, p, selection[name]).double()
        for p in module.head.values():
            yield p.grad.flatten().double()

    before = [g.clone() for g in trained_gradients()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in before))
    module.configure_gradient_clipping(None)
    factor = min(1.0, limit / (norm + 1e-6))
    assert (factor < 1) == (limit < 1)
    for old, new in zip(before, trained_gradients(), strict=True):
        assert torch.allclose(new, old * factor, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_decays_linearly_to_zero(folders, settings, warmup):
    settings = TrainingSettings(**{**settings.__dict__, "warmup_steps": warmup, "learning_rate": 2.0})
    module, _ = language(folders["bert"], settings)
    module.total_steps = 10
    made = module.configure_optimizers()
    rates = []
    for _ in range(11):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    if warmup == 0:
        assert rates == pytest.approx([2 * (10 - step) / 10 for step in range(11)])
    else:
        assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
        assert rates[10] == 0.0
    assert made["optimizer"].param_groups[0]["weight_decay"] == 0.0


def test_hyperparameters_are_plain_and_checkpoints_hold_what_trains(folders, settings):
    module, _ = language(folders["xlm-roberta"], settings)
    assert all(isinstance(value, int | float | type(None)) for value in module.hparams.values())
    checkpoint: dict = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert "head.lm_head.bias" in checkpoint["state_dict"]
    assert not any("decoder" in name or "LayerNorm" in name for name in checkpoint["state_dict"])


def test_refusals(folders, settings):
    model, _ = load_classifier(folders["bert"], labels=LABELS, seed=0)
    with pytest.raises(DeftxError, match=r"'macro_F1'; did you mean 'macro_f1'\?"):
        SequenceClassifier(model, settings, metric="macro_F1")
    bad = TrainingSettings(learning_rate=0.0, batch_size=0, max_steps=2, min_steps=5)
    assert len(problems(bad)) == 3


def test_the_validation_loss_is_the_mean_over_tokens_whatever_the_batches(folder, settings):
    """A mean over batches would let a small last one count as much as the others."""
    data = TextDataModule.for_language(
        make_lines(30, 1), make_lines(6, 2), load_tokenizer(folder), block_length=16, seed=0
    )
    module = MaskedLM(load_masked_lm(folder, seed=0)[0], settings).eval()
    found, losses = [], []
    with torch.no_grad():
        for size in (1, 4, 100):
            module.val_loss.reset()
            for batch in map(
                _Validation(data._source, 0, size, 0, 1).__getitem__, range(-(-data.valid_examples // size))
            ):
                module.validation_step(batch, 0)
                if size == 1:
                    losses += torch.nn.functional.cross_entropy(
                        module(batch), batch["targets"], reduction="none"
                    ).tolist()
            found.append(float(module.val_loss.compute()))
    assert data.valid_examples % 4 != 0
    assert found == pytest.approx([sum(losses) / len(losses)] * 3, rel=1e-6)
