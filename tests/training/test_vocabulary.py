"""The loss that keeps no logits, against autograd in float64, and inside a whole sparse fine-tuning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_modules import batches
from test_options import check_close
from test_phases import build, run
from torch.nn.functional import cross_entropy, linear

from deftx.training import modules, vocabulary
from deftx.training.vocabulary import frozen_cross_entropy

VOCABULARY, WIDTH = 300, 24


def made(rows, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator) * spread
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=generator), torch.randn(VOCABULARY, generator=generator)
    return hidden, weight, bias, torch.randint(VOCABULARY, (rows,), generator=generator)


@pytest.mark.parametrize("held", [1, 7 * VOCABULARY, 1 << 27])
@pytest.mark.parametrize(("rows", "spread"), [(1, 1.0), (20, 0.1), (21, 1.0), (14, 100.0)])
def test_loss_and_gradients_are_autograd_s(monkeypatch, held, rows, spread):
    """Spread 100: logits of several hundred, whose exponentials float32 cannot hold."""
    monkeypatch.setattr(vocabulary, "_BUFFER", held)
    hidden, weight, bias, targets = made(rows, spread)
    wanted = [tensor.double().requires_grad_() for tensor in (hidden, bias)]
    truth = cross_entropy(linear(wanted[0], weight.double(), wanted[1]), targets, reduction="sum")
    (truth / 7).backward()
    found = [tensor.clone().requires_grad_() for tensor in (hidden, bias)]
    loss = frozen_cross_entropy(found[0], weight, found[1], targets)
    (loss / 7).backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6 * float(b.grad.abs().max()))


def test_no_rows_and_a_diverged_row():
    hidden, weight, bias, targets = made(0, 1.0)
    assert frozen_cross_entropy(hidden, weight, bias, targets).item() == 0
    hidden, weight, bias, targets = made(3, 1.0)
    hidden[1] = float("nan")
    assert frozen_cross_entropy(hidden, weight, bias, targets).isnan()


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_the_sft_is_that_of_logits_at_all_positions(folders, settings, trainer, tmp_path, monkeypatch, family):
    """Within 1e-4 of the largest change, as any sum in another order."""
    _, slow = run(folders[family], settings, replace(trainer, masked_logits=False), tmp_path / "a")
    calls = []
    monkeypatch.setattr(modules, "LARGE", 1)
    monkeypatch.setattr(modules, "frozen_cross_entropy", lambda *a: calls.append(1) or frozen_cross_entropy(*a))
    _, fast = run(folders[family], settings, trainer, tmp_path / "b")
    assert calls
    check_close(fast, slow)


@pytest.mark.parametrize("what", ["autocast", "validation", "trained decoder", "switched off"])
def test_where_it_cannot_be_used_it_is_not(folders, settings, monkeypatch, what):
    module, data = build(folders["bert"], settings, "language")
    batch = batches(data)[0]
    monkeypatch.setattr(modules, "LARGE", 1)
    assert module._keeps_no_logits(batch)
    module.model.get_output_embeddings().weight.requires_grad_(what == "trained decoder")
    module.options.masked_logits = what != "switched off"
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"),
        torch.set_grad_enabled(what != "validation"),
    ):
        assert not module._keeps_no_logits(batch)
        assert module.loss(batch, reduction="sum").isfinite()
