"""Two processes train one phase together: the single process's result within float tolerance."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny_models import LABELS, make_lines, make_rows

from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.training.callback import SparseFineTuning
from deftx.training.devices import run_on_devices
from deftx.training.encoder import load_classifier, load_masked_lm, load_tokenizer
from deftx.training.fit import fit_phase
from deftx.training.modules import MaskedLM, SequenceClassifier

pytestmark = pytest.mark.soak


@pytest.fixture
def run(folder, settings, trainer, tmp_path):
    """A fit without dropout, whose noise differs by device."""
    still = tmp_path / "model"
    shutil.copytree(folder, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(still)

    def fit(objective, phase, devices, accumulate, **changes):
        chosen = replace(
            settings,
            **{
                "learning_rate": 1e-3,
                "accumulate": accumulate,
                "log_every": 1,
                "max_steps": 5,
                "clip_norm": 0.5,
                **changes,
            },
        )
        if objective == "language":
            module = MaskedLM(load_masked_lm(still, seed=0)[0], chosen)
            data = TextDataModule.for_language(
                make_lines(30, 1), make_lines(6, 2), tokenizer, block_length=chosen.max_length, seed=0
            )
        else:
            module = SequenceClassifier(load_classifier(still, labels=LABELS, seed=0)[0], chosen)
            data = TextDataModule.for_task(make_rows(21, 1), make_rows(7, 2), tokenizer, max_length=32)
        names = list(module.maskable)[-8:]  # frozen below, so that backward ends early
        selection = {name: torch.arange(0, module.maskable[name].numel(), 2) for name in names}
        callback = SparseFineTuning(
            l1_full=chosen.l1_full * 10,
            l1_sparse=chosen.l1_sparse * 10,
            selection=selection if phase == "sparse" else None,
        )
        result = fit_phase(
            module,
            data,
            callback,
            chosen,
            replace(trainer, devices=devices),
            tmp_path / f"{devices}",
            seed=1,
            label="two devices",
        )
        if phase == "sparse":
            callback.verify()
            change = callback.delta().values
        else:
            change = callback.change()
        return change, {name: p.detach().clone() for name, p in module.head.items()}, result

    return fit


@pytest.mark.parametrize(
    ("family", "objective", "phase", "accumulate"),
    [
        ("bert", "language", "full", 1),
        ("bert", "task", "sparse", 1),
        ("xlm-roberta", "language", "sparse", 2),
        ("xlm-roberta", "task", "full", 2),
    ],
)
def test_two_processes_train_what_one_does(run, objective, phase, accumulate):
    """The last step of an epoch holds fewer rows than the others, and fewer than there are parts."""
    alone, together = run(objective, phase, 1, accumulate), run(objective, phase, 2, accumulate)
    far = count = 0
    for one, two in zip(alone[:2], together[:2], strict=True):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            if not name.endswith("key.bias"):  # its gradient is zero but for rounding, by whose sign Adam moves it
                far += int(((tensor - two[name]).abs() > 1e-5).sum())
                count += tensor.numel()
    assert far < 0.001 * count
    assert any(tensor.abs().max() > 1e-3 for tensor in alone[0].values())
    ours, theirs = alone[2], together[2]
    assert (theirs.steps, theirs.best_step) == (ours.steps, ours.best_step)
    assert theirs.padding == pytest.approx(ours.padding, abs=0.01)  # parts are padded each for itself
    assert theirs.best_score == pytest.approx(ours.best_score, rel=1e-4)
    assert [entry.keys() for entry in theirs.history] == [entry.keys() for entry in ours.history]
    for one, two in zip(ours.history, theirs.history, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_mistake_in_a_process_is_told_by_its_message(run):
    """One message, no traceback of another process, and none of the processes stays."""
    with pytest.raises(DeftxError, match=r"two devices: .*not finite.* at step 2 of 5") as found:
        run("language", "full", 2, 1, learning_rate=1e38, log_every=1)
    assert "Traceback" not in str(found.value)
    assert not multiprocessing.active_children()


def test_a_process_that_dies_ends_the_others(monkeypatch):
    with pytest.raises(DeftxError, match=r"ace: the process of device 1 of 2 died"):
        run_on_devices(_die, 1, 2, on_gpu=False, label="ace")
    assert not multiprocessing.active_children()


def test_asked_to_end_while_others_train():
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        run_on_devices(time.sleep, 600, 2, on_gpu=False, label="ace")
    assert signal.getsignal(signal.SIGTERM) == before
    assert not multiprocessing.active_children()


def test_fewer_validation_rows_than_devices_are_refused(run):
    with pytest.raises(DeftxError, match="7 validation examples for 8 devices"):
        run("task", "full", 8, 1)


def _die(rank):
    if os.environ["LOCAL_RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
