"""A whole sparse fine-tuning through the callback: rewind bits, frozen bits, repeatability, LT-SFT inside DeFT-X."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import LABELS, make_lines, make_rows

from deftx.core.composition import Composition
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.training.callback import SparseFineTuning, change_of
from deftx.training.encoder import (
    base_fingerprint_of,
    base_parameters,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
)
from deftx.training.fit import fit_phase
from deftx.training.modules import MaskedLM, SequenceClassifier

NONE, PRUNE = RankPolicy.parse("none"), ResidualPolicy.parse("prune:0.05")


def build(folder, settings, kind):
    tokenizer = load_tokenizer(folder)
    if kind == "language":
        module = MaskedLM(load_masked_lm(folder, seed=0)[0], settings)
        lines = make_lines(60, 1), make_lines(20, 2)
        return module, TextDataModule.for_language(*lines, tokenizer, block_length=16, seed=0)
    module = SequenceClassifier(load_classifier(folder, labels=LABELS, seed=0)[0], settings)
    return module, TextDataModule.for_task(make_rows(40, 1), make_rows(9, 2), tokenizer, max_length=24)


def bits(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def run(folder, settings, trainer, tmp_path, kind="language", *, rank=NONE, k=200, seed=1, sparse_seed=2):
    """One sparse fine-tuning in one process; returns the module and its SFT."""
    module, data = build(folder, settings, kind)
    callback = SparseFineTuning(k=k, rank=rank, residual=PRUNE, l1_full=settings.l1_full, l1_sparse=settings.l1_sparse)
    fit_phase(module, data, callback, settings, trainer, tmp_path / "full", seed=seed)
    callback.begin_sparse()
    fit_phase(module, data, callback, settings, trainer, tmp_path / "sparse", seed=sparse_seed)
    return module, callback.delta({"k": k})


def same(first, second) -> bool:
    parts = [(first.indices, second.indices), (first.values, second.values), (first.head, second.head)]
    return all(set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in parts)


def test_the_start_of_a_language_sft_is_not_copied_where_the_decoder_holds_it(folder, settings, trainer, tmp_path):
    module, data = build(folder, settings, "language")
    decoder = module.model.get_output_embeddings().weight
    start = decoder.detach().clone()
    callback = SparseFineTuning()
    fit_phase(module, data, callback, settings, trainer, tmp_path, seed=1)
    held = [t.data_ptr() for t in callback._start.values()]
    assert held.count(decoder.data_ptr()) == 1
    assert torch.equal(decoder, start)
    assert not torch.equal(module.model.get_input_embeddings().weight, start)
    with torch.no_grad():
        module.maskable["embeddings.word_embeddings.weight"].view(-1)[0] += 1
    other = SparseFineTuning()
    other.begin(module)
    assert decoder.data_ptr() not in [t.data_ptr() for t in other._start.values()]


@pytest.mark.parametrize("kind", ["language", "task"])
def test_rewind_is_bit_for_bit_and_nothing_else_ever_changes(folder, settings, trainer, tmp_path, kind):
    """With weight decay and clipping, which a mask on gradients alone would not stop."""
    settings = replace(settings, weight_decay=0.5, clip_norm=0.05)
    module, data = build(folder, settings, kind)
    start = bits(module)
    callback = SparseFineTuning(k=150, rank=NONE, l1_full=0.1, l1_sparse=0.1)
    fit_phase(module, data, callback, settings, trainer, tmp_path / "full", seed=1)
    moved = {name for name, p in bits(module).items() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in module.model.named_parameters() if p.requires_grad}
    state = callback.full_state()

    callback.begin_sparse()
    chosen = callback.selection
    assert sum(index.numel() for index in chosen.values()) == 150
    assert set(chosen) == set(module.maskable)
    callback.begin(module)  # what the next fit does first
    assert all(torch.equal(p, start[name]) for name, p in bits(module).items())
    callback.teardown(None, module, "fit")

    result = fit_phase(module, data, callback, settings, trainer, tmp_path / "sparse", seed=2)
    delta = callback.delta({"method": "ltsft"})
    end = bits(module)
    names = {id(p): name for name, p in module.maskable.items()}
    heads = set(module.head)
    changed = 0
    for full_name, parameter in module.model.named_parameters():
        if full_name in heads:
            assert not torch.equal(end[full_name], start[full_name])
            continue
        different = (end[full_name] != start[full_name]).flatten().nonzero().flatten()
        index = chosen.get(names.get(id(parameter), ""), torch.empty(0, dtype=torch.int64))
        assert set(different.tolist()) <= set(index.tolist()), full_name
        changed += len(different)
    assert changed > 100
    assert sum(len(value) for value in delta.values.values()) == 150
    assert set(delta.head) == heads
    assert all(p.requires_grad for p in module.maskable.values())
    assert result.steps == (6 if kind == "language" else 5)

    # the same in a second process: fresh model, cached full state
    fresh, data = build(folder, settings, kind)
    again = callback.select(change_of(state, fresh))
    assert all(torch.equal(again[name], chosen[name]) for name in chosen)
    other = SparseFineTuning(l1_sparse=0.1, selection=again)
    fit_phase(fresh, data, other, settings, trainer, tmp_path / "second", seed=2)
    assert same(other.delta(), delta)


def test_a_change_outside_the_selection_is_noticed(folders, settings, trainer, tmp_path):
    module, _ = build(folders["bert"], settings, "language")
    selection = {name: torch.arange(2) for name in module.maskable}
    callback = SparseFineTuning(selection=selection)
    callback.begin(module)
    with torch.no_grad():
        module.maskable["encoder.layer.0.output.dense.weight"].view(-1)[1] += 1
        callback.verify()
        module.maskable["encoder.layer.0.output.dense.weight"].view(-1)[2] += 1
    with pytest.raises(RuntimeError, match=r"outside the selection: bert\.encoder\.layer\.0\.output\.dense\.weight"):
        callback.verify()
    with pytest.raises(RuntimeError, match="after a fit of the full phase"):
        callback.change()
    with pytest.raises(DeftxError, match=r"1 parameters this model has not, such as 'pooler.dense.weight'"):
        SparseFineTuning(selection={"pooler.dense.weight": torch.arange(2)}).begin(module)
    with pytest.raises(DeftxError, match="lacks"):
        change_of({}, module)


@pytest.mark.parametrize("kind", ["language", "task"])
def test_ltsft_is_deftx_at_full_rank_bit_for_bit(folders, settings, trainer, tmp_path, kind):
    lottery = run(folders["bert"], settings, trainer, tmp_path / "a", kind)[1]
    module, _ = build(folders["bert"], settings, kind)
    largest = max(min(p.shape) for p in module.maskable.values() if p.ndim == 2)
    full_rank = run(folders["bert"], settings, trainer, tmp_path / "b", kind, rank=RankPolicy.parse(largest))[1]
    rank_one = run(folders["bert"], settings, trainer, tmp_path / "c", kind, rank=RankPolicy.parse(1))[1]
    assert same(lottery, full_rank)
    assert not same(lottery, rank_one)


def test_same_seed_same_bits_another_seed_not(folder, settings, trainer, tmp_path):
    torch.manual_seed(1)
    first = run(folder, settings, trainer, tmp_path / "a")[1]
    torch.manual_seed(2)  # the global generator decides nothing
    second = run(folder, settings, trainer, tmp_path / "b")[1]
    third = run(folder, settings, trainer, tmp_path / "c", seed=5)[1]
    fourth = run(folder, settings, trainer, tmp_path / "d", sparse_seed=5)[1]
    assert same(first, second)
    assert not same(first, third)
    assert all(torch.equal(first.indices[n], fourth.indices[n]) for n in first.indices)
    assert not same(first, fourth)


def test_the_order_of_the_data_knows_nothing_of_rank_and_k(folders, settings, trainer, tmp_path, monkeypatch):
    seen: list[list[bytes]] = []
    original = MaskedLM.training_step

    def spy(self, batch, batch_idx):
        seen[-1].append(batch["input_ids"].numpy().tobytes() + batch["positions"].numpy().tobytes())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MaskedLM, "training_step", spy)
    for index, (rank, k) in enumerate([("none", 50), ("2", 50), ("energy:0.5", 900)]):
        seen.append([])
        run(folders["bert"], settings, trainer, tmp_path / str(index), rank=RankPolicy.parse(rank), k=k)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 12
    assert seen[0][:6] != seen[0][6:]  # another seed, another order


def test_a_task_sft_is_relative_to_base_plus_source_sft(folder, settings, trainer, tmp_path):
    """Composition before training: θ⁰ + φ_S is the start, and φ_T the difference to it."""
    _, source = run(folder, settings, trainer, tmp_path / "source")
    module, data = build(folder, settings, "task")
    parameters = base_parameters(module.model)
    source.metadata["base_fingerprint"] = base_fingerprint_of(module.model)
    bare = {name: p.detach().clone() for name, p in parameters.items()}
    Composition(parameters, base_fingerprint=base_fingerprint_of(module.model)).add("source", source)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    assert any(not torch.equal(bare[name], start[name]) for name in bare)
    callback = SparseFineTuning(k=100, rank=NONE)
    fit_phase(module, data, callback, settings, trainer, tmp_path / "full", seed=1)
    change = callback.change()
    assert all(torch.equal(change[name], p.detach() - start[name]) for name, p in module.maskable.items())
    callback.begin_sparse()
    fit_phase(module, data, callback, settings, trainer, tmp_path / "sparse", seed=1)
    delta = callback.delta()
    for name, index in delta.indices.items():
        now = module.maskable[name].detach().flatten()[index]
        assert torch.equal(delta.values[name], now - start[name].flatten()[index])


def test_k_zero_trains_the_head_alone(folders, settings, trainer, tmp_path):
    module, delta = run(folders["bert"], settings, trainer, tmp_path, k=0)
    start, _ = build(folders["bert"], settings, "language")
    assert delta.indices == {}
    assert all(torch.equal(p, start.maskable[name]) for name, p in module.maskable.items())
    assert all(not torch.equal(p, start.head[name]) for name, p in module.head.items())
    assert module.selection is None


def test_l1_holds_the_full_phase_back(folders, settings, trainer, tmp_path):
    distances = []
    for weight in (0.0, 1e4):
        module, data = build(folders["bert"], settings, "language")
        callback = SparseFineTuning(l1_full=weight)
        fit_phase(module, data, callback, settings, trainer, tmp_path / str(weight), seed=1)
        distances.append(sum(float(delta.abs().sum()) for delta in callback.change().values()))
    assert distances[1] < 0.7 * distances[0]


def test_layers_below_the_lowest_selected_one_are_not_walked(folder, settings):
    """Nothing there requires a gradient, so autograd keeps no graph of them."""
    module, data = build(folder, settings, "language")
    last = f"encoder.layer.{module.model.config.num_hidden_layers - 1}."
    name = next(name for name in module.maskable if name.startswith(last) and name.endswith("query.weight"))
    callback = SparseFineTuning(selection={name: torch.tensor([3, 5])})
    callback.begin(module)
    module.configure_optimizers()
    walked = []
    for layer in module.model.base_model.encoder.layer:
        layer.register_forward_hook(
            lambda _, __, out: walked.append((out[0] if type(out) is tuple else out).requires_grad)
        )
    data.schedule(batch_size=8, steps=1, seed=1)
    module.training_step(next(iter(data.train_dataloader())), 0).backward()
    assert walked == [False] * (len(walked) - 1) + [True]
    assert list(module.gradients.values) == [module.maskable[name]]
    assert all(p.grad is None for p in module.maskable.values())
