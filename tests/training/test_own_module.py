"""SparseFineTuning around a LightningModule that is not deftx's: one fit, two fits, and a loop written by hand."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import LABELS, make_lines, make_rows
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from deftx.core.composition import Composition
from deftx.core.delta import SparseDelta
from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.seeds import seed_of
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import (
    base_fingerprint_of,
    base_parameters,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
)
from deftx.training.fit import fit_phase
from deftx.training.modules import MaskedLM, SequenceClassifier

README = Path(__file__).parents[2] / "README.md"
FULL, SPARSE, K = 5, 7, 60
OPTIMIZERS = {
    "AdamW with decay": lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.5, eps=1e-3),
    "Adam with decay in the gradient": lambda p: torch.optim.Adam(
        p, lr=5e-3, weight_decay=0.02, amsgrad=True, eps=1e-3
    ),
    "SGD with momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, lr=2e-3, momentum=0.9, centered=True, eps=1e-3),
}


class OwnClassifier(pl.LightningModule):
    """An encoder of transformers, a linear layer, and an optimizer of one's choice."""

    def __init__(self, folder, make_optimizer=OPTIMIZERS["AdamW with decay"]):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
        self.linear = nn.Linear(16, len(LABELS))
        self.make_optimizer = make_optimizer
        self.configured = []

    def forward(self, batch):
        return self.linear(self.backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0])

    def training_step(self, batch, index):
        loss = cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", cross_entropy(self(batch), batch["labels"]))

    def configure_optimizers(self):
        self.configured.append(int(self.trainer.estimated_stepping_batches))
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.configured[-1])
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


class WholeModel(OwnClassifier):
    """The head is the one that transformers puts on the encoder."""

    def __init__(self, folder):
        super().__init__(folder)
        del self.backbone, self.linear
        torch.manual_seed(3)
        self.classifier_model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(LABELS), dtype=torch.float32
        )

    def forward(self, batch):
        return self.classifier_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def batches(folder, count, seed, *, size=6):
    tokenizer = load_tokenizer(folder)
    rows = make_rows(count * size, seed)
    encoded = tokenizer(rows["text"].tolist(), padding=True, truncation=True, max_length=24, return_tensors="pt")
    labels = torch.tensor(rows["label"].tolist())
    return [
        {
            "input_ids": encoded["input_ids"][i : i + size],
            "attention_mask": encoded["attention_mask"][i : i + size],
            "labels": labels[i : i + size],
        }
        for i in range(0, count * size, size)
    ]


def loader(items):
    return DataLoader(items, batch_size=None)


def trainer_of(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def copies(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def one_fit(**options):
    options = {"k": K, "rank": "none", "full_steps": FULL, "sparse_steps": SPARSE} | options
    return SparseFineTuning(**options)


def equal(first, second):
    parts = [(first.indices, second.indices), (first.values, second.values), (first.head, second.head)]
    return all(set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a) for a, b in parts)


def by_hand(module, items, make_optimizer, *, l1, l1_sparse, clip):
    """LT-SFT in a dozen lines of torch: penalty by autograd, dense masks, everything else put back after each step."""
    norms = [p for n, p in module.named_parameters() if "LayerNorm" in n]
    for parameter in norms:
        parameter.requires_grad_(False)
    start = copies(module)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in module.parameters())
    stream = itertools.cycle(items)

    def phase(masks, steps, weight):
        optimizer = make_optimizer(list(trained.values()))
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        for _ in range(steps):
            batch = next(stream)
            optimizer.zero_grad()
            distance = sum((p - start[n]).abs().sum() for n, p in trained.items())
            (cross_entropy(module(batch), batch["labels"]) + weight / count * distance).backward()
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    parameter.grad *= masks[name]
            if clip:
                nn.utils.clip_grad_norm_(trained.values(), clip)
            optimizer.step()
            decay.step()
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(torch.where(masks[name].bool(), parameter, start[name]))

    phase({n: torch.ones_like(p) for n, p in trained.items()}, FULL, l1)
    encoder = [n for n in trained if n.startswith("backbone.")]
    change = torch.cat([(trained[n] - start[n]).detach().flatten() for n in encoder])
    kept = torch.zeros_like(change)
    kept[change.abs().topk(K).indices] = 1
    masks = {n: torch.ones_like(p) for n, p in trained.items()}
    for name, part in zip(encoder, kept.split([trained[n].numel() for n in encoder]), strict=True):
        masks[name] = part.view_as(trained[name])
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    phase(masks, SPARSE, l1_sparse)
    return masks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_fit_equals_a_loop_written_by_hand_and_no_unselected_bit_moves(folder, optimizer):
    items = batches(folder, 4, 1)
    module = OwnClassifier(folder, OPTIMIZERS[optimizer])
    start = copies(module)
    callback = one_fit(l1_full=0.3, l1_sparse=0.2, clip_norm=0.5)
    trainer_of(callback).fit(module, loader(items))
    assert module.configured == [FULL, SPARSE], "each phase has optimizers, and a length, of its own"
    assert all(p.requires_grad for p in module.parameters()), "the module is free again"

    expected = OwnClassifier(folder)
    masks = by_hand(expected, items, OPTIMIZERS[optimizer], l1=0.3, l1_sparse=0.2, clip=0.5)
    moved = 0
    for name, parameter in expected.named_parameters():
        ours = module.get_parameter(name)
        different = (ours != start[name]).flatten()
        if not name.startswith("linear."):
            mask = torch.zeros_like(different)
            mask[callback.selection.get(name.removeprefix("backbone."), torch.empty(0, dtype=torch.int64))] = True
            assert not (different & ~mask).any(), f"{name} moved outside the selection"
            assert torch.equal(mask, masks[name].flatten().bool() if name in masks else mask & False), name
            moved += int(different.sum())
        torch.testing.assert_close(ours, parameter, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert moved > K * 0.9

    delta = callback.delta({"kind": "task"})
    assert delta.k == K
    assert set(delta.head) == {"linear.weight", "linear.bias"}
    assert delta.metadata["method"] == "ltsft"


def test_the_trainer_s_own_clipping_sees_the_selected_gradients_alone(folder):
    """As must every optimizer whose step depends on the norm of a whole gradient."""
    items = batches(folder, 4, 1)
    modules = [OwnClassifier(folder) for _ in range(2)]
    for module, callback, clip in zip(modules, (one_fit(clip_norm=0.5), one_fit()), (None, 0.5), strict=True):
        trainer_of(callback, gradient_clip_val=clip).fit(module, loader(items))
    for ours, theirs in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_two_fits_give_the_bits_of_one(folder):
    items = batches(folder, FULL + SPARSE, 1)
    options = {"k": K, "rank": 2, "l1_full": 0.3, "l1_sparse": 0.2, "clip_norm": 0.5}
    once = SparseFineTuning(**options, full_steps=FULL, sparse_steps=SPARSE)
    trainer_of(once).fit(OwnClassifier(folder), loader(items))

    twice, module = SparseFineTuning(**options), OwnClassifier(folder)
    trainer_of(twice, max_steps=FULL).fit(module, loader(items[:FULL]))
    twice.begin_sparse()
    trainer_of(twice, max_steps=SPARSE).fit(module, loader(items[FULL:]))
    assert equal(once.delta(), twice.delta())
    assert once.reports
    assert [(r.name, r.rank) for r in once.reports] == [(r.name, r.rank) for r in twice.reports]
    assert once.delta().metadata == twice.delta().metadata


class Stream(pl.LightningDataModule):
    """The batches of both phases, one after the other, and deftx's validation."""

    def __init__(self, data, items):
        super().__init__()
        self.data, self.items = data, items

    def train_dataloader(self):
        return loader(self.items)

    def val_dataloader(self):
        return self.data.val_dataloader()


class Seeds(pl.Callback):
    """Dropout of a batch as in the stages: by phase and by the batch's number in it."""

    def __init__(self, seeds, steps):
        self.seeds = [(seed, i) for seed, count in zip(seeds, steps, strict=True) for i in range(count)]

    def on_train_batch_start(self, trainer, module, batch, index):
        seed, i = self.seeds[trainer.global_step]
        torch.manual_seed(seed_of(seed, "dropout", i, 0))


@pytest.mark.parametrize("kind", ["language", "task"])
@pytest.mark.parametrize("rank", ["none", "2"])
def test_one_trainer_gives_the_bits_of_the_stages_two_fits(folder, settings, trainer, tmp_path, kind, rank):
    def build():
        tokenizer = load_tokenizer(folder)
        if kind == "language":
            module = MaskedLM(load_masked_lm(folder, seed=0)[0], settings)
            lines = make_lines(60, 1), make_lines(20, 2)
            return module, TextDataModule.for_language(*lines, tokenizer, block_length=16, seed=0)
        module = SequenceClassifier(load_classifier(folder, labels=LABELS, seed=0)[0], settings)
        return module, TextDataModule.for_task(make_rows(48, 1), make_rows(9, 2), tokenizer, max_length=24)

    options = {"k": 200, "rank": rank, "l1_full": settings.l1_full, "l1_sparse": settings.l1_sparse}
    module, data = build()
    stages = SparseFineTuning(**options)
    full = fit_phase(module, data, stages, settings, trainer, tmp_path / "full", seed=1)
    stages.begin_sparse()
    sparse = fit_phase(module, data, stages, settings, trainer, tmp_path / "sparse", seed=2)

    module, data = build()
    items = []
    for seed in (1, 2):
        data.schedule(batch_size=8, steps=6, accumulate=1, seed=seed, num_workers=0, buckets=settings.length_buckets)
        items += list(data.train_dataloader())
    monitored = {"monitor": module.monitor, "mode": module.mode}
    once = SparseFineTuning(**options, **monitored, full_steps=full.steps, sparse_steps=sparse.steps)
    fitter = trainer_of(
        once,
        Seeds((1, 2), (full.steps, sparse.steps)),
        val_check_interval=settings.eval_every,
        check_val_every_n_epoch=None,
    )
    torch.set_num_threads(1)
    fitter.fit(module, datamodule=Stream(data, items))
    assert (full.steps, sparse.steps) == (6, 6)
    assert equal(once.delta(), stages.delta())


class Scripted(OwnClassifier):
    """Logs validation scores from a list, and keeps the weights that each belongs to."""

    def __init__(self, folder, scores):
        super().__init__(folder)
        self.scores, self.seen = list(scores), []

    def on_validation_epoch_end(self):
        self.log("score", self.scores[len(self.seen)])
        self.seen.append(copies(self))


@pytest.mark.parametrize(
    ("mode", "scores"), [("max", (0.1, 0.7, 0.5, 0.2, 0.9, 0.3)), ("min", (0.9, 0.3, 0.5, 0.7, 0.1, 0.8))]
)
def test_each_phase_keeps_its_best_weights_and_is_validated_at_its_last_step(folder, mode, scores):
    """Validation comes after steps 2, 4, 6, and 8 of the fit, and after 5 and 9, which end the phases."""
    module = Scripted(folder, scores)
    start = copies(module)
    callback = one_fit(full_steps=5, sparse_steps=4, monitor="score", mode=mode)
    trainer = trainer_of(callback, val_check_interval=2, check_val_every_n_epoch=None)
    items = batches(folder, 9, 1)
    trainer.fit(module, loader(items), loader(items[:1]))
    assert len(module.seen) == len(scores)
    best_full, best_sparse = module.seen[1], module.seen[4]
    assert all(torch.equal(p, best_sparse[name]) for name, p in module.named_parameters())
    assert any(not torch.equal(p, module.seen[5][name]) for name, p in module.named_parameters())
    named = {n: n.removeprefix("backbone.") for n in start if n.startswith("backbone.") and "LayerNorm" not in n}
    change = torch.cat([(best_full[n] - start[n]).flatten() for n in named])
    expected = set(change.abs().topk(K).indices.tolist())
    first, chosen = 0, set()
    for full_name, name in named.items():
        chosen |= {first + i for i in callback.selection.get(name, torch.empty(0)).int().tolist()}
        first += start[full_name].numel()
    assert chosen == expected


def test_the_sft_of_an_own_module_gives_its_logits_in_a_fresh_model(folder, tmp_path):
    items = batches(folder, 4, 1)
    module, callback = WholeModel(folder), one_fit()
    trainer_of(callback).fit(module, loader(items))
    module.eval()
    expected = module(items[0])
    callback.delta({"kind": "task", "labels": list(LABELS)}).save(tmp_path / "sft")

    delta = SparseDelta.load(tmp_path / "sft")
    model = load_classifier(folder, labels=LABELS, seed=9)[0].eval()
    Composition(base_parameters(model), base_fingerprint=base_fingerprint_of(model)).add("task", delta)
    with torch.no_grad():
        for name, tensor in delta.head.items():
            model.get_parameter(name).copy_(tensor)
        given = model(input_ids=items[0]["input_ids"], attention_mask=items[0]["attention_mask"]).logits
    torch.testing.assert_close(given, expected.detach(), rtol=1e-5, atol=1e-6)


class OwnMaskedLM(pl.LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.lm = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)

    def training_step(self, batch, index):
        ids = batch["input_ids"]
        return self.lm(input_ids=ids, attention_mask=batch["attention_mask"], labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.1)


def test_the_output_embedding_of_an_own_language_model_stays_where_it_was(folder):
    module, callback = OwnMaskedLM(folder), one_fit()
    before = module.lm.get_output_embeddings().weight.detach().clone()
    assert module.lm.get_output_embeddings().weight is module.lm.get_input_embeddings().weight
    trainer_of(callback).fit(module, loader(batches(folder, 3, 1)))
    assert torch.equal(module.lm.get_output_embeddings().weight, before)
    assert not torch.equal(module.lm.get_input_embeddings().weight, before)
    assert callback.delta({"kind": "language"}).k == K


def test_accumulated_batches_and_an_epoch_shorter_than_a_phase_change_nothing_of_the_steps(folder):
    items = batches(folder, 3, 1)
    module, callback = OwnClassifier(folder), one_fit()
    fitter = trainer_of(callback, accumulate_grad_batches=2, val_check_interval=1.0)
    fitter.fit(module, loader(items), loader(items[:1]))
    assert fitter.global_step == FULL + SPARSE
    assert callback.delta().k == K


def test_the_callback_may_be_fitted_again(folder):
    items = batches(folder, 4, 1)
    callback = one_fit(monitor="val_loss")
    deltas = []
    for _ in range(2):
        options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer_of(callback, **options).fit(OwnClassifier(folder), loader(items), loader(items[:1]))
        deltas.append(callback.delta())
    assert equal(*deltas)


def test_a_fit_that_fails_leaves_the_module_free_to_train(folder):
    class Fails(OwnClassifier):
        def training_step(self, batch, index):
            if self.trainer.global_step == FULL + 1:
                raise ValueError("broken")
            return super().training_step(batch, index)

    module = Fails(folder)
    with pytest.raises(ValueError, match="broken"):
        trainer_of(one_fit()).fit(module, loader(batches(folder, 4, 1)))
    assert all(p.requires_grad for p in module.parameters())


class Manual(OwnClassifier):
    def __init__(self, folder):
        super().__init__(folder)
        self.automatic_optimization = False


class NoOptimizer(OwnClassifier):
    def configure_optimizers(self):
        return None


class TwoEncoders(OwnClassifier):
    def __init__(self, folder):
        super().__init__(folder)
        self.other = AutoModel.from_pretrained(folder)


class NoEncoder(OwnClassifier):
    def __init__(self, folder):
        super().__init__(folder)
        del self.backbone


class Frozen(OwnClassifier):
    def __init__(self, folder):
        super().__init__(folder)
        self.backbone.requires_grad_(False)


class Half(OwnClassifier):
    def __init__(self, folder):
        super().__init__(folder)
        self.backbone.to(torch.bfloat16)


class BatchNorm(OwnClassifier):
    def __init__(self, folder):
        super().__init__(folder)
        self.between = nn.BatchNorm1d(16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Manual, "Manual optimizes manually"),
        (lambda f: OwnClassifier(f, torch.optim.LBFGS), "LBFGS evaluates the loss several times in a step"),
        (NoOptimizer, "no parameter of the encoder in NoOptimizer is in its optimizer"),
        (TwoEncoders, r'holds 2 transformers models \(backbone, other\).*SparseFineTuning\(encoder="backbone"\)'),
        (NoEncoder, "holds no transformers model"),
        (Frozen, "no parameter of the encoder in Frozen requires a gradient"),
        (Half, "bfloat16; an SFT needs float32"),
        (BatchNorm, r"between \(BatchNorm1d\) keeps running statistics"),
    ],
)
def test_a_module_that_the_promises_cannot_be_kept_for_is_refused(folders, make, message):
    with pytest.raises(DeftxError, match=message):
        trainer_of(one_fit()).fit(make(folders["bert"]), loader(batches(folders["bert"], 2, 1)))


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({}, {"max_steps": 100}, r"Trainer\(max_steps=100\) contradicts full_steps \+ sparse_steps = 12"),
        ({}, {"max_epochs": 3}, r"Trainer\(max_epochs=3\) contradicts"),
        ({}, {"precision": "bf16-true"}, "precision=bf16-true.*available: 32-true, bf16-mixed"),
        ({}, {"precision": "64-true"}, "precision=64-true"),
        ({"monitor": "val_los"}, {}, "monitor='val_los' was not logged in validation; available: .*val_loss"),
        ({"encoder": "bakbone"}, {}, "has no submodule 'bakbone'"),
    ],
)
def test_a_trainer_or_a_setting_that_contradicts_is_refused(folders, options, trainer, message):
    items = batches(folders["bert"], 2, 1)
    with pytest.raises(DeftxError, match=message):
        trainer_of(one_fit(**options), **trainer).fit(OwnClassifier(folders["bert"]), loader(items), loader(items))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_steps": None}, "belong together"),
        ({"k": None}, "needs k .* or density"),
        ({"density": 0.1}, "say the same thing twice"),
        ({"k": -1}, "k=-1: must be a whole number of at least 0"),
        ({"full_steps": 0}, "full_steps=0: must be a whole number of at least 1"),
        ({"k": None, "density": 1.5}, r"density=1.5: must lie in \(0, 1\]"),
        ({"l1_full": -1.0}, "l1_full=-1.0"),
        ({"clip_norm": float("nan")}, "clip_norm=nan"),
        ({"mode": "least"}, "mode='least': must be min or max"),
        ({"rank": "energy:2"}, "energy"),
    ],
)
def test_settings_out_of_range_are_refused_where_they_are_given(options, message):
    with pytest.raises(DeftxError, match=message):
        one_fit(**options)


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        trainer.should_stop = trainer.global_step >= 3


def test_a_fit_that_something_else_ends_early_gives_no_sft(folders):
    callback = one_fit()
    with pytest.raises(DeftxError, match="the fit ended after 3 of 12 optimizer steps, in the full phase"):
        trainer_of(callback, Stops()).fit(OwnClassifier(folders["bert"]), loader(batches(folders["bert"], 3, 1)))
    with pytest.raises(RuntimeError, match="after a fit of the sparse phase"):
        callback.delta()


def test_a_checkpoint_of_lightning_s_is_refused(folders, tmp_path):
    items = batches(folders["bert"], 4, 1)
    module, callback = OwnClassifier(folders["bert"]), one_fit()
    fitter = trainer_of(callback)
    fitter.fit(module, loader(items))
    fitter.save_checkpoint(tmp_path / "lightning.ckpt")
    with pytest.raises(DeftxError, match="does not resume from a checkpoint of Lightning's"):
        trainer_of(one_fit()).fit(module, loader(items), ckpt_path=tmp_path / "lightning.ckpt", weights_only=False)


def test_the_lines_of_the_readme_run(folders, tmp_path, monkeypatch):
    section = README.read_text(encoding="utf-8").split("## In your own Lightning code")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"(full_steps|sparse_steps)=\d+", r"\1=4", code).replace(
        "val_check_interval=50", "val_check_interval=2"
    )
    items = loader(batches(folders["bert"], 4, 1))
    names = {"MyClassifier": lambda: OwnClassifier(folders["bert"]), "train_loader": items, "valid_loader": items}
    exec(compile(code, "README", "exec"), names)
    assert SparseDelta.load(tmp_path / "my-sft").k == 200


# --- what lies around a fit


def test_validating_between_two_fits_changes_nothing(folder):
    items = batches(folder, 4, 1)
    plain, looked = OwnClassifier(folder), OwnClassifier(folder)
    deltas = []
    for module, looks in ((plain, False), (looked, True)):
        sft = SparseFineTuning(k=K, rank="none", monitor="val_loss")
        if looks:
            trainer_of(sft).validate(module, loader(items), verbose=False)
        trainer_of(sft, max_steps=FULL).fit(module, loader(items), loader(items))
        if looks:
            trainer_of(sft).validate(module, loader(items), verbose=False)
        sft.begin_sparse()
        trainer_of(sft, max_steps=SPARSE).fit(module, loader(items), loader(items))
        deltas.append(sft.delta())
    assert equal(*deltas)


def test_a_failed_fit_leaves_the_next_module_nothing(folder, caplog):
    class FailsLate(OwnClassifier):
        def training_step(self, batch, index):
            if self.trainer.global_step == FULL - 1:
                raise ValueError("broken")
            return super().training_step(batch, index)

    items = batches(folder, 4, 1)
    sft, fresh = (SparseFineTuning(k=K, rank="none", monitor="val_loss") for _ in range(2))
    failed = FailsLate(folder)
    with pytest.raises(ValueError, match="broken"):
        trainer_of(sft, max_steps=FULL, val_check_interval=1).fit(failed, loader(items), loader(items))
    ended = []
    for callback in (sft, fresh):
        module = OwnClassifier(folder)
        trainer_of(callback, max_steps=FULL).fit(module, loader(items), loader(items))
        ended.append(copies(module))
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    # The same module again starts from what is left of it, and that is said.
    assert "interrupted" not in caplog.text
    with pytest.raises(ValueError, match="broken"):
        trainer_of(sft, max_steps=FULL).fit(failed, loader(items), loader(items))
    with pytest.raises(ValueError, match="broken"):
        trainer_of(sft, max_steps=FULL).fit(failed, loader(items), loader(items))
    assert "the last fit of this module was interrupted" in caplog.text


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_stops_the_fit(folders, score):
    class Lost(OwnClassifier):
        def validation_step(self, batch, index):
            self.log("val_loss", torch.tensor(score))

    items = batches(folders["bert"], 2, 1)
    with pytest.raises(DeftxError, match=rf"val_loss is {score} after step 2 of the full phase; lower the learning"):
        trainer_of(one_fit(monitor="val_loss")).fit(Lost(folders["bert"]), loader(items), loader(items))


def test_deftx_s_own_module_learns_in_a_trainer_of_epochs(folder, settings):
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    module = SequenceClassifier(model, settings)
    items = [{**item, "normalizer": torch.tensor(float(len(item["labels"])))} for item in batches(folder, 4, 1)]
    items = [{name: value for name, value in item.items() if name != "attention_mask"} for item in items]
    sft = SparseFineTuning(k=K, rank="none")
    trainer_of(sft, max_epochs=2).fit(module, loader(items))
    assert module.total_steps == 8


def test_what_was_selected_by_somebody_else_is_not_called_deftx(folder):
    items = batches(folder, 3, 1)
    module, sft = OwnClassifier(folder), SparseFineTuning(k=K, rank="energy:0.9")
    trainer_of(sft, max_steps=FULL).fit(module, loader(items))
    sft.begin_sparse({name: torch.arange(2) for name in list(sft.change())[:3]})
    trainer_of(sft, max_steps=SPARSE).fit(module, loader(items))
    assert not {"method", "rank", "residual"} & set(sft.delta().metadata)


def test_testing_from_a_checkpoint_is_no_fit(folders, tmp_path):
    class Tested(OwnClassifier):
        test_step = OwnClassifier.validation_step

    items = batches(folders["bert"], 2, 1)
    module, sft = Tested(folders["bert"]), one_fit()
    trainer = trainer_of(sft)
    trainer.fit(module, loader(items))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    trainer.test(module, loader(items), ckpt_path=str(tmp_path / "c.ckpt"), verbose=False, weights_only=False)


def test_a_refused_module_is_left_as_it_was(folders):
    class Sparse(OwnClassifier):
        def __init__(self, folder):
            super().__init__(folder)
            self.backbone.get_input_embeddings().sparse = True

    for make, message in ((Half, "bfloat16"), (Sparse, "has sparse=True, and its gradients cannot be masked")):
        module = make(folders["bert"])
        with pytest.raises(DeftxError, match=message):
            trainer_of(one_fit()).fit(module, loader(batches(folders["bert"], 2, 1)))
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_encoder_inside_a_language_model_is_untied_from_its_decoder(folder):
    module = OwnMaskedLM(folder)
    path = next(name for name, part in module.named_modules() if part is module.lm.base_model)
    items = batches(folder, 3, 1)
    sft = one_fit(encoder=path)
    decoder = module.lm.get_output_embeddings().weight.detach().clone()
    trainer_of(sft).fit(module, loader(items))
    assert torch.equal(module.lm.get_output_embeddings().weight, decoder)


def test_frozen_parameters_of_other_dtypes_are_in_no_way(folder):
    class Mixed(OwnClassifier):
        def __init__(self, folder):
            super().__init__(folder)
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)

    sft = one_fit()
    trainer_of(sft).fit(Mixed(folder), loader(batches(folder, 2, 1)))
    assert sft.delta().k == K


def test_a_sparse_phase_that_would_train_nothing_is_refused(folder):
    class HeadOnly(OwnClassifier):
        def configure_optimizers(self):
            chosen = self.parameters() if not self.configured else self.linear.parameters()
            self.configured.append(1)
            return torch.optim.SGD([p for p in chosen if p.requires_grad], lr=0.1)

    with pytest.raises(DeftxError, match="no parameter of the encoder in HeadOnly is in its optimizer"):
        trainer_of(one_fit()).fit(HeadOnly(folder), loader(batches(folder, 2, 1)))
    with pytest.raises(DeftxError, match="fast_dev_run ends the fit early"):
        trainer_of(one_fit(), fast_dev_run=True).fit(OwnClassifier(folder), loader(batches(folder, 2, 1)))
