"""Several source languages: each batch computed on θ + its own φ_S, against models in which the sum is written out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LABELS, make_rows

from deftx.core.composition import Composition
from deftx.core.delta import SparseDelta
from deftx.data.module import TextDataModule
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import base_fingerprint_of, base_parameters, load_classifier, load_tokenizer
from deftx.training.fit import fit_phase
from deftx.training.modules import SequenceClassifier


def deltas_of(model, count: int) -> list[SparseDelta]:
    """Language SFTs that touch a third of each parameter (of some none), each its own."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tuned = {}
        base = {name: parameter.detach() for name, parameter in base_parameters(model).items()}
        for number, (name, tensor) in enumerate(base.items()):
            moved = torch.randn(tensor.shape, generator=generator) * 0.2
            moved[torch.rand(tensor.shape, generator=generator) < 0.66] = 0
            tuned[name] = tensor if number % 5 == seed else tensor + moved
        found.append(SparseDelta.from_states(base, tuned, metadata={"base_fingerprint": base_fingerprint_of(model)}))
    return found


@pytest.fixture
def rows():
    def frames(count: int, seed: int):
        frame = make_rows(count, seed)
        frame["source"] = [number % 3 % 2 for number in range(count)]  # two rows of 0 for one of 1
        return frame

    return frames(34, 1), frames(13, 2)


def test_loss_and_gradient_are_those_of_the_written_out_sum(folder, settings, rows):
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    deltas = deltas_of(model, 2)
    module = SequenceClassifier(model, settings, source_sfts=deltas)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = TextDataModule.for_task(*rows, load_tokenizer(folder), max_length=24)
    data.schedule(batch_size=5, steps=6, seed=1)
    module.eval()
    seen = set()
    for batch in data.train_dataloader():
        seen.add(batch["source"])
        loss = module.loss(batch)
        module.zero_grad()
        loss.backward()
        written, _ = load_classifier(folder, labels=LABELS, seed=0)
        composition = Composition(
            {name: parameter.data for name, parameter in base_parameters(written).items()},
            base_fingerprint=base_fingerprint_of(written),
        )
        composition.add("source", deltas[batch["source"]])
        alone = SequenceClassifier(written, settings).eval()
        expected = alone.loss({name: value for name, value in batch.items() if name != "source"})
        expected.backward()
        assert torch.allclose(loss, expected, rtol=1e-6)
        for (name, mine), (_, theirs) in zip(module.trained().items(), alone.trained().items(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7), name
    assert seen == {0, 1}
    # The parameters are θ throughout: no φ_S is ever left in them.
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


def test_the_sources_of_a_batch_decide_what_it_is_computed_on(folders, settings, rows):
    model, _ = load_classifier(folders["bert"], labels=LABELS, seed=0)
    module = SequenceClassifier(model, settings, source_sfts=deltas_of(model, 2)).eval()
    data = TextDataModule.for_task(*rows, load_tokenizer(folders["bert"]), max_length=24)
    data.schedule(batch_size=5, steps=1, seed=1)
    (batch,) = data.train_dataloader()
    assert not torch.allclose(module(batch), module({**batch, "source": 1 - batch["source"]}), atol=1e-3)


def test_both_phases_keep_what_they_must_with_several_sources(folder, settings, trainer, rows, tmp_path):
    """φ is relative to θ⁰ and lies on the selection alone, whatever φ_S were switched during training."""
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    module = SequenceClassifier(model, settings, source_sfts=deltas_of(model, 2))
    start = {name: parameter.detach().clone() for name, parameter in module.maskable.items()}
    data = TextDataModule.for_task(*rows, load_tokenizer(folder), max_length=24)
    callback = SparseFineTuning(l1_full=settings.l1_full, l1_sparse=settings.l1_sparse)
    fit_phase(module, data, callback, settings, trainer, tmp_path / "full", seed=1)
    change = callback.change()
    assert any(bool(tensor.any()) for tensor in change.values())
    selection = {
        name: tensor.abs().flatten().topk(min(7, tensor.numel())).indices.sort().values
        for name, tensor in change.items()
    }
    callback.begin_sparse(selection)
    fit_phase(module, data, callback, settings, trainer, tmp_path / "sparse", seed=2)
    delta = callback.delta({"base_fingerprint": "0" * 64})
    for name, parameter in module.maskable.items():
        rebuilt = start[name].flatten().clone()
        rebuilt[selection[name]] += delta.values[name]
        outside = torch.ones(parameter.numel(), dtype=torch.bool)
        outside[selection[name]] = False
        assert torch.equal(parameter.flatten()[outside], start[name].flatten()[outside]), name
        assert torch.allclose(parameter.flatten(), rebuilt, atol=1e-7)
