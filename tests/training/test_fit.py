"""What a fit promises: exact steps, validation when it should be, the best weights, clear failures, no litter."""

from __future__ import annotations

import os
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import LABELS, make_lines, make_rows

from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import load_classifier, load_masked_lm, load_tokenizer
from deftx.training.fit import fit_phase, phase_steps
from deftx.training.modules import MaskedLM, SequenceClassifier
from deftx.training.settings import TrainerSettings, TrainingSettings


@pytest.fixture
def language(folders, settings):
    folder = folders["bert"]
    tokenizer = load_tokenizer(folder)

    def make(**changes):
        chosen = replace(settings, **changes)
        data = TextDataModule.for_language(
            make_lines(60, 1), make_lines(20, 2), tokenizer, block_length=chosen.max_length, seed=0
        )
        return MaskedLM(load_masked_lm(folder, seed=0)[0], chosen), data, chosen

    return make


@pytest.mark.parametrize(
    ("epochs", "low", "high", "epoch", "expected"),
    [
        (3, 0, None, 3, 9),
        (3, 20, None, 3, 20),
        (3, 0, 5, 3, 5),
        (100, 10_000, 100_000, 5_000_000, 100_000),
        (100, 10_000, 100_000, 2, 10_000),
        (1, 0, None, 1, 1),
    ],
)
def test_steps_are_clamped(epochs, low, high, epoch, expected):
    settings = TrainingSettings(epochs=epochs, min_steps=low, max_steps=high)
    assert phase_steps(settings, epoch) == expected


@pytest.mark.parametrize(
    ("changes", "validated", "steps"),
    [
        ({"eval_every": 3, "max_steps": 7}, [3, 6, 7], 7),
        ({"eval_every": 3, "max_steps": 6}, [3, 6], 6),
        ({"eval_every": 100, "max_steps": 4}, [4], 4),
        ({"eval_every": 2, "max_steps": 5, "accumulate": 3}, [2, 4, 5], 5),
        ({"eval_every": None, "max_steps": None, "epochs": 2, "batch_size": 40}, None, None),
    ],
)
def test_validation_at_the_interval_and_after_the_last_step(language, trainer, tmp_path, changes, validated, steps):
    module, data, settings = language(**changes)
    result = fit_phase(module, data, None, settings, trainer, tmp_path, seed=1)
    if validated is None:  # each epoch: the number of blocks depends on the tokenizer
        epoch = -(-data.examples // 40)
        assert data.examples % 40 != 0
        validated, steps = [epoch, 2 * epoch], 2 * epoch
    assert [entry["step"] for entry in result.history if "val/loss" in entry] == validated
    assert result.steps == steps
    last = [entry for entry in result.history if "train/loss" in entry][-1]
    assert last["step"] == steps
    assert last["train/lr"] == pytest.approx(0.0)  # linear decay ends at zero
    assert 3.0 < last["train/loss"] < 8.0
    assert result.tokens_per_second > 0
    assert result.padding == 0.0


def test_the_best_checkpoint_is_what_the_module_holds(language, trainer, tmp_path):
    """A run whose validation gets worse after its first validation."""
    module, data, settings = language(learning_rate=20.0, eval_every=1, max_steps=4)
    seen: list[dict[str, torch.Tensor]] = []
    original = type(module).on_validation_epoch_end

    class Spy(MaskedLM):
        def on_validation_epoch_end(self):
            seen.append({name: p.detach().clone() for name, p in self.trained().items()})
            original(self)

    module.__class__ = Spy
    result = fit_phase(module, data, SparseFineTuning(), settings, trainer, tmp_path, seed=1)
    losses = [entry["val/loss"] for entry in result.history if "val/loss" in entry]
    assert losses.index(min(losses)) < len(losses) - 1
    assert result.best_score == pytest.approx(min(losses))
    assert result.best_step == losses.index(min(losses)) + 1
    best, last = seen[losses.index(min(losses))], seen[-1]
    now = module.trained()
    saved = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    assert set(saved) == set(now)
    assert all(torch.equal(best[name], now[name]) for name in now)
    assert all(torch.equal(saved[name], now[name]) for name in now)
    assert any(not torch.equal(last[name], now[name]) for name in now)


def test_dropout_is_on_in_training_and_off_in_validation(language, trainer, tmp_path, monkeypatch):
    """transformers loads models in evaluation mode, and Lightning leaves modes as they are."""
    module, data, settings = language()
    assert not module.model.training
    modes = set()
    original = MaskedLM.loss

    def loss(self, batch, **options):
        layers = [layer for layer in self.model.modules() if isinstance(layer, torch.nn.Dropout)]
        modes.add((bool(self.trainer.validating), layers[0].p > 0, all(layer.training for layer in layers)))
        return original(self, batch, **options)

    monkeypatch.setattr(MaskedLM, "loss", loss)
    fit_phase(module, data, None, settings, trainer, tmp_path, seed=1)
    assert modes == {(False, True, True), (True, True, False)}


@pytest.mark.parametrize("metric", ["macro_f1", "accuracy"])
def test_the_task_s_metric_chooses(folder, settings, trainer, tmp_path, metric):
    tokenizer = load_tokenizer(folder)
    module = SequenceClassifier(load_classifier(folder, labels=LABELS, seed=0)[0], settings, metric=metric)
    data = TextDataModule.for_task(make_rows(40, 1, pairs=True), make_rows(30, 2, pairs=True), tokenizer, max_length=60)
    result = fit_phase(module, data, None, replace(settings, eval_every=1), trainer, tmp_path, seed=1)
    entries = [entry for entry in result.history if "val/loss" in entry]
    assert result.best_score == pytest.approx(max(entry[f"val/{metric}"] for entry in entries))
    # an independent count of the best weights' score
    from sklearn.metrics import accuracy_score, f1_score

    from deftx.data.encode import batches_by_length, encode_texts, padding_of
    from deftx.training.predict import predict

    rows = make_rows(30, 2, pairs=True)
    encoded = encode_texts(tokenizer, rows["text"].tolist(), rows["text_pair"].tolist(), 60)
    found = predict(module, batches_by_length(encoded, padding_of(tokenizer), 32), rows=len(rows)).argmax(1)
    expected = (
        accuracy_score(rows["label"], found)
        if metric == "accuracy"
        else f1_score(rows["label"], found, average="macro")
    )
    assert result.best_score == pytest.approx(expected)
    assert 0 < result.padding < 1


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_names_the_step_and_keeps_the_checkpoint(language, trainer, tmp_path, monkeypatch, poison):
    module, data, settings = language(eval_every=2, max_steps=8, log_every=3)
    original = MaskedLM.loss

    def loss(self, batch, **options):
        value = original(self, batch, **options)
        if self.training and self.trainer.global_step == 4:
            if poison == "loss":
                return value * float("nan")
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    monkeypatch.setattr(MaskedLM, "loss", loss)
    with pytest.raises(
        DeftxError, match=r"ace, full phase: .*not finite.* at step 5 of 8; .*checkpoint is kept: "
    ) as info:
        fit_phase(module, data, None, settings, trainer, tmp_path, seed=1, label="ace, full phase")
    kept = Path(str(info.value).split("kept: ")[1].split("\n")[0])
    assert kept.parent == tmp_path
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    # the module is usable again: nothing stays frozen or remembered
    monkeypatch.setattr(MaskedLM, "loss", original)
    module.load_trained(state)
    fit_phase(module, data, None, settings, trainer, tmp_path / "again", seed=1)


def test_a_full_disk_is_said(language, trainer, tmp_path, monkeypatch):
    module, data, settings = language()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deftx.training.checkpoint.torch.save", full)
    with pytest.raises(DeftxError, match=r"cannot write the checkpoint in .*No space left on device"):
        fit_phase(module, data, None, settings, trainer, tmp_path, seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DeftxError, match="cannot write checkpoints to"):
        fit_phase(module, data, None, settings, trainer, tmp_path / "file" / "x", seed=1)


def test_a_failed_sparse_phase_freezes_nothing_for_good(language, trainer, tmp_path, monkeypatch):
    module, data, settings = language()
    selection = {"embeddings.word_embeddings.weight": torch.arange(5)}
    monkeypatch.setattr(MaskedLM, "loss", lambda self, batch, **options: self(batch).sum() * float("nan"))
    with pytest.raises(DeftxError, match="at step 1 of 6"):
        fit_phase(module, data, SparseFineTuning(selection=selection), settings, trainer, tmp_path, seed=1)
    assert all(p.requires_grad for p in module.maskable.values())


def test_nan_before_any_validation_and_in_validation(language, trainer, tmp_path, monkeypatch):
    module, data, settings = language(learning_rate=1e30, clip_norm=0.0, eval_every=4, max_steps=8)
    with pytest.raises(DeftxError, match="no good checkpoint yet"):
        fit_phase(module, data, None, settings, trainer, tmp_path, seed=1)
    assert not list(tmp_path.glob("*.ckpt"))


def test_nothing_is_left_behind(language, trainer, tmp_path, monkeypatch, capfd):
    """No lightning_logs, no messages, no changed generator, threads or determinism."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    module, data, settings = language()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit_phase(module, data, None, settings, replace(trainer, threads=2), tmp_path / "scratch", seed=1)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["best-6.ckpt", "resume.ckpt"]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert all(p.grad is None for p in module.parameters())


def test_loggers_get_every_record(language, trainer, tmp_path):
    class Logger:
        def __init__(self):
            self.calls = []
            self.saved = 0

        def log_metrics(self, metrics, step):
            self.calls.append((step, metrics))

        def save(self):
            self.saved += 1

    module, data, settings = language(log_every=2)
    logger = Logger()
    fit_phase(module, data, None, settings, trainer, tmp_path, seed=1, loggers=[logger], label="ace/full")
    names = {name for _, metrics in logger.calls for name in metrics}
    assert names == {"train/loss", "train/lr", "val/loss"}
    assert [step for step, metrics in logger.calls if "train/loss" in metrics] == [2, 4, 6]
    assert logger.saved == len(logger.calls)  # a phase that is killed leaves its curve


def test_progress_shows_the_label(language, trainer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    module, data, settings = language()
    fit_phase(module, data, None, settings, replace(trainer, progress=True), tmp_path, seed=1, label="ace, full")
    shown = capfd.readouterr().err
    assert "ace, full" in shown
    assert "6/6" in shown


def test_bf16_autocast_trains_with_float32_parameters(language, trainer, tmp_path):
    module, data, settings = language(max_steps=2)
    result = fit_phase(module, data, None, settings, replace(trainer, precision="bf16-mixed"), tmp_path, seed=1)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert 3 < result.best_score < 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "16-mixed"}, "16-mixed is not supported.*bf16-mixed"),
        ({"accelerator": "tpu"}, "accelerator='tpu': must be auto, cpu or gpu"),
        ({"precision": "8", "devices": 0}, "(?s)devices=0: .*precision='8'"),
    ],
)
def test_trainer_settings_are_refused_together(language, tmp_path, changes, message):
    module, data, settings = language()
    with pytest.raises(DeftxError, match=message):
        fit_phase(module, data, None, settings, TrainerSettings(**changes), tmp_path, seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(language, tmp_path):
    module, data, settings = language()
    with pytest.raises(DeftxError, match="no CUDA device"):
        fit_phase(module, data, None, settings, TrainerSettings(accelerator="gpu"), tmp_path, seed=1)


def test_workers_change_nothing(language, trainer, tmp_path):
    results = []
    for workers in (0, 1):
        module, data, settings = language(max_steps=3)
        fit_phase(module, data, None, settings, replace(trainer, num_workers=workers), tmp_path / str(workers), seed=1)
        results.append({name: p.detach().clone() for name, p in module.trained().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("phase", ["full", "sparse"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_do_not_outlive_their_step(language, trainer, tmp_path, monkeypatch, phase, accumulate):
    module, data, settings = language(max_steps=3, accumulate=accumulate)
    every = {name: torch.arange(p.numel()) for name, p in module.maskable.items()}
    alive = []

    def watch(self, *args):
        gathered = module.gradients.values if module.gradients is not None else {}
        alive.append(sum(p.grad is not None or p in gathered for p in module.trained().values()))
        return step(self, *args)

    step = MaskedLM.training_step
    monkeypatch.setattr(MaskedLM, "training_step", watch)
    callback = SparseFineTuning(selection=every if phase == "sparse" else None)
    fit_phase(module, data, callback, settings, trainer, tmp_path, seed=1)
    full = len(module.trained())
    assert alive == [0] * 3 if accumulate == 1 else alive == [0, full] * 3
